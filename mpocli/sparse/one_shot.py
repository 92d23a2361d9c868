"""Pruning without training: scores and compensated weights from the second moments of a layer's inputs.

A layer's inputs X (tokens × I) enter as squared norms ‖X_j‖² (I,) or as the Gram matrix XᵀX (I, I), both summed over
tokens; neither their scale nor the number of tokens changes a result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpocli.errors import InputError, NumericsError
from mpocli.mpo.gram import inverse_root
from mpocli.sparse.masks import Pattern, n_of_m_mask, smallest_mask, zeros_in


def wanda_scores(weight: Tensor, squared_norms: Tensor) -> Tensor:
    """The size of an entry's share in the output, |W_ij| · ‖X_j‖₂ (Wanda, Sun et al. 2023, Eq. 1).

    Weight (O, I) and squared norms (I,) give scores (O, I), at least float32. Wanda compares them inside every output
    row (`rowwise_mask`) or group of inputs (`n_of_m_mask`), not over the matrix.

    >>> wanda_scores(torch.tensor([[1.0, -2.0]]), torch.tensor([9.0, 1.0]))
    tensor([[3., 2.]])
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.detach().to(dtype).abs() * squared_norms.sqrt().to(dtype)


def sparsegpt(
    weight: Tensor, gram: Tensor, sparsity: float, pattern: Pattern, *, block: int = 128, damping: float = 0.01
) -> Tensor:
    """A weight with entries pruned one column at a time, each error undone by the columns to its right.

    With H = XᵀX + λI over the columns from j on, pruning w_j costs w_j²/[H⁻¹]_jj, and the others make up for it best
    by w −= w_j [H⁻¹]_j: / [H⁻¹]_jj (SparseGPT, Frantar and Alistarh 2023, Eq. 3 and Alg. 1). λ is `damping` times the
    mean of the diagonal. The mask is chosen for `block` columns at a time over all rows, ⌊O·I·sparsity⌋ zeros in all;
    for N:M, which sets the sparsity itself, for every group of M columns as they then are.

    Weight (O, I) and Gram matrix (I, I) give (O, I) in the weight's dtype, computed in float32, or in float64 where
    either is. An input that was always zero costs nothing: its weights are the first to go, the others stay as they
    are. Raises `InputError` where I is no multiple of M, `NumericsError` for what is not finite and for a Gram matrix
    that no damping makes positive definite.

    >>> sparsegpt(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]]), 0.5, Pattern(), damping=0.0)
    tensor([[0.0000, 1.5000]])
    """
    rows, columns = weight.shape
    keep, group = pattern.keep, pattern.group or 1
    if columns % group:
        raise InputError(f"{columns} input columns are no multiple of {group}", hint="choose another ‹pattern›")
    _check_finite(weight, "the weight")
    dtype = torch.promote_types(torch.promote_types(weight.dtype, gram.dtype), torch.float32)
    _check_finite(gram, "the Gram matrix of the inputs")
    # Few tokens make H singular; damping does not always lift it above the rounding of float32.
    dampings = (damping, *(max(damping, 1e-3) * 10**k for k in (1, 2, 3)))
    root = inverse_root(gram.to(dtype), dampings, hint="prune by magnitude or with Wanda")
    costs = root.diagonal().square().masked_fill(gram.diagonal() == 0, math.inf)  # [H⁻¹]_jj; inf makes a score 0
    # (I, O), so that a column of the weight is contiguous; a copy even where the weight is a transpose already.
    work = weight.detach().to(dtype).T.clone(memory_format=torch.contiguous_format)

    width = max(group, block // group * group)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        part, local, cost = work[start:stop], root[start:stop, start:stop], costs[start:stop, None]
        errors = torch.empty_like(part)
        if keep is None:
            zeros = zeros_in(rows * stop, sparsity) - zeros_in(rows * start, sparsity)
            kept = smallest_mask((part.square() / cost).T, zeros).T
        for j in range(stop - start):
            if keep is not None and j % group == 0:
                near = slice(j, j + group)
                kept_near = n_of_m_mask((part[near].square() / cost[near]).T, keep, group).T
            row = kept[j] if keep is None else kept_near[j % group]
            pruned = torch.where(row, part[j], 0.0)
            errors[j] = (part[j] - pruned) / local[j, j]
            part[j] = pruned
            part[j + 1 :].addr_(local[j, j + 1 :], errors[j], alpha=-1)
        work[stop:].addmm_(root[start:stop, stop:].T, errors, alpha=-1)
    result = work.T.to(weight.dtype).contiguous()
    _check_finite(result, "the pruned weight")
    return result


def core_gram(right_cores: Sequence[Tensor], gram: Tensor, in_dims: Sequence[int], central: int) -> Tensor:
    """The Gram matrix of what reaches the central core of an MPO, matricised as (left · out) × (in · right).

    With R (b, out, in) the contraction of the cores right of the centre and x a token's input, the centre acts on
    z[(i,b)] = Σ_r R[b,o,r] x[l,i,r], one vector for every token, l left of it and o right of it. Summed over all three,
    M[(i,b),(i',b')] = Σ_{l,o,r,r'} R[b,o,r] R[b',o,r'] G[(l,i,r),(l,i',r')]. What the left cores then do to the output
    of the centre is left out: M weighs the entries of the core, it does not give the error of the layer.

    `right_cores` are (left bond, out, in, right bond), none for a centre at the right end; `in_dims` are those of all
    sites. A Gram matrix smaller than Π in belongs to a padded layer: its padding is zero. Returns (in·right, in·right).

    >>> core_gram([torch.tensor([[[[2.0]]], [[[3.0]]]])], torch.tensor([[5.0]]), (1, 1), 0)
    tensor([[20., 30.],
            [30., 45.]])
    """
    left, in_, right = math.prod(in_dims[:central]), in_dims[central], math.prod(in_dims[central + 1 :])
    padding = left * in_ * right - gram.shape[0]
    assert padding >= 0 and len(right_cores) == len(in_dims) - central - 1
    dtype = gram.dtype
    for core in right_cores:
        dtype = torch.promote_types(dtype, core.dtype)
    # (b, o, r)
    chain = _contract([core.detach().to(dtype) for core in right_cores]) if right_cores else gram.new_ones(1, 1, 1)
    padded = torch.nn.functional.pad(gram.to(dtype), (0, padding, 0, padding))
    # G[(l,i,r),(l,i',r')] summed over l: (i, r, i', r')
    inner = torch.einsum("lirljs->irjs", padded.reshape(left, in_, right, left, in_, right))
    half = torch.einsum("bor,irjs->iobjs", chain, inner)
    bond = chain.shape[0]
    return torch.einsum("iobjs,cos->ibjc", half, chain).reshape(in_ * bond, in_ * bond)


def _contract(cores: Sequence[Tensor]) -> Tensor:
    """A chain that ends at bond 1, as (left bond, Π out, Π in)."""
    result = cores[0]
    for core in cores[1:]:
        bond, out, in_, _ = result.shape
        # Rows beside rows, columns beside columns: (bond, out, o, in, i, next bond)
        joined = torch.einsum("boic,cpjd->bopijd", result, core)
        result = joined.reshape(bond, out * core.shape[1], in_ * core.shape[2], core.shape[3])
    return result.squeeze(-1)


def _check_finite(tensor: Tensor, what: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise NumericsError(f"{what} is not finite", hint="run the model in float32 or bfloat16")
