"""Rows of a .tsv or .csv file."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from mpocli.config.tasks import Task
from mpocli.errors import InputError
from mpocli.train.data.local import filled_lines, raw_lines
from mpocli.train.data.table import Table


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    # Strict, so that a stray quote is an error and does not swallow the rest of the file.
    reader = csv.reader((line for _, line in raw_lines(path)), strict=True)
    start = 1
    try:
        for record in reader:
            if record:
                yield start, record
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{path}: line {start} is not csv ({error})", hint="close the quotes, or write it as .tsv or .jsonl"
        ) from error


def delimited_table(path: Path, source: str, task: Task | None, text_columns: Sequence[str]) -> Table:
    """The rows of a .tsv (quoting off, as in GLUE) or .csv file, whose first line is a header unless it has as many
    fields as the task's files have without one, and names none of the expected columns.

    Raises `InputError` for an empty file, and while the rows are read for one with another number of fields, unless the
    task skips such rows.
    """
    if path.suffix.lower() == ".tsv":
        separator = "tab"
        records: Iterator[tuple[int, list[str]]] = ((at, line.split("\t")) for at, line in filled_lines(path))
    else:
        separator = "comma"
        records = _csv_records(path)
    first = next(records, None)
    if first is None:
        raise InputError(f"{source}: empty", hint="name a file with rows")
    names = tuple(first[1])
    if task and len(names) == len(task.file_columns):
        expected = {name for names_ in task.texts for name in names_} | set(text_columns)
        if not expected & set(names):
            names, records = task.file_columns, chain([first], records)
    skipped: list[int] = []
    skips = task is not None and task.skips_broken_rows

    def pick(columns: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
        places = [names.index(column) for column in columns]
        for line, record in records:
            if len(record) == len(names):
                yield line, tuple([record[place] for place in places])
            elif skips:
                skipped.append(line)
            else:
                raise InputError(
                    f"{source}: line {line} has {len(record)} {separator}-separated fields, {len(names)} were expected",
                    hint=f"a {separator} or a line break stands inside a text: correct the row",
                )

    return Table(source, names, pick, skipped=skipped)
