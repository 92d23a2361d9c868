"""Run a model over evaluation data: what it predicts, how well, how fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mpocli.config.tasks import Task
from mpocli.errors import InputError, NumericsError
from mpocli.hf.foreign import foreign
from mpocli.nn.evaluating import evaluating
from mpocli.nn.logits import rows_at_once, slices
from mpocli.progress import StepProgress
from mpocli.train.data.collate import IGNORE, collate
from mpocli.train.data.vocabulary import Vocabulary
from mpocli.train.data.windows import Windows
from mpocli.train.evaluate.metrics import compute, language_modelling, perplexity
from mpocli.train.models import Family, vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of the tokens of a masked model's window, this share is hidden and asked for: BERT's own.
MASK_SHARE = 0.15
_MASK_SEED = 20210801


@dataclass
class Run:
    """What a model said about every sample, in their order, and the time it took.

    `scores`: (samples, classes) logits, or (samples,) for a regression; `texts` for text to text; `nll` the sum of
    −ln p over `tokens` predicted tokens. `seconds` and `sizes` (tokens without padding; of text to text those
    that were written) are per batch.
    """

    scores: Tensor | None = None
    texts: list[str] = field(default_factory=list)
    nll: float = 0.0
    tokens: int = 0
    words: int = 0
    samples: int = 0
    seconds: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    @property
    def predictions(self) -> list[Any]:
        """Class indices, scores or texts."""
        if self.scores is None:
            return self.texts
        return list((self.scores.argmax(-1) if self.scores.dim() == 2 else self.scores).tolist())


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


@torch.no_grad()
def run_examples(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    features: Sequence[dict[str, Any]],
    task: Task,
    *,
    batch_size: int = 32,
    precision: str = "fp32",
    progress: StepProgress | None = None,
) -> Run:
    """Classify or score every example. Batches are of similar length; results come in the examples' order."""
    run = Run(samples=len(features))
    order, outputs = _by_length(features), []
    with evaluating(model):
        for batch in _batches(order, batch_size):
            inputs = collate([_inputs(features[i]) for i in batch], vocabulary.pad)
            with autocast(model.device, precision):
                logits = _timed(run, inputs, lambda moved: model(**moved).logits, model)
            outputs.append(logits.float().cpu())
            if progress:
                progress(len(run.sizes), -(-len(order) // batch_size))
    scores = torch.empty_like(torch.cat(outputs))
    scores[torch.tensor(order)] = torch.cat(outputs)
    bad = int((~torch.isfinite(scores)).any(-1).sum())
    if bad:
        raise NumericsError(f"{bad} of {len(scores)} predictions are not finite", hint="the model is broken")
    run.scores = scores.squeeze(-1) if task.kind == "regression" else scores
    return run


@torch.no_grad()
def run_generation(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    features: Sequence[dict[str, Any]],
    *,
    family: Family,
    batch_size: int = 32,
    max_new_tokens: int = 96,
    precision: str = "fp32",
    progress: StepProgress | None = None,
) -> Run:
    """Write a text for every source, greedily. A decoder-only model's sources are padded on the left."""
    run = Run(samples=len(features))
    order = _by_length(features)
    texts: dict[int, str] = {}
    pad = vocabulary.pad
    with evaluating(model):
        for batch in _batches(order, batch_size):
            side: Any = "left" if family == "causal" else "right"
            inputs = collate([_inputs(features[i]) for i in batch], pad, side=side)
            inputs.pop("token_type_ids", None)
            length = inputs["input_ids"].shape[1] if family == "causal" else 0
            with autocast(model.device, precision):
                made = _timed(run, inputs, lambda moved: _generate(model, moved, pad, max_new_tokens), model)
            run.sizes[-1] = int((made[:, length:] != pad).sum())  # what was written, not what was read
            for i, row in zip(batch, made[:, length:].tolist(), strict=True):
                texts[i] = vocabulary.tokenizer.decode(row, skip_special_tokens=True).strip()
            if progress:
                progress(len(run.sizes), -(-len(order) // batch_size))
    run.texts = [texts[i] for i in range(len(features))]
    return run


def _generate(model: Any, inputs: dict[str, Tensor], pad: int, max_new_tokens: int) -> Tensor:
    made: Tensor = model.generate(
        **inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, pad_token_id=pad
    )
    return made


def run_windows(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    windows: Windows,
    family: Family,
    *,
    batch_size: int = 8,
    precision: str = "fp32",
    progress: StepProgress | None = None,
) -> Run:
    """Sum −ln p over the tokens of a text: every next one for a causal model, a seeded 15 % for a masked one."""
    run = Run(samples=len(windows.ids), words=windows.words)
    for logits, targets in window_logits(
        model, vocabulary, windows, family, run, batch_size=batch_size, precision=precision, progress=progress
    ):
        run.nll += float(F.cross_entropy(logits, targets, reduction="sum").double())
        run.tokens += len(targets)
    return run


@torch.no_grad()
def window_logits(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    windows: Windows,
    family: Family,
    run: Run,
    *,
    batch_size: int = 8,
    precision: str = "fp32",
    width: int | None = None,
    progress: StepProgress | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What a model predicts of a text part by part: logits (tokens, V) in float32 and the tokens that stand there.

    Batches are as large as `batch_size` and a limit of logits allow, and so are the parts. For models of the same
    number of logits, or that are told the larger one as `width`, all parts have the same tokens. `run` is told the
    times.
    """
    pad = vocabulary.pad
    longest = max(len(ids) for ids in windows.ids)
    width = width or vocabulary_of(model.config)
    batch_size = rows_at_once(batch_size, longest, width)
    with evaluating(model):
        for start in range(0, len(windows.ids), batch_size):
            ids = windows.ids[start : start + batch_size]
            features = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]
            inputs = collate(features, pad)
            if family == "masked":
                seeds = range(_MASK_SEED + start, _MASK_SEED + start + len(ids))
                targets = mask_tokens(inputs, vocabulary, seeds, always=True)
            else:
                targets = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORE)[:, 1:]
            with autocast(model.device, precision):
                logits = _timed(run, inputs, lambda moved: model(**moved).logits, model)
            logits = logits if family == "masked" else logits[:, :-1]
            places = (targets != IGNORE).nonzero()  # none in a window of one token, which predicts nothing
            for part in slices(len(places), width):
                row, place = places[part].unbind(1)
                yield logits[row, place].float(), targets[row, place].to(logits.device)
            if progress:
                progress(len(run.sizes), -(-len(windows.ids) // batch_size))


def mask_tokens(
    inputs: dict[str, Tensor], vocabulary: Vocabulary, seeds: Sequence[int], *, always: bool = False
) -> Tensor:
    """Hide 15 % of a batch's tokens in place, at least one a row; returns the labels, −100 elsewhere.

    Of the chosen ones 80 % become the mask token, 10 % a random one and 10 % stay (Devlin et al., 2019); `always`
    masks them all, for evaluation. Every row draws from its own seed, so that neither the batch that it comes in
    nor the state of a resumed run changes its mask.
    """
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, IGNORE)
    special = torch.tensor(sorted(vocabulary.tokenizer.all_special_ids))
    for row, (seed, length) in enumerate(zip(seeds, inputs["attention_mask"].sum(1).tolist(), strict=True)):
        generator = torch.Generator().manual_seed(seed)
        tokens = ids[row, :length]
        chances = torch.rand(length, generator=generator).masked_fill(torch.isin(tokens, special), 2.0)
        chosen = ((chances < MASK_SHARE) | (chances == chances.min())) & (chances < 2.0)
        labels[row, :length] = tokens.masked_fill(~chosen, IGNORE)
        how, drawn = (
            torch.rand(length, generator=generator),
            torch.randint(vocabulary.size, (length,), generator=generator),
        )
        tokens[chosen if always else chosen & (how < 0.8)] = vocabulary.mask
        if not always:
            random = chosen & (how >= 0.9)
            tokens[random] = drawn[random]
    return labels


def score(task: Task, family: Family, run: Run, labels: Sequence[Any], *, suffix: str = "") -> dict[str, float]:
    """The task's metrics of a run, under house keys."""
    if task.kind == "lm" and not run.tokens:
        raise InputError("the text is too short: no token to predict", hint="name a longer one")
    if task.kind != "lm":
        return compute(task, run.predictions, labels, suffix=suffix)
    if family == "masked":  # words have no meaning where one token in seven is asked for
        return {"perplexity": perplexity(run.nll, run.tokens)}
    return language_modelling(run.nll, run.tokens, run.words)


# --- batches --------------------------------------------------------------------------------------------------------


def _inputs(feature: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in feature.items() if key != "labels"}


def _by_length(features: Sequence[dict[str, Any]]) -> list[int]:
    return sorted(range(len(features)), key=lambda i: (len(features[i]["input_ids"]), i))


def _batches(order: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _timed(
    run: Run, inputs: dict[str, Tensor], call: Callable[[dict[str, Tensor]], Tensor], model: PreTrainedModel
) -> Tensor:
    device = model.device
    moved = {key: value.to(device) for key, value in inputs.items()}
    run.sizes.append(int(inputs["attention_mask"].sum()))
    started = time.perf_counter()
    with foreign(f"a {type(model).__name__} cannot be run on this data", hint="choose another ‹task› or ‹max_length›"):
        result = call(moved)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    run.seconds.append(time.perf_counter() - started)
    return result
