"""What a weight loses in each format that it may have, and the weight made in the one that was chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpocli.hf.weight import Weight
from mpocli.io.encodings.corrected import FACTOR_BITS, Corrected
from mpocli.io.encodings.quantised import Quantised
from mpocli.methods.planner.fit_store import FitStore
from mpocli.methods.planner.formats import Format
from mpocli.methods.rewrite import Stored
from mpocli.methods.rounding import RoundedChain, round_chain, round_matrix
from mpocli.mpo.canonical import canonicalize
from mpocli.mpo.fitting import FittingProblem
from mpocli.mpo.linalg import cast
from mpocli.mpo.weighted import WeightedSVD, spectrum, svd_shape, weighted_square
from mpocli.quant.grid import Grid, Rounded, searched

# Grids of a whole matrix by their bits, the first one measured: by GPTQ at 2 and at 3 bits, whose gain on rounding to
# nearest is taken for the wider ones. What the others lose beside the first is told by some of the rows.
_GROUPS = (64, 16, 32, 128, 256, 0)
_MATRIX = {
    8: tuple(Grid(8, group) for group in (0, 128, 32)),
    4: tuple(Grid(4, group, offsets) for group in _GROUPS for offsets in (False, True)),
    3: tuple(Grid(3, group, offsets) for group in _GROUPS for offsets in (False, True)),
    2: tuple(Grid(2, group, offsets) for group in _GROUPS for offsets in (True, False)),
}
_ROWS = 64
# Ranks of corrections that are offered, and how often what one leaves is rounded again.
_CORRECTIONS = (4, 8, 16, 32, 64)
_ROUNDS = 2
# Of two factors; few bits more would be better spent on a wider bond.
_FACTOR = {8: Grid(8, 64), 4: Grid(4, 64), 3: Grid(3, 64)}
# Ranks, as parts of the full one, at which the rounding of factors is measured, and how many are offered.
_MEASURED = (0.15, 0.6)
_RANKS = 40
_LEAST_RANK = 4


@dataclass(frozen=True)
class Option:
    """A format, the bytes of its tensors' data, and what it loses in the planner's norm."""

    format: Format
    nbytes: int
    loss: float


@dataclass(frozen=True)
class RoundedForm:
    """The form made of one weight: its format, and the file with its tensors and parts.

    `relative_error` = ‖D‖_F / ‖W‖_F and `weighted_error` = sqrt(tr(D G Dᵀ) / tr(W G Wᵀ)) as of a `ChosenForm`; `loss`
    in the planner's norm; `nbytes` of the tensors' data.
    """

    format: Format
    path: Path
    relative_error: float
    weighted_error: float | None
    loss: float
    nbytes: int

    @property
    def name(self) -> str:
        return self.format.name

    def stored(self, weight: Weight, dtype: torch.dtype) -> Stored:
        """What the files are to hold of it."""
        held = load_file(self.path)
        encodings = self.format.encodings(weight, dtype)
        packed = {leaf: tuple(held[f"{leaf}.{k}"] for k in range(len(one.parts))) for leaf, one in encodings.items()}
        tensors = {leaf: one.unpack(*packed[leaf]) for leaf, one in encodings.items()}
        tensors |= {leaf: held[leaf] for leaf in self.format.shapes(weight) if leaf not in encodings}
        entry = self.format.entry(weight, dtype, self.relative_error)
        return Stored(tensors, entry, dict(encodings), packed)


def wide(weight: Weight) -> Format:
    return Format("wide", (None,))


def options(fits: FitStore, weight: Weight, bits: Sequence[int]) -> list[Option] | str:
    """Every format that these bits allow (16: wide), or why nothing is known of the weight."""
    norm, problem = fits.problem(weight)
    if norm.unmeasured:
        return norm.unmeasured
    scale, dtype = fits.scale(weight, norm, problem), fits.stored_dtype(weight)
    measure = _Measure(problem, fits.moved(norm.input_gram))
    found = [(wide(weight), 0.0), *measure.matrices(bits), *measure.factors(bits)]
    return [Option(one, one.nbytes(weight, dtype), scale * loss) for one, loss in found]


@dataclass
class _Measure:
    """What one matrix loses in its formats; `gram` is of its inputs, None where they are unknown."""

    problem: FittingProblem
    gram: Tensor | None

    def matrices(self, bits: Sequence[int]) -> Iterator[tuple[Format, float]]:
        """The matrix itself on every grid of these bits."""
        gain = 1.0
        for width in sorted(bits):
            first, *others = _MATRIX.get(width, (None,))
            if first is None:
                continue
            plain = self._loss(searched(self.problem.matrix, first).values(self.problem.wide.dtype))
            if self.gram is not None and width <= max(3, min(bits)):
                made = round_matrix(self.problem.wide, self.gram, first).values(self.problem.wide.dtype)
                gain = self._loss(made) / plain if plain else 1.0
                if FACTOR_BITS in bits and width < FACTOR_BITS:
                    yield from self._corrections(first, self.problem.wide - made)
            yield Format(_name(first), (first,)), gain * plain
            base = self._beside(first)
            for grid in others:
                yield Format(_name(grid), (grid,)), gain * plain * (self._beside(grid) / base if base else 1.0)

    def _corrections(self, grid: Grid, difference: Tensor) -> Iterator[tuple[Format, float]]:
        """A low rank of what GPTQ took, beside the matrix on its grid: the tail of its spectrum in the norm is lost."""
        weights = spectrum(difference, self.problem.gram, self.problem.output)
        lost = weights.sum() - torch.cumsum(weights, 0)
        for rank in (rank for rank in _CORRECTIONS if rank <= len(weights) // 4):
            yield Format(f"{_name(grid)} + rank {rank}", (grid,), correction=rank), float(lost[rank - 1])

    def _beside(self, grid: Grid) -> float:
        """The loss on a grid by some of the rows, and the inputs alone."""
        rows = self.problem.wide[:: -(-len(self.problem.wide) // _ROWS)]
        difference = rows - searched(rows, grid).values(rows.dtype)
        return weighted_square(difference, self.problem.gram)

    def factors(self, bits: Sequence[int]) -> Iterator[tuple[Format, float]]:
        rows, columns = self.problem.matrix.shape
        full = min(rows, columns)
        if full <= _LEAST_RANK:
            return
        sites = svd_shape(rows, columns)
        ranks = sorted({round(_LEAST_RANK * (full / _LEAST_RANK) ** (k / _RANKS)) for k in range(_RANKS + 1)})
        if 16 in bits:
            most = rows * columns // (rows + columns)  # from there on two wide factors are no smaller
            for rank in (rank for rank in ranks if rank <= most):
                yield Format(f"rank {rank}", (None, None), sites, (1, rank, 1)), self.problem.svd.lost(rank)
        gain = None
        for width in (width for width in bits if width in _FACTOR):
            grid = _FACTOR[width]
            looks = sorted({max(_LEAST_RANK, int(part * full)) for part in _MEASURED})
            if gain is None:
                middle = looks[len(looks) // 2]
                gain = self._added(middle, grid, quick=False) / self._added(middle, grid, quick=True)
            measured = [(rank, gain * self._added(rank, grid, quick=True)) for rank in looks]
            for rank in ranks:
                loss = self.problem.svd.lost(rank) + _between(measured, rank)
                yield Format(f"rank {rank} × {_name(grid)}", (grid, grid), sites, (1, rank, 1)), loss

    def _added(self, rank: int, grid: Grid, *, quick: bool) -> float:
        """What rounding the factors adds to the loss of the truncation, above 0."""
        chain = rounded_svd(self.problem, self.gram, rank, (grid, grid), quick=quick)
        lost = self.problem.svd.lost(rank)
        return max(self._loss(chain.mpo.to_matrix()) - lost, 1e-9 * self.problem.svd.total, 1e-300)

    def _loss(self, values: Tensor) -> float:
        return _loss(self.problem, values)


def make(fits: FitStore, weight: Weight, chosen: Format) -> RoundedForm:
    """The weight in a format, its tensors and parts on disk."""
    norm, problem = fits.problem(weight)
    dtype, gram = fits.stored_dtype(weight), fits.moved(norm.input_gram)
    encodings = chosen.encodings(weight, dtype)
    if chosen.sites is None:
        held, values = _matrix(problem, gram, chosen, encodings["weight"])
    else:
        held, values = _factors(problem, gram, chosen, encodings)
    whole = {name: cast(tensor, dtype, f"{weight.name}.{name}") for name, tensor in held.items() if "." not in name}
    path = fits.folder / f"{weight.name}.safetensors"
    save_file({name: tensor.cpu().contiguous() for name, tensor in (held | whole).items()}, path)
    error, weighted = fits.errors(norm, problem, values)
    return RoundedForm(
        format=chosen,
        path=path,
        relative_error=error,
        weighted_error=weighted,
        loss=fits.scale(weight, norm, problem) * _loss(problem, values),
        nbytes=chosen.nbytes(weight, dtype),
    )


Held = dict[str, Tensor]  # tensors by their leaf, parts by leaf.number


def _matrix(
    problem: FittingProblem, gram: Tensor | None, chosen: Format, encoding: Quantised | Corrected
) -> tuple[Held, Tensor]:
    """The matrix on its grid, and what corrects it; what it stands for."""
    (grid,) = chosen.grids
    assert grid is not None
    rounded = round_matrix(problem.wide, gram, grid)
    values = rounded.values(problem.wide.dtype)
    if isinstance(encoding, Quantised):
        return {f"weight.{k}": part for k, part in enumerate(encoding.parts_of(rounded))}, values
    best: tuple[float, tuple[Tensor, ...], Tensor] | None = None
    for _ in range(_ROUNDS):  # what is left is rounded again, and its error corrected anew
        left, right = _residual(problem, problem.wide - values, encoding)
        whole = values + left.values(values.dtype) @ right.values(values.dtype)
        loss = _loss(problem, whole)
        if best is None or loss < best[0]:
            best = loss, encoding.parts_of(rounded, left, right), whole
        rounded = round_matrix(problem.wide - (whole - values), gram, grid)
        values = rounded.values(problem.wide.dtype)
    assert best is not None
    return {f"weight.{k}": part for k, part in enumerate(best[1])}, best[2]


def _residual(problem: FittingProblem, difference: Tensor, encoding: Corrected) -> tuple[Rounded, Rounded]:
    """The truncated SVD of a difference in the problem's norm, both factors in eight bits."""
    pair = canonicalize(WeightedSVD.of(difference, problem.gram, problem.output).mpo(encoding.rank))
    outer, inner = encoding.factors
    left, right = (core.reshape(core.shape[0] * core.shape[1], -1) for core in pair.cores)
    return searched(left, outer.grid), searched(right, inner.grid)


