"""What a weight loses in each format that it may have, and the weight made in the one that was chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpocli.hf.weight import Weight
from mpocli.methods.planner.fit_store import FitStore, relative_error
from mpocli.methods.planner.formats import Format
from mpocli.methods.planner.norms import Norm
from mpocli.methods.rewrite import Stored
from mpocli.methods.rounding import RoundedChain, round_chain, round_matrix
from mpocli.mpo.canonical import canonicalize
from mpocli.mpo.fitting import FittingProblem
from mpocli.mpo.linalg import cast
from mpocli.mpo.weighted import svd_shape, weighted_square
from mpocli.quant.grid import Grid, searched

# Grids of a whole matrix by their bits; the first of each is measured by GPTQ, the others are told by it and by what
# rounding to nearest loses on them.
_MATRIX = {
    8: (Grid(8, 0),),
    4: (Grid(4, 64), Grid(4, 32), Grid(4, 128), Grid(4, 0)),
    3: (Grid(3, 64), Grid(3, 32), Grid(3, 128), Grid(3, 0)),
    2: (Grid(2, 64, True), Grid(2, 32, True), Grid(2, 128, True), Grid(2, 64), Grid(2, 128)),
}
# Of two factors; few bits more would be better spent on a wider bond.
_FACTOR = {8: Grid(8, 64), 4: Grid(4, 64), 3: Grid(3, 64)}
# Ranks, as parts of the full one, at which the rounding of factors is measured, and how many are offered.
_MEASURED = (0.15, 0.4, 0.75)
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
    found = [(wide(weight), 0.0)]
    for width in bits:
        found += _of_matrix(fits, norm, problem, width)
    found += _of_factors(fits, norm, problem, bits)
    return [Option(one, one.nbytes(weight, dtype), scale * loss) for one, loss in found]


def _of_matrix(fits: FitStore, norm: Norm, problem: FittingProblem, bits: int) -> Iterator[tuple[Format, float]]:
    grids = _MATRIX.get(bits, ())
    by_nearest = [_loss(problem, searched(problem.matrix, grid).values(problem.wide.dtype)) for grid in grids]
    gram = fits.moved(norm.input_gram)
    for grid, loss in zip(grids, by_nearest, strict=True):
        if gram is not None:
            if grid is grids[0]:
                rounded = round_matrix(problem.wide, gram, grid).values(problem.wide.dtype)
                gain = _loss(problem, rounded) / by_nearest[0] if by_nearest[0] else 1.0
            loss *= gain
        yield Format(_name(grid), (grid,)), loss


def _of_factors(
    fits: FitStore, norm: Norm, problem: FittingProblem, bits: Sequence[int]
) -> Iterator[tuple[Format, float]]:
    rows, columns = problem.matrix.shape
    full = min(rows, columns)
    sites = svd_shape(rows, columns)
    most = rows * columns // (rows + columns)  # from there on two wide factors are no smaller
    ranks = sorted({round(_LEAST_RANK * (full / _LEAST_RANK) ** (k / _RANKS)) for k in range(_RANKS + 1)})
    if full <= _LEAST_RANK:
        return
    if 16 in bits:
        for rank in (rank for rank in ranks if rank < most):
            yield Format(f"rank {rank}", (None, None), sites, (1, rank, 1)), problem.svd.lost(rank)
    for width in (width for width in bits if width in _FACTOR):
        grid = _FACTOR[width]
        measured = []
        for rank in sorted({max(_LEAST_RANK, int(part * full)) for part in _MEASURED}):
            chain = _chain(fits, norm, problem, rank, (grid, grid))
            measured.append((rank, max(_loss(problem, chain.mpo.to_matrix()) - problem.svd.lost(rank), 1e-300)))
        for rank in ranks:
            loss = problem.svd.lost(rank) + _between(measured, rank)
            yield Format(f"rank {rank} × {_name(grid)}", (grid, grid), sites, (1, rank, 1)), loss


def make(fits: FitStore, weight: Weight, chosen: Format) -> RoundedForm:
    """The weight in a format, its tensors and parts on disk."""
    norm, problem = fits.problem(weight)
    dtype = fits.stored_dtype(weight)
    encodings = chosen.encodings(weight, dtype)
    held: dict[str, Tensor] = {}
    if chosen.sites is None:
        (grid,) = chosen.grids
        assert grid is not None
        rounded = round_matrix(problem.wide, fits.moved(norm.input_gram), grid)
        for k, part in enumerate(encodings["weight"].packed(rounded)):
            held[f"weight.{k}"] = part
        values = rounded.values(problem.wide.dtype)
    else:
        assert chosen.bonds is not None
        chain = _chain(fits, norm, problem, chosen.bonds[1], chosen.grids)
        rounded_cores = iter(chain.rounded)
        for leaf, core in zip(chosen.shapes(weight), chain.mpo.cores, strict=True):
            if leaf in encodings:
                for k, part in enumerate(encodings[leaf].packed(next(rounded_cores))):
                    held[f"{leaf}.{k}"] = part
            else:
                held[leaf] = cast(core, dtype, f"{weight.name}.{leaf}")
        values = chain.mpo.to_matrix()
    path = fits.folder / f"{weight.name}.safetensors"
    save_file({name: tensor.cpu().contiguous() for name, tensor in held.items()}, path)
    difference, gram = problem.wide - values, fits.moved(norm.input_gram)
    return RoundedForm(
        format=chosen,
        path=path,
        relative_error=relative_error(difference, problem.wide, None),
        weighted_error=None if gram is None else relative_error(difference, problem.wide, gram),
        loss=fits.scale(weight, norm, problem) * _loss(problem, values),
        nbytes=chosen.nbytes(weight, dtype),
    )


def _chain(
    fits: FitStore, norm: Norm, problem: FittingProblem, rank: int, grids: Sequence[Grid | None]
) -> RoundedChain:
    truncated = canonicalize(problem.svd.mpo(rank))
    if set(grids) == {None}:
        return RoundedChain((), truncated, 0.0)
    return round_chain(truncated, fits.moved(norm.input_gram), grids, output=problem.output)


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
