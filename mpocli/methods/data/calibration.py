"""Calibration data: windows of a text or rows of a task, drawn by a seed, as batches for a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mpocli.config.calibration import Calibration
from mpocli.config.data import DataOptions
from mpocli.config.tasks import task_named
from mpocli.errors import InputError, UsageError
from mpocli.hf.activations import Batch
from mpocli.hf.artifact import Checkpoint
from mpocli.methods.data.task import prepare
from mpocli.methods.data.vocabulary import model_vocabulary, positions
from mpocli.nn.logits import rows_at_once
from mpocli.train.data.collate import collate
from mpocli.train.data.text import read_text
from mpocli.train.data.windows import lm_windows
from mpocli.train.models import family_of, vocabulary_of

Batches = list[dict[str, Tensor]]
# Samples of a batch, fewer where the logits of so many would fill the memory.
_BATCH = 8


def calibration_batches(
    checkpoint: Checkpoint,
    chosen: Calibration,
    data: DataOptions | None,
    seed: int,
    *,
    warn: Callable[[str], None] = lambda line: None,
) -> Batches:
    """`samples` windows of the text drawn by the seed, or with a task so many of its examples, with padding masks.

    Labels only where a decoder reads them, shifted: no loss is made of them. `warn` is told where the data has fewer.
    Raises `InputError` for data without text and `UsageError` for windows longer than the model's positions.
    """
    if data is not None and data.task != "lm":
        found = prepare(checkpoint, replace(data, train=chosen.source, eval=(), test=None), needs_train=True)
        rows = _rows(checkpoint, data.max_length)
        batches = found.sample(rows, -(-chosen.samples // rows), seed, torch.device("cpu"))
        room = chosen.samples - rows * (len(batches) - 1)
        batches = [*batches[:-1], {key: value[:room] for key, value in batches[-1].items()}]
    else:
        batches = _text_batches(checkpoint, chosen, data, seed)
    rows = sum(len(batch["input_ids"]) for batch in batches)
    if rows < chosen.samples:
        warn(f"--samples {chosen.samples}: {chosen.source} gives {rows}")
    if not checkpoint.config.is_encoder_decoder:
        batches = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    return batches


def fed(batches: Sequence[Batch], model: Any) -> Batches:
    """The batches as this model's class takes them: an encoder-decoder model without a head reads no labels."""
    if not model.config.is_encoder_decoder or "labels" in inspect.signature(model.forward).parameters:
        return [dict(batch) for batch in batches]
    start, pad = (getattr(model.config, f"{name}_token_id", None) for name in ("decoder_start", "pad"))
    made = []
    for batch in batches:
        rest = {key: value for key, value in batch.items() if key != "labels"}
        if "labels" in batch:
            labels = batch["labels"]
            kept = labels != -100
            first = torch.full_like(labels[:, :1], (pad or 0) if start is None else start)
            rest["decoder_input_ids"] = torch.cat([first, labels.masked_fill(~kept, pad or 0)[:, :-1]], 1)
            rest["decoder_attention_mask"] = kept.to(labels.dtype)
        made.append(rest)
    return made


def split_rows(batches: Batches, count: int) -> tuple[Batches, Batches]:
    """The first `count` rows, and the others.

    >>> batch = {"input_ids": torch.arange(6).reshape(3, 2)}
    >>> first, rest = split_rows([batch, batch], 4)
    >>> [len(part["input_ids"]) for part in first], [len(part["input_ids"]) for part in rest]
    ([3, 1], [2])
    """
    first: Batches = []
    rest: Batches = []
    for batch in batches:
        rows = len(batch["input_ids"])
        here = min(rows, max(0, count))
        count -= here
        if here:
            first.append({key: value[:here] for key, value in batch.items()})
        if here < rows:
            rest.append({key: value[here:] for key, value in batch.items()})
    return first, rest


def _text_batches(checkpoint: Checkpoint, chosen: Calibration, data: DataOptions | None, seed: int) -> Batches:
    vocabulary = model_vocabulary(checkpoint, data.tokenizer if data else None)
    column = data.text_columns[0] if data and data.text_columns else None
    text = read_text(chosen.source, text_column=column)
    model_config = checkpoint.config
    is_seq2seq = bool(model_config.is_encoder_decoder)
    most = positions(model_config)
    if most is not None and chosen.seq_len > most * (1 + is_seq2seq):
        raise UsageError(
            f"--seq-len {chosen.seq_len}: the model has {most} positions"
            + (" for each half of a window" if is_seq2seq else ""),
            hint=f"at most {most * (1 + is_seq2seq)}",
        )
    masked = is_seq2seq or family_of(task_named("lm"), model_config) == "masked"
    try:
        made = lm_windows(text, vocabulary.tokenizer, chosen.seq_len, masked=masked, vocabulary=vocabulary)
    except InputError as error:
        raise InputError(f"--calibrate {chosen.source}: {error.message}", hint=error.hint) from error
    windows = [ids for ids in made.ids if len(ids) > 1]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [windows[index] for index in order[: chosen.samples]]
    if not rows:
        raise InputError(f"--calibrate {chosen.source}: no window of text in it", hint="name a longer text")
    features = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    if is_seq2seq:  # one half is read, the other written
        halves = [(row[: len(row) // 2], row[len(row) // 2 :]) for row in rows]
        features = [{"input_ids": a, "attention_mask": [1] * len(a), "labels": b} for a, b in halves]
    size = _rows(checkpoint, chosen.seq_len)
    batches = [features[first : first + size] for first in range(0, len(features), size)]
    return [collate(batch, vocabulary.pad) for batch in batches]


def _rows(checkpoint: Checkpoint, length: int) -> int:
    """Samples of this many tokens that make a batch."""
    return rows_at_once(_BATCH, length, vocabulary_of(checkpoint.config))
