"""How far a model with some matrices replaced is from itself, measured on samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from mpocli.hf.activations import Batch, run
from mpocli.hf.probe import token_mask
from mpocli.hf.weight import Weight
from mpocli.nn.logits import kl, slices


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
    """Of one batch: logits (`is_logits`), or any other outputs; `batch` is what went in."""

    values: Tensor
    is_logits: bool
    batch: Batch


def outputs(model: Any, batch: Batch) -> Outputs:
    """Logits of a model with more than one, else what it puts out."""
    found = run(model, batch)
    logits = found.get("logits")
    if logits is not None and logits.shape[-1] > 1:
        return Outputs(logits, True, batch)
    if logits is None and "last_hidden_state" in found:
        return Outputs(found["last_hidden_state"], False, batch)
    tensors = [value for value in found.values() if isinstance(value, Tensor) and value.is_floating_point()]
    alike = [tensor for tensor in tensors if tensor.shape == tensors[0].shape]  # the two ends of an answer
    return Outputs(torch.stack(alike, -1), False, batch)


class RecordedOutputs:
    """A model's outputs on some batches, on disk between uses: logits over a vocabulary would fill the memory."""

    def __init__(self, model: Any, batches: Sequence[Batch], folder: Path) -> None:
        self._parts: list[tuple[Path, bool, Batch]] = []
        for batch in batches:
            found = outputs(model, batch)
            path = folder / f"{len(self._parts)}.safetensors"
            save_file({"values": found.values.cpu().contiguous()}, path)
            self._parts.append((path, found.is_logits, batch))

    def __iter__(self) -> Iterator[Outputs]:
        for path, is_logits, batch in self._parts:
            yield Outputs(load_file(path)["values"], is_logits, batch)


def divergence(model: Any, dense: Iterable[Outputs], *, causal: bool = False) -> tuple[float, list[float] | None]:
    """Of a changed model from the dense one's outputs, and with `causal` its next-token losses where it predicts those.

    KL(dense ‖ changed) in nats a token, or of other outputs ‖a−b‖² / ‖a‖²; padding does not count.
    """
    total = count = 0.0
    losses: list[float] | None = [] if causal else None
    for before in dense:
        after = outputs(model, before.batch)
        mask, size = token_mask(before.batch, before.values), before.values.shape[-1]
        places = torch.arange(before.values.numel() // size)
        places = places if mask is None else places[mask.reshape(-1).cpu()]
        a, b = before.values.reshape(-1, size), after.values.reshape(-1, size)
        for part in slices(len(places), size):
            ours, theirs = (values[places[part]].cpu().float() for values in (a, b))
            if before.is_logits:
                total += float(kl(ours, theirs).double().sum())
                count += len(ours)
            else:
                total += float((ours - theirs).square().double().sum())
                count += float(ours.square().double().sum())
        loss = next_token_loss(after) if losses is not None else None
        losses = None if loss is None or losses is None else [*losses, loss]
    return (total / count if count else 0.0), losses


def next_token_loss(found: Outputs) -> float | None:
    """The mean over a batch, None for outputs that are no distributions over tokens."""
    ids, mask = found.batch["input_ids"].cpu(), found.batch.get("attention_mask")
    logits = found.values
    if not found.is_logits or logits.dim() != 3 or logits.shape[:-1] != ids.shape or int(ids.max()) >= logits.shape[-1]:
        return None
    counted = torch.ones_like(ids[:, 1:], dtype=torch.bool) if mask is None else mask[:, 1:].cpu() != 0
    rows, places = counted.nonzero().unbind(1)
    total = 0.0
    for part in slices(len(rows), logits.shape[-1]):
        row, place = rows[part], places[part]
        said, wanted = logits[row, place].cpu().float(), ids[row, place + 1]
        total += float(F.cross_entropy(said, wanted, reduction="sum").double())
    return total / len(rows) if len(rows) else math.nan


def perplexity(losses: Sequence[float] | None) -> float | None:
    """Of batches of the same size; None where it has no number."""
    mean = sum(losses) / len(losses) if losses else math.inf
    return math.exp(mean) if mean < 700 else None
