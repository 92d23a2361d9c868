"""What an optimiser remembers of each parameter, by name: taken out, cut with a bond, put into the next optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpocli.mpo import BondCut, core_gradients

# Per parameter name: `exp_avg` and `exp_avg_sq` in the parameter's shape, `step` a number.
Moments = dict[str, dict[str, Tensor]]


def take_moments(model: nn.Module, optimizer: Any) -> Moments:
    """A copy of the state of an optimiser (AdamW, bare or in accelerate's wrapper), by parameter name."""
    state = getattr(optimizer, "optimizer", optimizer).state
    return {
        name: {key: value.detach().clone() for key, value in state[parameter].items()}
        for name, parameter in model.named_parameters()
        if parameter in state
    }


def put_moments(model: nn.Module, optimizer: torch.optim.Optimizer, moments: Moments) -> None:
    """Give a new optimiser the state of an old one, for the parameters that both have."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if name in moments and id(parameter) in held:
            # `step` stays where AdamW keeps it; the moments go where their parameter is.
            optimizer.state[parameter] = {
                key: value.clone() if key == "step" else value.to(parameter, copy=True)
                for key, value in moments[name].items()
            }


def cut_moments(moments: Moments, module: str, cut: BondCut) -> None:
    """Let the state follow the two cores of a cut bond, in place: A' = A P and B' = Q B.

    Gradients obey g_A' = g_A Qᵀ and g_B' = Pᵀ g_B, and so do the first moments, which are linear in them. The second
    moments are mapped by the squared projectors, v_A' = v_A (Q∘Q)ᵀ and v_B' = (P∘P)ᵀ v_B: what they would be if the
    gradient's elements along the bond were uncorrelated. Steps are counted on.
    """
    maps = {f"{module}.core_{cut.bond - 1}": (cut.right, 3), f"{module}.core_{cut.bond}": (cut.left.T, 0)}
    for name, (projector, leg) in maps.items():  # projector: (after, before)
        state = moments.get(name)
        for key, factor in (("exp_avg", projector), ("exp_avg_sq", projector.square())):
            if state is not None and key in state:
                old = state[key]
                mapped = torch.tensordot(factor.to(device=old.device), old.to(factor.dtype), ([1], [leg]))
                state[key] = mapped.movedim(0, leg).to(old.dtype).contiguous()


def expand_moments(moments: Moments, weight: str, module: str, cores: Sequence[Tensor], kind: str) -> None:
    """Hand the state of a dense weight W to the cores that take its place, in place.

    A core's gradient is the contraction of W's with all other cores, and so is its first moment; its second moment is
    W's contracted with the squares of the same derivatives, as in `cut_moments`. Steps are counted on. Of a `conv1d`
    the state is stored transposed. Without a state (W was frozen, or nothing was trained) the cores have none.
    """
    state = moments.pop(weight, None)
    if not state:
        return
    for k in range(len(cores)):
        moments[f"{module}.core_{k}"] = {"step": state["step"].clone()}
    for key in ("exp_avg", "exp_avg_sq"):
        matrix = state[key].T if kind == "conv1d" else state[key]
        for k, mapped in enumerate(core_gradients(cores, matrix, squared=key == "exp_avg_sq")):
            moments[f"{module}.core_{k}"][key] = mapped.to(matrix.dtype)
