"""A bound on the error holds for what is stored, measured in double precision, whatever the inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mpocli.config.budget import Budget
from mpocli.hf.weight import Weight
from mpocli.methods.planner.by_error import smallest_within
from mpocli.methods.planner.fit_store import ChosenForm, FitStore
from mpocli.methods.planner.norms import Norm
from mpocli.mpo.fitting import FittingProblem
from mpocli.mpo.gram import regularised
from mpocli.mpo.weighted import weighted_square


@dataclass(frozen=True)
class Fits(FitStore):
    """A workshop of one matrix, which comes from nowhere."""

    matrix: Tensor | None = None
    gram: Tensor | None = None

    def problem(self, weight: Weight, *, by_inputs: bool = False) -> tuple[Norm, FittingProblem]:
        assert self.matrix is not None
        return Norm(self.gram, inputs=lambda: self.gram), FittingProblem(self.matrix, self.gram)


def shop(matrix: Tensor, gram: Tensor, limit: float, folder: Path, dtype: str, shapes: Any) -> Fits:
    nothing: Any = None
    budget = Budget(max_error=limit, shapes=shapes)
    return Fits(nothing, budget, nothing, folder, torch.device("cpu"), dtype, 2, matrix=matrix, gram=gram)


@pytest.mark.parametrize("shapes", ["svd", "paper"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("outlier", [10.0, 1000.0])
def test_the_bound_is_met_by_what_is_stored(outlier: float, dtype: str, shapes: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    w, direction = (torch.randn(*size, dtype=torch.float64, generator=generator) for size in ((64, 64), (64,)))
    inputs = torch.eye(64, dtype=torch.float64) + outlier**2 * torch.outer(direction, direction)
    gram = regularised(inputs * 500_000, 500_000)
    whole = weighted_square(w, gram)
    weight: Any = type("AWeight", (), {"name": "w", "shape": (64, 64), "kind": "linear", "dense_params": 4096})
    weight.dtype = getattr(torch, dtype)
    plain = FittingProblem(w, gram)
    met = 0
    for rank in (2, 8, 14, 20):
        fitted = plain.svd_within(rank * 128)
        assert fitted is not None
        # Bounds that some rank meets by a hair, before it is rounded.
        limit = math.sqrt(fitted.loss / whole) * (1 + 1e-9)
        found = smallest_within(shop(w, gram, limit, tmp_path, dtype, shapes), weight, limit)
        if isinstance(found, ChosenForm):
            stored = found.mpo((64, 64)).to(dtype=torch.float64).to_matrix()
            true = math.sqrt(weighted_square(w - stored, gram) / whole)
            assert true <= limit and found.weighted_error == pytest.approx(true, rel=1e-9)
            met += 1
    assert met or dtype == "bfloat16"  # which cannot be that exact beside large outliers


def test_a_matrix_that_nothing_smaller_stands_for_stays(tmp_path: Path) -> None:
    w = torch.eye(64, dtype=torch.float64)
    gram = torch.eye(64, dtype=torch.float64)
    weight: Any = type("AWeight", (), {"name": "w", "shape": (64, 64), "kind": "linear", "dense_params": 4096})
    weight.dtype = torch.float32
    one = replace(shop(w, gram, 1e-9, tmp_path, "float32", "svd"), folder=tmp_path)
    assert smallest_within(one, weight, 1e-9) == "no smaller form has so small an error"
