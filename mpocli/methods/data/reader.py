"""Files of a task, read and encoded: examples or windows, and what is right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpocli.config.data import DataOptions
from mpocli.config.tasks import Task
from mpocli.errors import InputError, UsageError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.config import class_name
from mpocli.train.data.encode import Encoded, encode
from mpocli.train.data.examples import Examples, read_examples, references
from mpocli.train.data.text import read_text
from mpocli.train.data.vocabulary import Vocabulary
from mpocli.train.data.windows import Windows, lm_windows
from mpocli.train.models import Family


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


@dataclass(frozen=True)
class Reader:
    """Reads and encodes files for a model: `family` is what does the task, `how` the kind of model that examples are
    encoded for."""

    task: Task
    family: Family
    vocabulary: Vocabulary
    options: DataOptions
    how: Family

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


def eval_sets(
    reader: Reader, sources: Sequence[str], label_names: tuple[str, ...], truncated: dict[str, int], split: str
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


def window_set(source: str, windows: Windows) -> EvalSet:
    return EvalSet(source, "", None, [], (), windows)


def window_feature(index: int, ids: list[int], family: Family) -> dict[str, Any]:
    feature: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * len(ids), "index": index}
    if family == "causal":
        feature["labels"] = list(ids)
    return feature


def expected_labels(task: Task, checkpoint: Checkpoint) -> tuple[str, ...]:
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
