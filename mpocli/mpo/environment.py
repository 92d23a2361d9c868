"""All cores of an MPO but one: what a fit of that core needs of the others."""

from __future__ import annotations

import copy

import torch
from torch import Tensor


class Environment:
    """All cores but one: Ŵ = Σ L[o_<, i_<, a] C[a, o, i, b] R[b, o_>, i_>]."""

    def __init__(self, cores: list[Tensor], k: int) -> None:
        self.left = _joined_left(cores[:k], cores[k])  # (o_<, i_<, a)
        self.right = _joined_right(cores[k + 1 :], cores[k])  # (b, o_>, i_>)
        self.out, self.in_ = cores[k].shape[1], cores[k].shape[2]

    def to(self, dtype: torch.dtype) -> Environment:
        """In another precision."""
        made = copy.copy(self)
        made.left, made.right = self.left.to(dtype), self.right.to(dtype)
        return made

    def push(self, core: Tensor) -> Tensor:
        """The matrix (O, I) with this core in the middle."""
        (ol, il, a), (b, og, ig) = self.left.shape, self.right.shape
        half = self.left.reshape(ol * il, a) @ core.reshape(a, -1)  # (o_< i_<, o i b)
        whole = half.reshape(-1, b) @ self.right.reshape(b, og * ig)  # (o_< i_< o i, o_> i_>)
        whole = whole.reshape(ol, il, self.out, self.in_, og, ig)
        return whole.permute(0, 2, 4, 1, 3, 5).reshape(ol * self.out * og, il * self.in_ * ig)

    def pull(self, matrix: Tensor) -> Tensor:
        """The adjoint of `push`: (O, I) → (a, o, i, b)."""
        (ol, il, a), (b, og, ig) = self.left.shape, self.right.shape
        split = matrix.reshape(ol, self.out, og, il, self.in_, ig).permute(0, 3, 1, 4, 2, 5)
        half = split.reshape(-1, og * ig) @ self.right.reshape(b, og * ig).T  # (o_< i_< o i, b)
        whole = self.left.reshape(ol * il, a).T @ half.reshape(ol * il, -1)
        return whole.reshape(a, self.out, self.in_, b)

    def means(self, square: Tensor | None, *, rows: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The closest thing to a product over (sites before, this site, sites after) of a matrix over rows or columns.

        Each is the mean over the digits of the two others, (O, O) → (o_<, o_<), (o, o), (o_>, o_>); None stays None.
        """
        if square is None:
            return None, None, None
        side = 0 if rows else 1
        before, after = self.left.shape[side], self.right.shape[1 + side]
        own = self.out if rows else self.in_
        split = square.reshape(before, own, after, before, own, after)
        return (
            torch.einsum("pogqog->pq", split) / (own * after),
            torch.einsum("pogpqg->oq", split) / (before * after),
            torch.einsum("pogpoh->gh", split) / (before * own),
        )

    def normal(self, gram: Tensor | None) -> Tensor:
        """Eᵀ G E, of size (a, i, b) squared."""
        (ol, il, a), (b, og, ig) = self.left.shape, self.right.shape
        in_ = self.in_
        if gram is None:
            lefts = self.left.reshape(ol * il, a)
            rights = self.right.reshape(b, og * ig)
            pair = torch.kron(lefts.T @ lefts, rights @ rights.T).reshape(a, b, a, b)
            eye = torch.eye(in_, dtype=pair.dtype, device=pair.device)
            return torch.einsum("abcd,ij->aibcjd", pair, eye).reshape(a * in_ * b, -1)
        # E[(a b), (o_< o_>), (i_< i_>)] of all cores around, in the precision of G
        left, right = self.left.to(gram), self.right.to(gram)
        around = torch.einsum("pxa,bqy->abpqxy", left, right).reshape(a * b, ol * og, il * ig)
        by_site = gram.reshape(il, in_, ig, il, in_, ig).permute(1, 0, 2, 4, 3, 5)
        by_site = by_site.reshape(in_, il * ig, in_, il * ig)  # (i, rest, i', rest')
        result = gram.new_empty(in_, a * b, in_, a * b)
        flat = around.reshape(a * b * ol * og, il * ig)
        last = around.reshape(a * b, -1).T  # ((o rest'), a'b')
        for i in range(in_):  # one i at a time bounds the memory
            half = flat @ by_site[i].reshape(il * ig, -1)  # (ab o, i' rest')
            half = half.reshape(a * b, ol * og, in_, il * ig).transpose(1, 2)  # (ab, i', o, rest')
            result[i] = (half.reshape(a * b * in_, -1) @ last).reshape(a * b, in_, a * b)
        # (i, a b, i', a' b') → (a, i, b, a', i', b')
        result = result.reshape(in_, a, b, in_, a, b).permute(1, 0, 2, 4, 3, 5)
        return result.reshape(a * in_ * b, -1)


def _joined_left(cores: list[Tensor], core: Tensor) -> Tensor:
    """(o_<, i_<, a) of the cores before one."""
    if not cores:
        return core.new_ones(1, 1, 1)
    joined = cores[0]
    for core in cores[1:]:
        joined = _join(joined, core)
    return joined[0]


def _joined_right(cores: list[Tensor], core: Tensor) -> Tensor:
    """(b, o_>, i_>) of the cores after one."""
    if not cores:
        return core.new_ones(1, 1, 1)
    joined = cores[-1]
    for other in reversed(cores[:-1]):
        joined = _join(other, joined)
    return joined[..., 0]


def _join(left: Tensor, right: Tensor) -> Tensor:
    (a, o, i, _), (_, p, j, c) = left.shape, right.shape
    product: Tensor = torch.tensordot(left, right, 1)  # (a, o, i, p, j, c)
    return product.transpose(2, 3).reshape(a, o * p, i * j, c)