def _factors(
    problem: FittingProblem, gram: Tensor | None, chosen: Format, encodings: Mapping[str, Quantised | Corrected]
) -> tuple[Held, Tensor]:
    """The factors of the truncated SVD, rounded or wide; what they stand for."""
    assert chosen.bonds is not None
    chain = rounded_svd(problem, gram, chosen.bonds[1], chosen.grids)
    rounded = iter(chain.rounded)
    held: Held = {}
    for k, core in enumerate(chain.mpo.cores):
        leaf = f"core_{k}"
        encoding = encodings.get(leaf)
        if isinstance(encoding, Quantised):
            held |= {f"{leaf}.{n}": part for n, part in enumerate(encoding.parts_of(next(rounded)))}
        else:
            held[leaf] = core
    return held, chain.mpo.to_matrix()


def rounded_svd(
    problem: FittingProblem, gram: Tensor | None, rank: int, grids: Sequence[Grid | None], *, quick: bool = False
) -> RoundedChain:
    """The truncated SVD of a rank in the problem's norm, its factors on grids, or wide where those are None."""
    truncated = canonicalize(problem.svd.mpo(rank))
    if set(grids) == {None}:
        return RoundedChain((), truncated, 0.0)
    return round_chain(truncated, gram, grids, output=problem.output, quick=quick)


def _loss(problem: FittingProblem, values: Tensor) -> float:
    return weighted_square(problem.wide - values.to(problem.wide), problem.gram, problem.output)


def _name(grid: Grid) -> str:
    """`int4/64`, and `+` for grids with offsets."""
    return f"int{grid.bits}" + (f"/{grid.group}" if grid.group else "") + ("+" if grid.offsets else "")


def _between(points: Sequence[tuple[int, float]], rank: int) -> float:
    """On straight lines through the points on log-log axes, level outside of them."""
    if rank <= points[0][0]:
        return points[0][1] * rank / points[0][0]
    for (a, low), (b, high) in pairwise(points):
        if rank <= b:
            share = math.log(rank / a) / math.log(b / a)
            return float(low ** (1 - share) * high**share)
    return points[-1][1] * rank / points[-1][0]
