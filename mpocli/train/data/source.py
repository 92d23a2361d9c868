"""Opening a source: a local file by its suffix, else a hub data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mpocli.config.tasks import Task
from mpocli.errors import InputError
from mpocli.train.data.arrow import hub_table, parquet_table
from mpocli.train.data.delimited import delimited_table
from mpocli.train.data.json_lines import json_lines_table
from mpocli.train.data.local import FORMATS, filled_lines, is_local, readable_file
from mpocli.train.data.table import Table


def open_source(source: str, task: Task | None, text_columns: Sequence[str], split: str | None) -> Table:
    """The table of a file or hub data set; `task` and `text_columns` tell whether a .tsv or .csv file has a header.

    Raises `InputError` for a source that is absent, empty or of no format that is read.
    """
    if not is_local(source):
        return hub_table(source, split)
    path = readable_file(Path(source))
    suffix = path.suffix.lower()
    if suffix in (".tsv", ".csv"):
        return delimited_table(path, source, task, text_columns)
    if suffix in (".jsonl", ".json"):
        return json_lines_table(path, source)
    if suffix == ".parquet":
        return parquet_table(path, source)
    if suffix == ".txt":
        return Table(source, ("text",), lambda names: ((at, (line,) * len(names)) for at, line in filled_lines(path)))
    raise InputError(f"{source}: {suffix or 'no suffix'} is no format that is read", hint=f"use {', '.join(FORMATS)}")
