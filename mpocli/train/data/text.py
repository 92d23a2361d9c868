"""The text of a language-modelling source."""

from __future__ import annotations

from pathlib import Path

from mpocli.errors import InputError
from mpocli.train.data.columns import require_column
from mpocli.train.data.local import is_local, not_utf8, readable_file
from mpocli.train.data.source import open_source
from mpocli.train.data.table import Locations
from mpocli.train.data.values import texts_of


def read_text(source: str, *, text_column: str | None = None, split: str | None = None) -> str:
    """The text of a language-modelling source: a .txt file as it stands (CRLF as LF), else the rows of the column
    `text` joined by newlines (a row's own last newline counts as that newline, as hub copies of wikitext have it).

    Raises `InputError` for a source that is absent, undecodable or blank, or has no such column.
    """
    if is_local(source) and Path(source).suffix.lower() == ".txt":
        path = Path(source)
        data = readable_file(path).read_bytes()
        try:
            text = data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise not_utf8(path, data.count(b"\n", 0, error.start) + 1, error) from error
    else:
        column = text_column or "text"
        table = open_source(source, None, (), split)
        require_column(table, (column,), "text_column")
        lines, rows = [], []
        for line, row in table.pick([column]):
            lines.append(line)
            rows.append(row[0])
        texts = texts_of(rows, column, Locations(source, table.unit, lines))
        text = "".join(f"{row.removesuffix(chr(10))}\n" for row in texts)
    if not text.strip():
        raise InputError(f"{source}: no text in it", hint="name a file with text")
    return text
