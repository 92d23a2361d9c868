"""Texts and labels of a local file or a hub data set, every row checked against its task."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpocli.config.tasks import Task
from mpocli.errors import InputError, UsageError
from mpocli.train.data.columns import choose_columns
from mpocli.train.data.labels import classes_of
from mpocli.train.data.source import open_source
from mpocli.train.data.table import Locations
from mpocli.train.data.values import scores_of, texts_of

Labels = tuple[int, ...] | tuple[float, ...] | tuple[str, ...]


@dataclass(frozen=True)
class Examples:
    """The rows of one source, in its order.

    `labels` are class indices into `label_names`, scores, or target texts, as the task is; None where none were
    asked for. `lines` count from 1: physical lines of a text file (of a record's first line where it has several),
    rows elsewhere. `skipped` counts the rows left out as broken, where the task says so.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: Labels | None
    lines: tuple[int, ...]
    source: str
    label_names: tuple[str, ...] = ()
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.texts)


def read_examples(
    source: str,
    task: Task,
    *,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    split: str | None = None,
    needs_labels: bool = True,
    label_names: Sequence[str] = (),
    renames: bool = False,
) -> Examples:
    """Read and check every row of `source`, then keep `limit` of them: a seeded random subset, in file order.

    `source` is a file (.tsv with quoting off as in GLUE, .csv, .jsonl, .parquet, .txt with one text a line) or a hub
    data set: NAME, NAME:CONFIG or NAME:CONFIG:SPLIT; `split` (default train) is for a hub name that gives none.
    `limit` counts rows: a source with several references may lose some of them.
    `label_names` are the classes of the model or of the training set; without them they are the task's, or the sorted
    distinct labels. A label may be a class's name or its integer. With `renames` the classes of a model that has no
    names for them (LABEL_0, LABEL_1) take those of the rows. With `needs_labels=False` labels are never looked at.

    Raises `UsageError` for options that cannot be meant, and `InputError` (one line: source, line, the numbers)
    for a source that is absent, empty, undecodable or ragged, a column that is missing, and a label that is not
    among the task's or not a finite number.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"‹limit› {limit}: at least one row is needed")
    table = open_source(source, task, text_columns, split)
    columns, label = choose_columns(table, task, text_columns, label_column, needs_labels)

    wanted = [*columns, label] if label else columns
    lines: list[int] = []
    rows: list[tuple[Any, ...]] = []
    for line, row in table.pick(wanted):
        lines.append(line)
        rows.append(row)
    if not rows:
        raise InputError(f"{source}: no rows", hint="the file is empty, or has nothing but a header")

    where = Locations(source, table.unit, lines)
    fields = list(zip(*rows, strict=True))
    texts = [texts_of(values, name, where) for values, name in zip(fields, columns, strict=False)]
    labels: Labels | None = None
    names: tuple[str, ...] = ()
    if label and task.kind == "classification":
        labels, names = classes_of(
            fields[-1], where, task.labels, table.classes.get(label, ()), tuple(label_names), renames
        )
    elif label and task.kind == "regression":
        labels = scores_of(fields[-1], where, task.score_range)
    elif label:
        labels = texts_of(fields[-1], label, where)

    pairs = texts[1] if len(texts) == 2 else None
    examples = Examples(texts[0], pairs, labels, tuple(lines), source, names, len(table.skipped))
    if limit is None or limit >= len(examples):
        return examples
    return take(examples, sorted(random.Random(seed).sample(range(len(examples)), limit)))


def take(examples: Examples, indices: Sequence[int]) -> Examples:
    """The rows at `indices`, in that order."""
    labels: Any = None if examples.labels is None else tuple(examples.labels[i] for i in indices)
    return replace(
        examples,
        texts=tuple(examples.texts[i] for i in indices),
        pairs=None if examples.pairs is None else tuple(examples.pairs[i] for i in indices),
        labels=labels,
        lines=tuple(examples.lines[i] for i in indices),
    )


def split_off(examples: Examples, fraction: float = 0.1, seed: int = 0) -> tuple[Examples, Examples]:
    """`(rest, held_out)`: a seeded share of the rows, rounded and at least one, both parts in file order.

    Rows with the same input go to one side, so that nothing is selected on what was trained on; the held-out part
    may be larger by one such group. Raises `InputError` where there are fewer than two distinct inputs.
    """
    assert 0 < fraction < 1, fraction
    groups: dict[tuple[str, str], list[int]] = {}
    for index, key in enumerate(zip(examples.texts, examples.pairs or examples.texts, strict=True)):
        groups.setdefault(key, []).append(index)
    if len(groups) < 2:
        raise InputError(
            f"{examples.source}: {len(groups)} distinct input in {len(examples)} rows, 2 are needed to hold some out",
            hint="give more rows, or an evaluation set of its own",
        )
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    target = max(1, round(fraction * len(examples)))
    held: list[int] = []
    for group in order[:-1]:  # the last group stays, so that the rest is never empty
        held += group
        if len(held) >= target:
            break
    inside = set(held)
    rest = [index for index in range(len(examples)) if index not in inside]
    return take(examples, rest), take(examples, sorted(held))


def references(examples: Examples) -> tuple[list[str], list[list[str]]]:
    """Distinct sources in order of appearance and the targets of each, as multi-reference BLEU counts samples."""
    assert examples.labels is not None
    found: dict[str, list[str]] = {}
    for text, target in zip(examples.texts, examples.labels, strict=True):
        found.setdefault(text, []).append(str(target))
    return list(found), list(found.values())
