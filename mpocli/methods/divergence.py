"""How far a model with some matrices replaced is from itself, measured on samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mpocli.hf.calibration import Batch, run
from mpocli.hf.moments import token_mask
from mpocli.hf.targets import Weight


def is_layer(weight: Weight) -> bool:
    """Whether a weight is one module's own, so that its matrix can be replaced there."""
    return len(weight.members) == 1 and weight.kind != "embedding"


@contextmanager
def replaced(model: Any, matrices: Mapping[str, Tensor], weights: Mapping[str, Weight]) -> Iterator[None]:
    """A model with these O×I matrices in place of its own, which come back."""
    parameters = {name: model.get_submodule(name).weight for name in matrices}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        with torch.no_grad():
            for name, matrix in matrices.items():
                parameters[name].copy_(weights[name].oriented(matrix))
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])


def outputs(model: Any, batches: Sequence[Batch]) -> list[Tensor]:
    """For every batch log-probabilities, or the last hidden state of a model without a head, on the CPU."""
    return [_output(run(model, batch)) for batch in batches]


def _output(found: Any) -> Tensor:
    logits = found.get("logits")
    if logits is not None and logits.shape[-1] > 1:
        return logits.float().log_softmax(-1).cpu()  # type: ignore[no-any-return]
    tensor: Tensor = found["last_hidden_state"] if logits is None else logits
    return tensor.float().cpu()


def divergence(dense: Sequence[Tensor], other: Sequence[Tensor], batches: Sequence[Batch]) -> float:
    """KL(dense ‖ other) in nats a token, or of other outputs ‖a−b‖² / ‖a‖²; padding does not count."""
    total = count = 0.0
    for a, b, batch in zip(dense, other, batches, strict=True):
        mask = token_mask(batch, a)
        mask = None if mask is None else mask.cpu()
        a, b = (a, b) if mask is None else (a[mask], b[mask])
        if is_distribution(a):
            total += float((a.exp() * (a - b)).sum())
            count += a.numel() / a.shape[-1]
        else:
            total += float((a - b).square().sum())
            count += float(a.square().sum())
    return total / count if count else 0.0


def perplexity(found: Sequence[Tensor], batches: Sequence[Batch]) -> float | None:
    """Of the next token, None for a model that does not predict it."""
    total = count = 0.0
    for logs, batch in zip(found, batches, strict=True):
        ids, mask = batch["input_ids"].cpu(), batch.get("attention_mask")
        if logs.dim() != 3 or logs.shape[:-1] != ids.shape or not is_distribution(logs):
            return None
        picked = logs[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        counted = torch.ones_like(picked, dtype=torch.bool) if mask is None else mask[:, 1:].cpu() != 0
        total -= float(picked[counted].sum())
        count += int(counted.sum())
    return float(torch.tensor(total / count).exp()) if count else None


def is_distribution(tensor: Tensor) -> bool:
    """Whether these are log-probabilities."""
    return bool((tensor <= 0).all())
