"""Decide the shape and the bonds of every matrix under one budget, and make its cores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpocli.errors import InputError, UsageError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.targets import Weight
from mpocli.methods.budget import Budget
from mpocli.methods.norms import Norm, Norms
from mpocli.mpo import MPO, SiteShape
from mpocli.mpo.budget import Curve, allocate
from mpocli.mpo.candidates import Candidate, all_of, bonds_within, papers, svd
from mpocli.mpo.fitting import Fitted, Subject, interpolated
from mpocli.mpo.linalg import cast
from mpocli.mpo.weighted import weighted_square

Progress = Callable[[int, int, str], None]
# Sizes, as parts of a matrix, at which the papers' shapes are tried.
_PAPER_SIZES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.55, 0.8)
_BYTE_ROUNDS = 6


@dataclass(frozen=True)
class Solution:
    """The form chosen for one weight: its shape's name, bonds, and the file with its cores.

    Errors are of what is stored: `relative_error` = ‖D‖_F / ‖W‖_F, and `weighted_error` = sqrt(tr(D G Dᵀ) / tr(W G Wᵀ))
    with G the Gram matrix of the inputs, None without calibration data. `loss` is what the planner added up, in its own
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
        stored = load_file(self.path)
        return MPO(tuple(stored[f"core_{k}"] for k in range(len(stored))), shape)


@dataclass
class _Case:
    """What is known of one weight while the plan is made."""

    weight: Weight
    candidate: Candidate | None = None  # a chain of cores that may beat the SVD here
    curve: Curve | None = None
    params: int = 0
    reason: str = ""
    solution: Solution | None = None


