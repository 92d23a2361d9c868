"""Rows of a file with one JSON object a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from mpocli.errors import InputError
from mpocli.io.json_file import parse_json
from mpocli.train.data.local import filled_lines
from mpocli.train.data.table import Table, listed


def json_lines_table(path: Path, source: str) -> Table:
    """The rows of a file of JSON objects, one a line; the first one's keys are the columns.

    Raises `InputError` for an empty file, and while the rows are read for a line that is no object or lacks a key.
    """

    def objects() -> Iterator[tuple[int, dict[str, Any]]]:
        for line, text in filled_lines(path):
            try:
                row = parse_json(text, halves=True)  # what is read of a row is looked at later, and only that
            except ValueError as error:
                reason = getattr(error, "msg", error)
                raise InputError(
                    f"{source}: line {line} is not JSON that can be read ({reason})",
                    hint="one object per line is expected",
                ) from error
            if not isinstance(row, dict):
                raise InputError(
                    f"{source}: line {line} is a JSON {type(row).__name__}, not an object",
                    hint="one object per line is expected",
                )
            yield line, row

    rows = objects()
    first = next(rows, None)
    if first is None:
        raise InputError(f"{source}: empty", hint="name a file with rows")

    def pick(columns: Sequence[str]) -> Iterator[tuple[int, tuple[Any, ...]]]:
        for line, row in chain([first], rows):
            try:
                yield line, tuple([row[column] for column in columns])
            except KeyError as error:
                raise InputError(
                    f"{source}: line {line} has no {error.args[0]}; it has: {listed(tuple(row))}",
                    hint="every line needs the same keys",
                ) from error

    return Table(source, tuple(first[1]), pick)
