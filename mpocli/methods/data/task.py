"""A task's data, read and encoded for one checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mpocli.config.data import DataOptions
from mpocli.config.tasks import Task, task_named
from mpocli.errors import InputError, UsageError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.config import class_name
from mpocli.methods.data.collator import Collator
from mpocli.methods.data.reader import EvalSet, Reader, eval_sets, expected_labels, window_feature, window_set
from mpocli.methods.data.vocabulary import check_length, model_vocabulary
from mpocli.train.data.examples import split_off
from mpocli.train.data.vocabulary import Vocabulary
from mpocli.train.models import Family, family_of


@dataclass(frozen=True)
class TaskData:
    """Everything a run needs of the data. `truncated` counts the examples cut to the maximum length, by split."""

    task: Task
    family: Family
    vocabulary: Vocabulary
    label_names: tuple[str, ...]
    train: list[dict[str, Any]]
    eval: tuple[EvalSet, ...]
    held_out: tuple[EvalSet, ...] = ()
    test: tuple[EvalSet, ...] = ()
    truncated: dict[str, int] = field(default_factory=dict)

    def collator(self, seed: int) -> Collator:
        """Makes batches for training."""
        return Collator(self.vocabulary, self.family == "masked", seed)

    @property
    def tokenizer(self) -> Any:
        return self.vocabulary.tokenizer

    @property
    def pad(self) -> int:
        return self.vocabulary.pad

    def sample(self, batch_size: int, count: int, seed: int, device: torch.device) -> list[dict[str, Tensor]]:
        """`count` batches of training data, drawn by the seed: what losses are compared on."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train), generator=generator).tolist()[: batch_size * count]
        cuts = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
        collator = self.collator(seed)
        batches = [collator([self.train[k] for k in cut]) for cut in cuts]
        return [{key: value.to(device) for key, value in batch.items()} for batch in batches]


def prepare(
    checkpoint: Checkpoint, options: DataOptions, *, needs_train: bool = False, holdout: bool = False
) -> TaskData:
    """Read and tokenise all files of a task. Raises `InputError` and `UsageError` as `train.data` does."""
    task = task_named(options.task)
    family = family_of(task, checkpoint.config)
    vocabulary = model_vocabulary(checkpoint, options.tokenizer)
    _ = vocabulary.mask if family == "masked" else vocabulary.pad  # looked up before anything slow
    measured = bool(options.eval or options.test or holdout or not needs_train)
    written = options.max_new_tokens if measured and task.kind == "text2text" and family == "causal" else 0
    check_length(checkpoint, options.max_length, written)
    train_source = options.train or (task.hub if needs_train else "")
    if needs_train and not train_source:
        raise UsageError(f"--task {task.name} needs --train FILE", hint="name a tsv, csv, jsonl, parquet or txt file")
    expected = expected_labels(task, checkpoint)
    truncated: dict[str, int] = {}
    train: list[dict[str, Any]] = []
    held_out: tuple[EvalSet, ...] = ()
    label_names = expected
    # An encoder-decoder classifies from its end-of-sequence token, which not every tokenizer adds.
    how: Family = "seq2seq" if checkpoint.config.is_encoder_decoder else "causal" if family == "causal" else "encoder"
    reader = Reader(task, family, vocabulary, options, how)
    if task.kind == "lm":
        if train_source:
            windows = reader.windows(train_source)
            cut = max(1, len(windows.ids) // 10) if holdout else 0
            if holdout:
                held_out = (window_set(train_source, replace(windows, ids=windows.ids[-cut:])),)
            kept = windows.ids[: len(windows.ids) - cut] if cut else windows.ids
            least = 1 if family == "masked" else 2  # one token alone predicts nothing
            train = [window_feature(index, ids, family) for index, ids in enumerate(kept) if len(ids) >= least]
            if not train:
                raise InputError(f"{train_source}: too short to train on", hint="name a longer text")
        evals = tuple(window_set(source, reader.windows(source, "validation")) for source in options.eval)
        tests = tuple(window_set(source, reader.windows(source, "test")) for source in (options.test,) if source)
        return TaskData(task, family, vocabulary, (), train, evals, held_out, tests, truncated)
    if train_source:
        examples = reader.examples(train_source, expected, limit=options.limit, renames=True)
        label_names = examples.label_names or expected
        if holdout:
            examples, rest = split_off(examples, 0.1, options.seed)
            held_out = (reader.eval_set(rest, "", truncated, "held_out"),)
        encoded = reader.encoded(examples)
        train, truncated["train"] = encoded.features, encoded.truncated
    evals = eval_sets(reader, options.eval, label_names, truncated, "eval")
    tests = eval_sets(reader, (options.test,) if options.test else (), label_names, truncated, "test")
    if not label_names and evals and evals[0].examples:
        label_names = evals[0].examples.label_names
    return TaskData(task, family, vocabulary, label_names, train, evals, held_out, tests, truncated)


def check_trained_head(checkpoint: Checkpoint, data: TaskData) -> None:
    """A classifier that was never trained only guesses: nothing to measure, and nothing to learn from."""
    name = class_name(checkpoint.config)
    if data.family == "encoder" and not name.endswith("ForSequenceClassification"):
        raise InputError(
            f"{checkpoint.source.name}: a {name or 'model'} has no classification head for task {data.task.name}",
            hint="run mpocli finetune first",
        )
