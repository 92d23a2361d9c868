"""Plain SVD, whitened SVD and plain MPO at the size of a plan, measured on text that the plan has not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from mpocli.hf.activations import Batch
from mpocli.hf.weight import Weight
from mpocli.methods.planner.divergence import RecordedOutputs, divergence, is_layer, perplexity, replaced
from mpocli.methods.planner.fit_store import ChosenForm, FitStore
from mpocli.mpo.candidates import papers
from mpocli.mpo.fitting import Fitted, FittingProblem
from mpocli.nn.evaluating import evaluating
from mpocli.progress import Progress

Made = tuple[Tensor, int]


@dataclass(frozen=True)
class Compared:
    """How far one way of compressing the same matrices to the same size takes the model from the dense one.

    `divergence` is measured on held-out samples: of the predicted distributions, KL(dense ‖ compressed) in nats a
    token, or for a model without a head the relative squared change of its outputs. `perplexity` where it predicts
    the next token.
    """

    name: str
    params: int
    divergence: float
    perplexity: float | None = None


def compare(
    fits: FitStore,
    model: Any,
    weights: Sequence[Weight],
    found: dict[str, ChosenForm | str],
    batches: Sequence[Batch],
    *,
    causal: bool,
    progress: Progress | None = None,
) -> tuple[Compared, ...]:
    """Every arm beside the plan gives each matrix the same ratio, so that all have its size or a little less.

    `model` is the dense one, and is so again afterwards; `batches` are the held-out samples, `causal` whether the model
    predicts next tokens. Tables and tied weights stay dense in all arms.
    """
    forms = {name: form for name, form in found.items() if isinstance(form, ChosenForm)}
    planned = {weight.name: weight for weight in weights if weight.name in forms and is_layer(weight)}
    whole = sum(weight.dense_params for weight in planned.values())
    size = sum(forms[name].params for name in planned)

    def share(weight: Weight) -> int:
        return weight.dense_params * size // whole

    def plain_mpo(weight: Weight) -> Made:
        problem = FittingProblem(fits.problem(weight)[1].matrix)
        return _made(problem.fitted_within(papers(*weight.shape, fits.sites), share(weight), 0), weight)

    def plain_svd(weight: Weight) -> Made:
        return _made(FittingProblem(fits.problem(weight)[1].matrix).svd_within(share(weight)), weight)

    def whitened_svd(weight: Weight) -> Made:
        norm, problem = fits.problem(weight)
        return _made(FittingProblem(problem.matrix, fits.moved(norm.input_gram)).svd_within(share(weight)), weight)

    def plan(weight: Weight) -> Made:
        form = forms[weight.name]
        return form.mpo(weight.shape).to(dtype=torch.float32).to_matrix(), form.params

    arms = {"plain MPO": plain_mpo, "plain SVD": plain_svd, "whitened SVD": whitened_svd, "the plan": plan}
    with evaluating(model), TemporaryDirectory(dir=fits.folder.parent) as folder:
        dense = RecordedOutputs(model, batches, Path(folder))
        _, losses = divergence(model, dense, causal=causal)
        results = [Compared("dense", whole, 0.0, perplexity(losses))]
        for number, (name, form) in enumerate(arms.items()):
            if progress:
                progress(number, len(arms), f"comparing with {name}")
            sizes: list[int] = []

            def matrix(weight: Weight, form: Callable[[Weight], Made] = form, sizes: list[int] = sizes) -> Tensor:
                made, params = form(weight)
                sizes.append(params)
                return made

            with replaced(model, planned, matrix):
                distance, losses = divergence(model, dense, causal=causal)
            results.append(Compared(name, sum(sizes), distance, perplexity(losses)))
    return tuple(results)


def _made(fitted: Fitted | None, weight: Weight) -> Made:
    if fitted is None:  # no bonds are that small: nothing is left of it
        return torch.zeros(weight.shape), 0
    return fitted.mpo.to_matrix(), fitted.mpo.num_params
