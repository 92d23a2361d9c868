"""Plain SVD, whitened SVD and plain MPO at the size of a plan, measured on text that the plan has not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpocli.hf.artifact import Checkpoint
from mpocli.hf.calibration import Batch, evaluating
from mpocli.hf.calibration import run as forward
from mpocli.hf.moments import token_mask
from mpocli.hf.targets import Weight
from mpocli.methods.norms import Norms
from mpocli.methods.planner import Solution
from mpocli.mpo.candidates import papers
from mpocli.mpo.fitting import Subject

Forms = dict[str, Callable[[Weight], Tensor]]


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
    checkpoint: Checkpoint,
    model: Any,
    weights: Sequence[Weight],
    found: dict[str, Solution | str],
    norms: Norms,
    batches: Sequence[Batch],
    sites: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[Compared, ...]:
    """Every arm gives each matrix the same ratio, so that all have the plan's size or a little less.

    `model` is the dense one, and is so again afterwards; `batches` are the held-out samples.
    """
    planned = [weight for weight in weights if _is_layer(weight) and isinstance(found[weight.name], Solution)]
    solutions = {weight.name: found[weight.name] for weight in planned}
    whole = sum(weight.dense_params for weight in planned)
    size = sum(solution.params for solution in solutions.values() if isinstance(solution, Solution))

    def share(weight: Weight) -> int:
        return int(weight.dense_params * size / whole)

    def read(weight: Weight) -> Tensor:
        assert weight.key is not None
        return weight.oriented(checkpoint.reader.read(weight.key)).double()

    def plain_svd(weight: Weight) -> tuple[Tensor, int]:
        return _low_rank(Subject(read(weight)), share(weight))

    def whitened_svd(weight: Weight) -> tuple[Tensor, int]:
        return _low_rank(Subject(read(weight), norms.of(weight).input_gram), share(weight))

    def plain_mpo(weight: Weight) -> tuple[Tensor, int]:
        made = Subject(read(weight)).fitted_within(papers(*weight.shape, sites), share(weight), 0)
        return _made(made, weight)

    def plan(weight: Weight) -> tuple[Tensor, int]:
        solution = found[weight.name]
        assert isinstance(solution, Solution)
        return solution.mpo(weight.shape).to_matrix(), solution.params

    arms = {"plain MPO": plain_mpo, "plain SVD": plain_svd, "whitened SVD": whitened_svd, "the plan": plan}
    with evaluating(model):
        dense = [_outputs(model, batch) for batch in batches]
        results = [Compared("dense", whole, 0.0, _perplexity(dense, batches))]
        for number, (name, form) in enumerate(arms.items()):
            if progress:
                progress(number, len(arms), f"comparing with {name}")
            params = 0
            with _restored(model, planned):
                for weight in planned:
                    matrix, used = form(weight)
                    params += used
                    _put(model, weight, matrix)
                outputs = [_outputs(model, batch) for batch in batches]
            divergence = _divergence(dense, outputs, batches)
            results.append(Compared(name, params, divergence, _perplexity(outputs, batches)))
    return tuple(results)


def _is_layer(weight: Weight) -> bool:
    return len(weight.members) == 1 and weight.kind != "embedding"


def _low_rank(subject: Subject, params: int) -> tuple[Tensor, int]:
    made = subject.svd_within(max(params, sum(subject.matrix.shape)))
    assert made is not None
    return made.mpo.to_matrix(), made.mpo.num_params


def _made(made: Any, weight: Weight) -> tuple[Tensor, int]:
    if made is None:  # no bonds are that small: nothing is left of it
        return torch.zeros(weight.shape), 0
    return made.mpo.to_matrix(), made.mpo.num_params


@contextmanager
def _restored(model: Any, weights: Sequence[Weight]) -> Any:
    kept = {weight.name: model.get_submodule(weight.name).weight.detach().clone() for weight in weights}
    try:
        yield
    finally:
        for name, tensor in kept.items():
            with torch.no_grad():
                model.get_submodule(name).weight.copy_(tensor)


def _put(model: Any, weight: Weight, matrix: Tensor) -> None:
    with torch.no_grad():
        model.get_submodule(weight.name).weight.copy_(weight.oriented(matrix))


def _outputs(model: Any, batch: Batch) -> Tensor:
    """Logits as log-probabilities, or the last hidden state, of the tokens that count."""
    found = forward(model, batch)
    logits = found.get("logits")
    tensor: Tensor = found["last_hidden_state"] if logits is None else logits
    if logits is not None and logits.shape[-1] > 1:
        tensor = logits.float().log_softmax(-1)
    return tensor.cpu()


def _divergence(dense: Sequence[Tensor], other: Sequence[Tensor], batches: Sequence[Batch]) -> float:
    total = count = 0.0
    for a, b, batch in zip(dense, other, batches, strict=True):
        mask = token_mask(batch, a)
        a, b = (a, b) if mask is None else (a[mask], b[mask])
        if _is_distribution(a):
            total += float((a.exp() * (a - b)).sum())
            count += a.numel() / a.shape[-1]
        else:
            total += float((a - b).square().sum())
            count += float(a.square().sum())
    return total / count if count else 0.0


def _is_distribution(tensor: Tensor) -> bool:
    return bool((tensor <= 0).all())


def _perplexity(outputs: Sequence[Tensor], batches: Sequence[Batch]) -> float | None:
    """Of the next token, for windows of text without padding."""
    total = count = 0.0
    for found, batch in zip(outputs, batches, strict=True):
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if not _is_distribution(found) or found.shape[:-1] != ids.shape or found.dim() != 3:
            return None
        picked = found[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        counted = torch.ones_like(picked, dtype=torch.bool) if mask is None else mask[:, 1:] != 0
        total -= float(picked[counted].sum())
        count += int(counted.sum())
    return float(torch.tensor(total / count).exp()) if count else None
