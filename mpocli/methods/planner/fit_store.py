"""The form chosen for a weight, and the place where forms are fitted and kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpocli.config.budget import Budget
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.weight import Weight
from mpocli.methods.planner.norms import Norm, Norms
from mpocli.mpo import MPO, SiteShape
from mpocli.mpo.candidates import Candidate, all_of, papers
from mpocli.mpo.fitting import Fitted, FittingProblem
from mpocli.mpo.linalg import cast, check_finite, working_dtype
from mpocli.mpo.weighted import weighted_square

# Rows of a table, above which no chains are tried.
_VOCABULARY = 8192


@dataclass(frozen=True)
class ChosenForm:
    """The form chosen for one weight: its shape's name, bonds, and the file with its cores.

    Errors are of what is stored: `relative_error` = ‖D‖_F / ‖W‖_F, and `weighted_error` = sqrt(tr(D G Dᵀ) / tr(W G Wᵀ))
    with G the Gram matrix of the inputs, None without calibration data. `loss` is what the planner adds up, in its own
    norm.
    """

    name: str
    sites: SiteShape
    bonds: tuple[int, ...]
    path: Path
    relative_error: float
    weighted_error: float | None
    loss: float

    @property
    def params(self) -> int:
        return self.sites.num_params(self.bonds)

    def mpo(self, shape: tuple[int, int]) -> MPO:
        """The cores, for an O×I matrix."""
        stored = load_file(self.path)
        return MPO(tuple(stored[f"core_{k}"] for k in range(len(stored))), shape)


@dataclass(frozen=True)
class FitStore:
    """Reads a weight with its norm, and keeps what was made of it in `folder`, in the dtype of the output.

    `sensitivity` multiplies what the errors of a weight add up to.
    """

    checkpoint: Checkpoint
    budget: Budget
    norms: Norms
    folder: Path
    device: torch.device
    dtype: str | None = None
    sites: int = 5
    sensitivity: dict[str, float] = field(default_factory=dict)

    def problem(self, weight: Weight, *, by_inputs: bool = False) -> tuple[Norm, FittingProblem]:
        """A weight and the norm that it is judged in: the planner's, or that of its inputs alone.

        Raises `InputError` for a weight that is not finite.
        """
        assert weight.key is not None
        matrix = weight.oriented(self.checkpoint.reader.read(weight.key).to(self.device))
        check_finite(matrix, weight.key)
        norm = self.norms.of(weight)
        if by_inputs:
            norm = replace(norm, gram=norm.input_gram, output=None, unmeasured="")
        return norm, self._in(norm, matrix)

    def _in(self, norm: Norm, matrix: Tensor) -> FittingProblem:
        return FittingProblem(matrix, self.moved(norm.gram), self.moved(norm.output))

    def moved(self, square: Tensor | None) -> Tensor | None:
        return None if square is None else square.to(self.device, working_dtype(self.device))

    def scale(self, weight: Weight, norm: Norm, problem: FittingProblem) -> float:
        """Turns a squared error into what is added up: a share of the loss, or of what the matrix puts out.

        Where nothing says how much an output counts, every parameter does the same: of relative errors alone those of
        the largest matrices would be the cheapest, and a vocabulary would keep a rank of three.
        """
        factor = self.sensitivity.get(weight.name, 1.0)
        if self.budget.probes:
            return factor * norm.scale
        total = weighted_square(problem.wide, problem.gram)
        return factor * weight.dense_params / total if total else factor

    def chains(self, weight: Weight) -> Sequence[Candidate]:
        """The shapes beside the SVD that the budget allows."""
        if self.budget.shapes == "svd":
            return ()
        if self.budget.shapes == "paper":
            return (papers(*weight.shape, self.sites),)
        if weight.kind == "embedding" and weight.shape[0] > _VOCABULARY:
            # The order of a vocabulary has no structure that digits of its numbers could find: on real tables every
            # chain lost more than the SVD, after longer than all other matrices together.
            return ()
        return [candidate for candidate in all_of(*weight.shape) if candidate.name != "svd"]

    def stored_dtype(self, weight: Weight) -> torch.dtype:
        wanted: torch.dtype = getattr(torch, self.dtype) if self.dtype else weight.dtype
        return wanted

    def keep(self, weight: Weight, made: Fitted, norm: Norm, problem: FittingProblem) -> ChosenForm:
        """Put the cores on disk as they will be stored, and measure their error."""
        dtype, name = self.stored_dtype(weight), weight.name
        cores = [cast(core, dtype, f"{name}.core_{k}") for k, core in enumerate(made.mpo.cores)]
        stored = MPO(tuple(cores), made.mpo.shape)
        path = self.folder / f"{name}.safetensors"
        save_file({f"core_{k}": core.cpu().contiguous() for k, core in enumerate(cores)}, path)
        error, weighted = self.errors(norm, problem, stored.to(dtype=problem.wide.dtype).to_matrix())
        return ChosenForm(
            name=made.candidate.name,
            sites=made.mpo.site_shape,
            bonds=made.mpo.bond_dims,
            path=path,
            relative_error=error,
            weighted_error=weighted,
            loss=self.scale(weight, norm, problem) * made.loss,
        )

    def errors(self, norm: Norm, problem: FittingProblem, values: Tensor) -> tuple[float, float | None]:
        """The relative and the weighted error, as of a `ChosenForm`, of a matrix that is stored."""
        difference, gram = problem.wide - values.to(problem.wide), self.moved(norm.input_gram)
        plain = _relative(difference, problem.wide, None)
        return plain, None if gram is None else _relative(difference, problem.wide, gram)

    def refitted(self, weight: Weight, norm: Norm, form: ChosenForm) -> ChosenForm:
        """The same shape and bonds, fitted in another norm."""
        _, plain = self.problem(weight)
        problem = self._in(norm, plain.matrix)
        if form.name == "svd":
            made = problem.svd_within(form.params)
        else:
            candidate = Candidate(form.name, form.sites)
            made = problem.fitted(candidate, form.bonds, self.budget.sweeps)
        assert made is not None
        return self.keep(weight, made, norm, problem)


def _relative(difference: Tensor, matrix: Tensor, gram: Tensor | None) -> float:
    whole = weighted_square(matrix, gram)
    return math.sqrt(max(weighted_square(difference, gram), 0.0) / whole) if whole else 0.0