@dataclass
class Planner:
    """Makes a plan for the chosen weights of a checkpoint.

    `exact_bytes` gives the size of the output's weight files when weights have these site shapes and bonds.
    """

    checkpoint: Checkpoint
    budget: Budget
    norms: Norms
    folder: Path
    device: torch.device
    dtype: str | None
    exact_bytes: Callable[[dict[str, tuple[SiteShape, tuple[int, ...]]]], int]
    sites: int = 5
    progress: Progress | None = None
    _cases: list[_Case] = field(default_factory=list)

    def plan(self, weights: Sequence[Weight]) -> dict[str, Solution | str]:
        """The solution of every weight by name, or the reason to keep it dense.

        Raises `UsageError` for a budget that cannot be met.
        """
        self._cases = [_Case(weight) for weight in weights]
        if self.budget.max_error is not None:
            self._by_error(self.budget.max_error)
        elif self.budget.allocation == "uniform":
            assert self.budget.ratio is not None
            for case in self._cases:
                case.params = int(self.budget.ratio * case.weight.dense_params)
            self._solve_all()
        else:
            self._globally()
        return {case.weight.name: case.solution or case.reason for case in self._cases}

    # --- one budget for all -------------------------------------------------------------------------------------

    def _globally(self) -> None:
        cases = self._cases
        for number, case in enumerate(cases):
            self._tell(number, "measuring", case)
            self._draw(case)
        planned = self._open()
        if self.budget.shapes == "auto":
            self._share(planned)
            for number, case in enumerate(planned):
                self._tell(number, "trying shapes", case)
                self._try_shapes(case)
        self._share(planned)
        self._solve_all()
        self._spend_rest()

    def _open(self) -> list[_Case]:
        return [case for case in self._cases if not case.reason]

    def _draw(self, case: _Case) -> None:
        """The curve of the SVD, or of the papers' shape."""
        norm, subject = self._subject(case)
        if norm.unmeasured:
            case.reason = norm.unmeasured
            return
        scale = self._scale(norm, subject)
        if self.budget.shapes != "paper":
            curve = subject.svd_curve()
            case.curve = Curve(curve.params, tuple(scale * loss for loss in curve.losses))
            return
        case.candidate = papers(*case.weight.shape, self.sites)
        points = []
        for size in _PAPER_SIZES:
            made = subject.fitted_within(case.candidate, int(size * subject.dense), min(self._sweeps, 1))
            if made is not None and made.loss > 0 and made.mpo.num_params < subject.dense:
                points.append((made.mpo.num_params, made.loss))
        drawn = interpolated(Curve.of(points).options)
        case.curve = Curve.of([*((size, scale * loss) for size, loss in drawn), (subject.dense, 0.0)])

    def _try_shapes(self, case: _Case) -> None:
        if case.params >= case.weight.dense_params:
            return
        norm, subject = self._subject(case)
        chains = [candidate for candidate in all_of(*case.weight.shape) if candidate.name != "svd"]
        found = subject.most_promising(chains, case.params)
        if found is None or case.curve is None:
            return
        case.candidate = found
        scale = self._scale(norm, subject)
        around = [(size, scale * loss) for size, loss in subject.curve_around(found, case.params)]
        case.curve = Curve.of([*case.curve.options, *around])

    def _share(self, cases: Sequence[_Case]) -> None:
        """Give every open case its parameters."""
        kept = sum(case.weight.dense_params for case in self._cases if case.reason)
        if self.budget.ratio is not None:
            total = sum(case.weight.dense_params for case in self._cases)
            self._give(cases, int(self.budget.ratio * total) - kept)
            return
        assert self.budget.max_bytes is not None
        whole = sum(case.weight.dense_params for case in cases)
        size = self.exact_bytes({})
        itemsize = max(self._dtype(case.weight).itemsize for case in cases)
        limit = self.budget.max_bytes
        params = whole - max(0, size - limit) // itemsize
        best: dict[int, int] | None = None
        for _ in range(_BYTE_ROUNDS):
            if params <= 0:
                break
            self._give(cases, min(params, whole))
            size = self.exact_bytes(self._shapes(cases))
            if size <= limit:
                best = {id(case): case.params for case in cases}
                break
            params -= -(-(size - limit) // itemsize)
        if best is None:
            least = self.exact_bytes({c.weight.name: self._smallest(c) for c in cases})
            raise UsageError(
                f"--max-bytes {limit:,}: what is not selected and the smallest form of the rest take {least:,} bytes",
                hint="raise it, or select more with --layers",
            )

    def _give(self, cases: Sequence[_Case], params: int) -> None:
        curves = [case.curve for case in cases if case.curve is not None]
        for case, curve, option in zip(cases, curves, allocate(curves, params), strict=True):
            case.params = curve.params[option]

    def _shapes(self, cases: Sequence[_Case]) -> dict[str, tuple[SiteShape, tuple[int, ...]]]:
        found = {}
        for case in cases:
            if case.params < case.weight.dense_params:
                candidate = case.candidate if case.candidate is not None else svd(*case.weight.shape)
                found[case.weight.name] = candidate.sites, bonds_within(candidate.sites, case.params)
        return found

    def _smallest(self, case: _Case) -> tuple[SiteShape, tuple[int, ...]]:
        sites = (case.candidate or svd(*case.weight.shape)).sites
        return sites, sites.capped_bond_dims(1)

    def _spend_rest(self) -> None:
        """What the fits left of the budget goes to the SVDs among them, rank by rank where it gains most."""
        if self.budget.ratio is None:
            return
        total = sum(case.weight.dense_params for case in self._cases)
        used = sum(case.solution.params if case.solution else case.weight.dense_params for case in self._cases)
        left = int(self.budget.ratio * total) - used
        open_to = [case for case in self._cases if case.solution is not None and case.solution.name == "svd"]
        curves = []
        for case in open_to:
            assert case.solution is not None and case.curve is not None
            now, step = case.solution.params, sum(case.weight.shape)
            more = [
                (size, loss)
                for size, loss in case.curve.options
                if now < size < case.weight.dense_params and (size - now) % step == 0
            ]
            curves.append(Curve.of([(now, case.solution.loss), *more]))
        if not curves or left <= 0:
            return
        given = allocate(curves, left + sum(curve.params[0] for curve in curves))
        for case, curve, option in zip(open_to, curves, given, strict=True):
            if option:
                case.params, case.candidate = curve.params[option], None
                self._solve(case)

    # --- one error for all --------------------------------------------------------------------------------------

    def _by_error(self, limit: float) -> None:
        for number, case in enumerate(self._cases):
            self._tell(number, "fitting", case)
            _, subject = self._subject(case, by_inputs=True)
            allowed = limit**2 * weighted_square(subject.wide, subject.gram)
            case.reason = self._smallest_within(case, subject, allowed)

    def _smallest_within(self, case: _Case, subject: Subject, allowed: float) -> str:
        """The smallest form that loses no more than `allowed`; the reason where that is the matrix itself."""
        best: Fitted | None = None
        if self.budget.shapes != "paper":
            params = next(size for size, loss in subject.svd_curve().options if loss <= allowed)
            if params < subject.dense:
                best = subject.svd_within(params)
        if self.budget.shapes != "svd":
            size = best.mpo.num_params if best else int(0.6 * subject.dense)
            chains = [papers(*case.weight.shape, self.sites)]
            if self.budget.shapes == "auto":
                chains = [candidate for candidate in all_of(*case.weight.shape) if candidate.name != "svd"]
                found = subject.most_promising(chains, size)
                chains = [found] if found else []
            for chain in chains:
                best = self._narrowed(subject, chain, allowed, best)
        if best is None or best.mpo.num_params >= subject.dense:
            return "no smaller form has so small an error"
        case.solution = self._kept(case, best, subject, best.loss)
        return ""

    def _narrowed(self, subject: Subject, chain: Candidate, allowed: float, best: Fitted | None) -> Fitted | None:
        """Bisects the size of a chain below that of the best form so far."""
        low, high = 0, (best.mpo.num_params if best else subject.dense) - 1
        for _ in range(6):
            size = (low + high) // 2 if low else int(0.8 * high)
            found = subject.fitted_within(chain, size, self._sweeps) if size > 0 else None
            if found is not None and found.loss <= allowed:
                best, high = found, found.mpo.num_params - 1
                if low == 0:
                    continue
            else:
                low = max(size, 1)
            if high - low <= 0.02 * subject.dense:
                break
        return best

    # --- cores --------------------------------------------------------------------------------------------------

    def _solve_all(self) -> None:
        for number, case in enumerate(self._cases):
            self._tell(number, "fitting", case)
            if not case.reason:
                self._solve(case)

    def _solve(self, case: _Case) -> None:
        if case.params >= case.weight.dense_params:
            case.reason = "fragile: any smaller form loses more here than elsewhere"
            return
        norm, subject = self._subject(case)
        if norm.unmeasured:
            case.reason = norm.unmeasured
            return
        found: list[Fitted | None] = []
        if self.budget.shapes != "paper":
            found.append(subject.svd_within(case.params))
        if self.budget.shapes == "paper":
            case.candidate = papers(*case.weight.shape, self.sites)
        elif self.budget.shapes == "auto" and self.budget.allocation == "uniform":
            chains = [candidate for candidate in all_of(*case.weight.shape) if candidate.name != "svd"]
            case.candidate = subject.most_promising(chains, case.params)
        if case.candidate is not None:
            found.append(subject.fitted_within(case.candidate, case.params, self._sweeps))
        made = min((one for one in found if one is not None), key=lambda one: one.loss, default=None)
        if made is None or made.mpo.num_params >= subject.dense:
            case.reason = f"no form of {case.params:,} parameters"
            return
        case.solution = self._kept(case, made, subject, self._scale(norm, subject) * made.loss, norm)

    def refitted(self, name: str, norm: Norm, solution: Solution) -> Solution:
        """The same shape and bonds fitted again in another norm."""
        case = next(case for case in self._cases if case.weight.name == name)
        _, plain = self._subject(case)
        subject = Subject(plain.matrix, norm.gram, norm.output)
        if solution.name == "svd":
            made = subject.svd_within(solution.params)
        else:
            made = subject.fitted(Candidate(solution.name, solution.sites), solution.bonds, self._sweeps)
        assert made is not None
        case.solution = self._kept(case, made, subject, self._scale(norm, subject) * made.loss, norm)
        return case.solution

    @property
    def _sweeps(self) -> int:
        """Without weights a truncating sweep is nearly optimal, but not quite: sweeps are asked for, or not."""
        return self.budget.sweeps

    def _kept(self, case: _Case, made: Fitted, subject: Subject, loss: float, norm: Norm | None = None) -> Solution:
        """Cores on disk as they will be stored, and their error measured."""
        dtype = self._dtype(case.weight)
        key = case.weight.name
        cores = [cast(core, dtype, f"{key}.core_{k}") for k, core in enumerate(made.mpo.cores)]
        stored = MPO(tuple(cores), made.mpo.shape)
        difference = subject.wide - stored.to_matrix().to(subject.wide)
        path = self.folder / f"{key}.safetensors"
        save_file({f"core_{k}": core.cpu().contiguous() for k, core in enumerate(cores)}, path)
        gram = norm.input_gram if norm is not None else subject.gram
        weighted = None if gram is None else _relative(difference, subject.wide, gram)
        relative = _relative(difference, subject.wide, None)
        sites, bonds = made.mpo.site_shape, made.mpo.bond_dims
        return Solution(made.candidate.name, sites, bonds, path, relative, weighted, loss)

    def _subject(self, case: _Case, *, by_inputs: bool = False) -> tuple[Norm, Subject]:
        weight = case.weight
        assert weight.key is not None
        matrix = weight.oriented(self.checkpoint.reader.read(weight.key).to(self.device))
        if not bool(torch.isfinite(matrix).all()):
            raise InputError(f"{weight.key}: NaN or infinite elements", hint="repair or re-download the checkpoint")
        norm = self.norms.of(weight)
        if by_inputs:
            norm = replace(norm, gram=norm.input_gram, output=None, unmeasured="")
        to = self.device
        gram = norm.gram.to(to) if norm.gram is not None else None
        output = norm.output.to(to) if norm.output is not None else None
        return norm, Subject(matrix, gram, output)

    def _scale(self, norm: Norm, subject: Subject) -> float:
        """Turns a squared error into what is added up: a part of the loss, or of what the matrix puts out."""
        if self.budget.calibration is not None and self.budget.weights == "fisher":
            return norm.scale
        total = weighted_square(subject.wide, subject.gram)
        return 1.0 / total if total else 1.0

    def _dtype(self, weight: Weight) -> torch.dtype:
        wanted: torch.dtype = getattr(torch, self.dtype) if self.dtype else weight.dtype
        return wanted

    def _tell(self, number: int, what: str, case: _Case) -> None:
        if self.progress is not None:
            self.progress(number, len(self._cases), f"{what} {case.weight.name}")


def _relative(difference: Tensor, matrix: Tensor, gram: Tensor | None) -> float:
    whole = weighted_square(matrix, gram)
    return math.sqrt(max(weighted_square(difference, gram), 0.0) / whole) if whole else 0.0
