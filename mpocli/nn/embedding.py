"""An embedding table held as an MPO, read row by row without ever building the table."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mpocli.mpo.contract import join
from mpocli.mpo.mpo import MPO
from mpocli.mpo.shape import SiteShape
from mpocli.nn.cores import MPOModule

# Elements that an intermediate of the lookup may have: 16 MiB in float32.
_CHUNK_ELEMENTS = 1 << 22
# A site with slices of at least this many elements, and not too many of them, is applied digit by digit.
_LARGE_SLICE = 1 << 12
_MAX_DIGITS = 64


class MPOEmbedding(MPOModule):
    """Rows of an O×I table, O = `num_embeddings` (the vocabulary), I = `embedding_dim`.

    A token id is a number in the mixed radix `out_dims`, and its row is the product of one slice per core.
    Distinct ids are looked up once, sorted, so that ids with a common prefix share the product of their
    leading slices. `padding_idx` gets no gradient, as in `nn.Embedding`; `scale` multiplies the rows
    (BART's and Gemma's scaled embeddings), rounded to the rows' dtype first if `rounds_scale`.

    >>> table = torch.arange(12.0).reshape(6, 2)
    >>> rows = MPOEmbedding.from_mpo(MPO.from_matrix(table, SiteShape((2, 3), (2, 1))))
    >>> rows(torch.tensor([5, 1])).detach().round().tolist()
    [[10.0, 11.0], [2.0, 3.0]]
    """

    def __init__(
        self,
        shape: tuple[int, int],
        sites: SiteShape,
        bond_dims: Sequence[int],
        *,
        padding_idx: int | None = None,
        scale: float = 1.0,
        rounds_scale: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape, sites, bond_dims, dtype=dtype, device=device)
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx = padding_idx
        self.scale = scale
        self.rounds_scale = rounds_scale

    @classmethod
    def from_mpo(
        cls, mpo: MPO, *, padding_idx: int | None = None, scale: float = 1.0, dtype: torch.dtype | None = None
    ) -> MPOEmbedding:
        dtype = dtype or torch.get_default_dtype()
        table = cls(mpo.shape, mpo.site_shape, mpo.bond_dims, padding_idx=padding_idx, scale=scale, dtype=dtype)
        table.load_mpo(mpo)
        return table

    def forward(self, ids: Tensor) -> Tensor:
        """(…) integers → (…, embedding_dim). Raises `IndexError` for an id outside the vocabulary."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            # How many ids are distinct is not known to a graph, and must not shape it.
            return self._finished(self._traced_rows(ids), ids)
        distinct, position = torch.unique(ids, return_inverse=True)
        if not distinct.numel():
            return self.cores[0].new_zeros(*ids.shape, self.embedding_dim)
        if distinct[0] < 0 or distinct[-1] >= self.num_embeddings:
            raise IndexError(f"token ids {int(distinct[0])}..{int(distinct[-1])} in a table of {self.num_embeddings}")
        # A table's rows are exact under autocast, so these must be too.
        with torch.autocast(ids.device.type, enabled=False):
            rows = self._rows(distinct)[:, : self.embedding_dim]
        return self._finished(rows, distinct)[position.reshape(-1)].reshape(*ids.shape, self.embedding_dim)

    def _finished(self, rows: Tensor, ids: Tensor) -> Tensor:
        """The rows (…, I) of ids (…), without a gradient of the padding's, scaled."""
        if self.padding_idx is not None and rows.requires_grad:
            rows = torch.where((ids == self.padding_idx)[..., None], rows.detach(), rows)
        if self.scale != 1.0:
            rows = rows * (torch.tensor(self.scale, dtype=rows.dtype) if self.rounds_scale else self.scale)
        return rows

    def _traced_rows(self, ids: Tensor) -> Tensor:
        """Rows (…, I) of ids (…) by operations whose shapes depend on nothing but theirs.

        Of an SVD a row of one factor times the other; else a row of the table, which is built once a pass, as a linear
        layer's weight is.
        """
        cut = self.central + 1
        is_svd = math.prod(self.sites.in_dims[:cut]) == math.prod(self.sites.out_dims[cut:]) == 1
        with torch.autocast(ids.device.type, enabled=False):
            if not is_svd:
                return F.embedding(ids, self.weight_matrix())
            left, right = join(self.cores[:cut]), join(self.cores[cut:])  # (1, O, 1, χ), (χ, 1, I, 1)
            factor = left.reshape(left.shape[1], -1)[: self.num_embeddings]
            return (F.embedding(ids, factor) @ right.reshape(right.shape[0], -1))[..., : self.embedding_dim]

    def dense_weight(self) -> Tensor:
        """The table itself, O×I."""
        return self.weight_matrix()

    def _rows(self, ids: Tensor) -> Tensor:
        """Rows (T, padded I) of ascending distinct ids (T,), in chunks of bounded memory."""
        bond, cut = self.bond_dims[self.central + 1], self.central + 1
        sides = slice(cut), slice(cut, None)
        # A side without row digits is one state for all ids and need not be small.
        columns = max(
            math.prod(self.sites.in_dims[side]) if math.prod(self.sites.out_dims[side]) > 1 else 1 for side in sides
        )
        size = max(1, _CHUNK_ELEMENTS // (bond * columns))
        tail = math.prod(self.sites.out_dims[self.central + 1 :])
        suffixes, suffix_of = torch.unique(ids % tail, return_inverse=True)
        # The cores as they are now: the recomputation must see the same ones.
        slices = [_by_digit(core) for core in self.cores[: self.central + 1]]
        right = self._right_states(self.cores, suffixes)
        chunks = []
        for start in range(0, ids.numel(), size):
            chunk = slice(start, start + size)
            arguments = slices, ids[chunk] // tail, right, suffix_of[chunk]
            # Recompute in the backward pass: the states before the last product are large and cheap.
            if torch.is_grad_enabled():
                chunks.append(checkpoint(self._chunk, *arguments, use_reentrant=False))
            else:
                chunks.append(self._chunk(*arguments))
        return torch.cat(chunks)

    def _chunk(self, slices: Sequence[Slices], prefixes: Tensor, right: Tensor, suffix_of: Tensor) -> Tensor:
        distinct, prefix_of = torch.unique(prefixes, return_inverse=True)
        left = self._left_states(slices, distinct)  # (P, in_0..in_c, χ)
        # Where all ids share one side (an SVD's does not depend on the id), it is one factor for all of them.
        if len(right) == 1:
            return (left[prefix_of].flatten(0, 1) @ right[0]).reshape(len(prefix_of), -1)
        if len(left) == 1:
            states = right[suffix_of].transpose(1, 2)  # (T, in_{c+1}.., χ)
            product = states.flatten(0, 1) @ left[0].T
            return product.reshape(len(prefix_of), -1, left.shape[1]).transpose(1, 2).flatten(1)
        return torch.bmm(left[prefix_of], right[suffix_of]).flatten(1)

    def _left_states(self, slices: Sequence[Slices], prefixes: Tensor) -> Tensor:
        """Products of the slices of sites 0..central for each prefix (P,): (P, in_0…in_c, χ_{c+1})."""
        levels = [prefixes]  # of every site, from the central one back to the first
        for out in reversed(self.sites.out_dims[1 : self.central + 1]):
            levels.append(torch.unique(levels[-1] // out))
        levels.reverse()
        state = slices[0][0].new_ones(levels[0].numel(), 1, 1)
        for k, level in enumerate(levels):
            out = self.sites.out_dims[k]
            if k:
                state = state[torch.searchsorted(levels[k - 1], level // out)]
            state = _multiply(state, slices[k], level % out, self.sites.in_dims[k])
        return state

    def _right_states(self, cores: Sequence[Tensor], suffixes: Tensor) -> Tensor:
        """Products of the slices of the sites after the centre for each suffix (S,): (S, χ_{c+1}, in…)."""
        sites = range(self.central + 1, self.sites.sites)
        state = cores[0].new_ones(suffixes.numel(), 1, 1)  # (S, in_{k+1}…, χ)
        rest = suffixes
        for k in reversed(sites):
            out, in_ = self.sites.out_dims[k], self.sites.in_dims[k]
            # The same product from the other side: bonds swapped, the new column factor leads.
            state = _multiply(state, _by_digit(cores[k].transpose(0, 3)), rest % out, in_)
            state = state.reshape(len(rest), -1, in_, state.shape[2]).transpose(1, 2).flatten(1, 2)
            rest = rest // out
        return state.transpose(1, 2)


# A core's slices (a, i·b) for each of its digits: stacked, or a tuple of them.
Slices = Tensor | tuple[Tensor, ...]


def _by_digit(core: Tensor) -> Slices:
    """(a, out, i, b) → `out` slices (a, i·b): stacked where they are small or many, else apart.

    Apart, a large slice is multiplied where it stands, and its gradient is added to it alone. Cut once for all
    chunks of a lookup, since every cut of a whole core copies it, on the way back too.
    """
    bond, out, in_, next_bond = core.shape
    slices = core.transpose(0, 1).reshape(out, bond, in_ * next_bond)
    return slices.unbind(0) if slices[0].numel() >= _LARGE_SLICE and out <= _MAX_DIGITS else slices


def _multiply(state: Tensor, slices: Slices, digits: Tensor, in_: int) -> Tensor:
    """state (T, I, a) times the slice (a, i·b) of each row's digit → (T, I·i, b)."""
    count, columns, _ = state.shape
    if isinstance(slices, Tensor):
        product = torch.bmm(state, slices[digits])
    else:
        # One matrix product per digit: gathering a slice for every row would copy the core many times over.
        order = torch.argsort(digits, stable=True)
        groups = torch.split(state[order], torch.bincount(digits, minlength=len(slices)).tolist())
        product = torch.cat([group @ piece for group, piece in zip(groups, slices, strict=True)])
        product = product[torch.argsort(order)]
    return product.reshape(count, columns * in_, -1)
