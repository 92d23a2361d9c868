"""Ŵ = M ⊙ (W₀ + β U V) with gradients that pass straight through the mask to the scores it was made from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpocli.sparse.bits import pack_bits, unpack_bits


class MaskedUpdate(torch.autograd.Function):
    """The masked weight of PST (IJCAI 2022, §3) for one (O, I) matrix, and its backward pass.

    With G = ∂L/∂Ŵ, W′ = W₀ + β U V, and S = |W′| + α₁ A B + α₂ (R 1ᵀ + 1 Cᵀ) + F:

        ∂L/∂S  = G ⊙ W′                         (straight through: ∂L/∂M = ∂L/∂S)
        ∂L/∂A  = α₁ (∂L/∂S) Bᵀ,  ∂L/∂B = α₁ Aᵀ (∂L/∂S),  ∂L/∂F = ∂L/∂S
        ∂L/∂R, ∂L/∂C = α₂ · row and column sums of ∂L/∂S
        ∂L/∂W′ = G ⊙ (M + |W′|), or G ⊙ M where the magnitude is detached;  ∂L/∂U = β ∂L/∂W′ Vᵀ,  ∂L/∂V = β Uᵀ ∂L/∂W′

    Any of U V, A B, R C and F (a full score, movement pruning) may be None. Saved for the backward pass are the
    parameters, which exist anyway, and the mask in bits: W′, S and Ŵ are not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        u: Tensor | None,
        v: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        r: Tensor | None,
        c: Tensor | None,
        full: Tensor | None,
        mask: Tensor | None,
        scales: tuple[float, float, float],
        attached: bool,
    ) -> Tensor:
        """`mask` (O, I) booleans, None keeps everything; `scales` are (β, α₁, α₂)."""
        ctx.save_for_backward(weight, u, v, a, b, None if mask is None else pack_bits(mask))
        ctx.scales, ctx.attached = scales, attached
        return _masked(updated(weight, u, v, scales[0]), mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, u, v, a, b, bits = ctx.saved_tensors
        beta, alpha1, alpha2 = ctx.scales
        needs = ctx.needs_input_grad
        mask = None if bits is None else unpack_bits(bits, weight.shape)
        new = updated(weight, u, v, beta)
        to_score = gradient * new
        to_weight = _masked(gradient, mask)
        if ctx.attached:
            to_weight = to_weight.addcmul_(gradient, new.abs())
        grads: list[Tensor | None] = [None] * 11
        grads[0] = to_weight if needs[0] else None
        if needs[1]:
            grads[1] = beta * (to_weight @ v.T)
        if needs[2]:
            grads[2] = beta * (u.T @ to_weight)
        if needs[3]:
            grads[3] = alpha1 * (to_score @ b.T)
        if needs[4]:
            grads[4] = alpha1 * (a.T @ to_score)
        if needs[5]:
            grads[5] = alpha2 * to_score.sum(1)
        if needs[6]:
            grads[6] = alpha2 * to_score.sum(0)
        if needs[7]:
            grads[7] = to_score
        return tuple(grads)


def updated(weight: Tensor, u: Tensor | None, v: Tensor | None, beta: float) -> Tensor:
    """W′ = W₀ + β U V."""
    return weight if u is None or v is None else torch.addmm(weight, u, v, alpha=beta)


def _masked(tensor: Tensor, mask: Tensor | None) -> Tensor:
    # Not a product: the zeros must be +0, and stay zeros where an entry is not finite. Always memory of its own.
    return tensor.clone() if mask is None else torch.where(mask, tensor, tensor.new_zeros(()))
