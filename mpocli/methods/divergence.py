"""How far a model with some matrices replaced is from itself, measured on samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
def replaced(model: Any, weights: Mapping[str, Weight], form: Callable[[Weight], Tensor]) -> Iterator[None]:
    """A model with the O×I matrices that `form` makes in place of its own, which come back."""
    parameters = {name: model.get_submodule(name).weight for name in weights}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                parameters[name].copy_(weight.oriented(form(weight)))
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])


@dataclass(frozen=True, eq=False)
class Outputs:
    """Of one batch, on the CPU: log-probabilities (`is_log`), or any other outputs; `batch` is what went in."""

    values: Tensor
    is_log: bool
    batch: Batch


def outputs(model: Any, batch: Batch) -> Outputs:
    """Log-probabilities of a model with more than one logit, else what it puts out."""
    found = run(model, batch)
    logits = found.get("logits")
    if logits is not None and logits.shape[-1] > 1:
        return Outputs(logits.float().log_softmax(-1).cpu(), True, batch)
    if logits is None and "last_hidden_state" in found:
        return Outputs(found["last_hidden_state"].float().cpu(), False, batch)
    tensors = [value for value in found.values() if isinstance(value, Tensor) and value.is_floating_point()]
    alike = [tensor for tensor in tensors if tensor.shape == tensors[0].shape]  # the two ends of an answer
    return Outputs(torch.stack(alike, -1).float().cpu(), False, batch)


def divergence(model: Any, dense: Sequence[Outputs], *, causal: bool = False) -> tuple[float, list[float] | None]:
    """Of a changed model from the dense one's outputs, and with `causal` its next-token losses where it predicts those.

    KL(dense ‖ changed) in nats a token, or of other outputs ‖a−b‖² / ‖a‖²; padding does not count.
    """
    total = count = 0.0
    losses: list[float] | None = [] if causal else None
    for before in dense:
        after = outputs(model, before.batch)
        mask = token_mask(before.batch, before.values)
        a, b = (values if mask is None else values[mask.cpu()] for values in (before.values, after.values))
        if before.is_log:
            # What the dense model rules out adds nothing.
            total += float(torch.where(a.isneginf(), 0.0, a.exp() * (a - b)).sum())
            count += a.numel() / a.shape[-1]
        else:
            total += float((a - b).square().sum())
            count += float(a.square().sum())
        loss = next_token_loss(after) if losses is not None else None
        losses = None if loss is None or losses is None else [*losses, loss]
    return (total / count if count else 0.0), losses


def next_token_loss(found: Outputs) -> float | None:
    """The mean over a batch, None for outputs that are no distributions over tokens."""
    ids, mask = found.batch["input_ids"].cpu(), found.batch.get("attention_mask")
    logs = found.values
    if not found.is_log or logs.dim() != 3 or logs.shape[:-1] != ids.shape or int(ids.max()) >= logs.shape[-1]:
        return None
    picked = logs[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    counted = torch.ones_like(picked, dtype=torch.bool) if mask is None else mask[:, 1:].cpu() != 0
    return -float(picked[counted].mean())


def perplexity(losses: Sequence[float] | None) -> float | None:
    """Of batches of the same size; None where it has no number."""
    mean = sum(losses) / len(losses) if losses else math.inf
    return math.exp(mean) if mean < 700 else None
