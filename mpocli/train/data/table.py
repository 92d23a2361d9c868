"""A source of rows once opened, and how its rows and columns are spoken of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """An opened source: `pick(columns)` iterates once over (line, values of these columns).

    `names` are its columns, `classes` the class names that a column brings along.
    """

    source: str
    names: tuple[str, ...]
    pick: Callable[[Sequence[str]], Iterator[tuple[int, tuple[Any, ...]]]]
    unit: str = "line"
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)  # lines left out, known once the rows are read


@dataclass(frozen=True)
class Locations:
    """Where each row stands in its source, for messages: called with a row's index, `data.csv: line 7`."""

    source: str
    unit: str
    lines: Sequence[int]

    def __call__(self, index: int) -> str:
        return f"{self.source}: {self.unit} {self.lines[index]}"


def listed(names: Sequence[str]) -> str:
    """The first twenty names on one line, and how many more there are."""
    shown = ", ".join(short(name) if name == name.strip() and name else repr(name) for name in names[:20])
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown


def short(value: object) -> str:
    """A value on one line of at most 40 characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."
