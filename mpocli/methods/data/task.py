"""A task's data, read and encoded for one checkpoint; and a model's metrics on it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mpocli.config.data import DataOptions
from mpocli.config.tasks import Task, task_named
from mpocli.errors import InputError, UsageError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.config import class_name
from mpocli.hf.loading import load_tokenizer
from mpocli.train.data.collate import collate
from mpocli.train.data.encode import Encoded, encode
from mpocli.train.data.examples import Examples, read_examples, references, split_off
from mpocli.train.data.text import read_text
from mpocli.train.data.vocabulary import Vocabulary
from mpocli.train.data.windows import Windows, lm_windows
from mpocli.train.evaluate.predict import Progress, Run, mask_tokens, run_examples, run_generation, run_windows, score
from mpocli.train.models import Family, family_of


@dataclass(frozen=True)
class EvalSet:
    """One evaluation file: features or windows, and what is right. `examples` is None for language modelling."""

    source: str
    suffix: str
    examples: Examples | None
    features: list[dict[str, Any]]
    labels: Sequence[Any]
    windows: Windows | None

    @property
    def samples(self) -> int:
        return len(self.windows.ids) if self.windows else len(self.features)


class Collator:
    """Features to padded batches; for a `masked` language model with tokens hidden.

    Which ones is a function of seed, `epoch` and sample: a resumed run hides the same.
    """

    def __init__(self, vocabulary: Vocabulary, masked: bool, seed: int) -> None:
        self.vocabulary, self.masked, self.seed, self.epoch = vocabulary, masked, seed, 0

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(features, self.vocabulary.pad)
        if self.masked:
            first = (self.seed * 1_009 + self.epoch) * 1_000_003
            batch["labels"] = mask_tokens(batch, self.vocabulary, [first + feature["index"] for feature in features])
        return batch


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
    _check_length(checkpoint, options.max_length, written)
    train_source = options.train or (task.hub if needs_train else "")
    if needs_train and not train_source:
        raise UsageError(f"--task {task.name} needs --train FILE", hint="name a tsv, csv, jsonl, parquet or txt file")
    expected = _expected_labels(task, checkpoint)
    truncated: dict[str, int] = {}
    train: list[dict[str, Any]] = []
    held_out: tuple[EvalSet, ...] = ()
    label_names = expected
    # An encoder-decoder classifies from its end-of-sequence token, which not every tokenizer adds.
    how: Any = "seq2seq" if checkpoint.config.is_encoder_decoder else "causal" if family == "causal" else "encoder"
    reader = _Reader(task, family, vocabulary, options, how)
    if task.kind == "lm":
        if train_source:
            windows = reader.windows(train_source)
            cut = max(1, len(windows.ids) // 10) if holdout else 0
            if holdout:
                held_out = (_window_set(train_source, replace(windows, ids=windows.ids[-cut:])),)
            kept = windows.ids[: len(windows.ids) - cut] if cut else windows.ids
            least = 1 if family == "masked" else 2  # one token alone predicts nothing
            train = [_window_feature(index, ids, family) for index, ids in enumerate(kept) if len(ids) >= least]
            if not train:
                raise InputError(f"{train_source}: too short to train on", hint="name a longer text")
        evals = tuple(_window_set(source, reader.windows(source, "validation")) for source in options.eval)
        tests = tuple(_window_set(source, reader.windows(source, "test")) for source in (options.test,) if source)
        return TaskData(task, family, vocabulary, (), train, evals, held_out, tests, truncated)
    if train_source:
        examples = reader.examples(train_source, expected, limit=options.limit, renames=True)
        label_names = examples.label_names or expected
        if holdout:
            examples, rest = split_off(examples, 0.1, options.seed)
            held_out = (reader.eval_set(rest, "", truncated, "held_out"),)
        encoded = reader.encoded(examples)
        train, truncated["train"] = encoded.features, encoded.truncated
    evals = _eval_sets(reader, options.eval, label_names, truncated, "eval")
    tests = _eval_sets(reader, (options.test,) if options.test else (), label_names, truncated, "test")
    if not label_names and evals and evals[0].examples:
        label_names = evals[0].examples.label_names
    return TaskData(task, family, vocabulary, label_names, train, evals, held_out, tests, truncated)


def model_vocabulary(checkpoint: Checkpoint, tokenizer: str | None = None) -> Vocabulary:
    """The checkpoint's tokenizer, or the one that was named, beside the tables of its model. Raises `InputError` for a
    model that takes no text, one without a tokenizer, and a decoder that begins with a token that it has not."""
    found = checkpoint.survey
    if found.reads != "input_ids":
        raise InputError(
            f"{checkpoint.source.name}: a {checkpoint.architecture} reads {found.reads}, no text",
            hint="choose a model of text, or what needs no data",
        )
    loaded = load_tokenizer(checkpoint.source.directory, tokenizer, trust_remote_code=checkpoint.trust_remote_code)
    types = getattr(checkpoint.config.get_text_config(), "type_vocab_size", None)
    types = types if isinstance(types, int) else None
    vocabulary = Vocabulary(loaded, found.token_rows, found.target_rows, types)
    vocabulary.check_decoder(checkpoint.config)
    return vocabulary


def check_trained_head(checkpoint: Checkpoint, data: TaskData) -> None:
    """A classifier that was never trained only guesses: nothing to measure, and nothing to learn from."""
    name = class_name(checkpoint.config)
    if data.family == "encoder" and not name.endswith("ForSequenceClassification"):
        raise InputError(
            f"{checkpoint.source.name}: a {name or 'model'} has no classification head for task {data.task.name}",
            hint="run mpocli finetune first",
        )


def positions(config: Any) -> int | None:
    """How many tokens a model has places for, None where there is no such limit (T5's relative ones)."""
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not isinstance(most, int) or most < 1 or hasattr(config, "relative_attention_num_buckets"):
        return None
    # RoBERTa's positions begin after its padding index.
    return most - (2 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0)


def _check_length(checkpoint: Checkpoint, length: int, written: int) -> None:
    """`UsageError` where source (and what is written after it) needs more places than the model has positions."""
    most = positions(checkpoint.config)
    if most is not None and length + written > most:
        what = f"--max-length {length}" + (f" and --max-new-tokens {written}" if written else "")
        raise UsageError(f"{what}: the model has {most} positions", hint=f"at most {most} together")


def _expected_labels(task: Task, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The class names in the order of the checkpoint's own head, or in the task's where it has none.

    A head that was trained elsewhere may number the same classes otherwise. Raises `InputError` where it has other
    classes; LABEL_0, LABEL_1 … are no names, and stand for the task's.
    """
    name = class_name(checkpoint.config)
    if task.kind != "classification" or not name.endswith("ForSequenceClassification"):
        return task.labels
    own = tuple(str(checkpoint.config.id2label[k]) for k in sorted(checkpoint.config.id2label))
    if not task.labels:
        return own
    if len(own) != len(task.labels) or all(re.fullmatch(r"LABEL_\d+|\d+", label) for label in own):
        return task.labels  # the numbers of classes are compared where the model is loaded
    if {label.casefold() for label in own} != {label.casefold() for label in task.labels}:
        raise InputError(
            f"the checkpoint's head tells {', '.join(own)}; task {task.name} has {', '.join(task.labels)}",
            hint="correct id2label in its config.json, or use --task classification with the columns named",
        )
    return own


@dataclass(frozen=True)
class _Reader:
    task: Task
    family: Family
    vocabulary: Vocabulary
    options: DataOptions
    how: Any

    def encoded(self, examples: Examples) -> Encoded:
        return encode(
            examples,
            self.task,
            self.vocabulary.tokenizer,
            max_length=self.options.max_length,
            family=self.how,
            vocabulary=self.vocabulary,
        )

    def examples(
        self,
        source: str,
        label_names: tuple[str, ...],
        *,
        limit: int | None = None,
        split: str | None = None,
        renames: bool = False,
    ) -> Examples:
        return read_examples(
            source,
            self.task,
            text_columns=self.options.text_columns,
            label_column=self.options.label_column,
            limit=limit,
            seed=self.options.seed,
            split=split,
            label_names=label_names,
            renames=renames,
        )

    def windows(self, source: str, split: str | None = None) -> Windows:
        column = self.options.text_columns[0] if self.options.text_columns else None
        text = read_text(source, text_column=column, split=split)
        try:
            return lm_windows(
                text,
                self.vocabulary.tokenizer,
                self.options.max_length,
                masked=self.family == "masked",
                vocabulary=self.vocabulary,
            )
        except InputError as error:
            raise InputError(f"{source}: {error.message}", hint=error.hint) from error

    def eval_set(self, examples: Examples, suffix: str, truncated: dict[str, int], split: str) -> EvalSet:
        labels: Sequence[Any] = examples.labels or ()
        shown = examples
        if self.task.kind == "text2text":
            sources, labels = references(examples)
            shown = replace(examples, texts=tuple(sources), labels=None, lines=examples.lines[: len(sources)])
        encoded = self.encoded(replace(shown, labels=None))
        truncated[split] = truncated.get(split, 0) + encoded.truncated
        return EvalSet(examples.source, suffix, shown, encoded.features, labels, None)


def _eval_sets(
    reader: _Reader, sources: Sequence[str], label_names: tuple[str, ...], truncated: dict[str, int], split: str
) -> tuple[EvalSet, ...]:
    if len(sources) > (2 if reader.task.name == "mnli" else 1):
        raise UsageError(f"{len(sources)} files to evaluate task {reader.task.name} on", hint="name one (MNLI: two)")
    # Of a hub data set that names no split of its own.
    splits = (
        reader.task.eval_splits
        if split == "eval"
        else tuple(s.replace("validation", "test") for s in reader.task.eval_splits)
    )
    return tuple(
        reader.eval_set(reader.examples(source, label_names, split=hub_split), suffix, truncated, split)
        for source, hub_split, suffix in zip(sources, splits, ("", "_mm"), strict=False)
    )


def _window_set(source: str, windows: Windows) -> EvalSet:
    return EvalSet(source, "", None, [], (), windows)


def _window_feature(index: int, ids: list[int], family: Family) -> dict[str, Any]:
    feature: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * len(ids), "index": index}
    if family == "causal":
        feature["labels"] = list(ids)
    return feature


def run_set(
    model: Any,
    data: TaskData,
    found: EvalSet,
    options: DataOptions,
    *,
    progress: Progress | None = None,
) -> Run:
    """A model over one evaluation set."""
    shared: dict[str, Any] = {
        "batch_size": options.eval_batch_size,
        "precision": options.precision,
        "progress": progress,
    }
    if found.windows is not None:
        return run_windows(model, data.vocabulary, found.windows, data.family, **shared)
    if data.task.kind == "text2text":
        return run_generation(
            model,
            data.vocabulary,
            found.features,
            family=data.family,
            max_new_tokens=options.max_new_tokens,
            **shared,
        )
    return run_examples(model, data.vocabulary, found.features, data.task, **shared)


def evaluate(model: Any, data: TaskData, options: DataOptions, *, split: str = "eval") -> dict[str, float]:
    """The task's metrics on a split of the data; `{}` where there is none."""
    metrics: dict[str, float] = {}
    for found in getattr(data, split):
        run = run_set(model, data, found, options)
        metrics |= score_set(data, found, run)
    return metrics


def score_set(data: TaskData, found: EvalSet, run: Run) -> dict[str, float]:
    """The metrics of a run over one set; those that MNLI's second set gives are marked `_mm`."""
    task = replace(data.task, metrics=tuple(m for m in data.task.metrics if not m.endswith("_mm")))
    return score(task, data.family, run, found.labels, suffix=found.suffix)
