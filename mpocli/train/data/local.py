"""Local files of rows: whether one is meant, whether it can be read, and its lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mpocli.errors import InputError
from mpocli.io.readable import is_there, why_unreadable

FORMATS = (".tsv", ".csv", ".jsonl", ".json", ".txt", ".parquet")


def check_source(source: str) -> None:
    """`InputError` for a file that is not there; hub data sets are not looked for yet."""
    if is_local(source):
        readable_file(Path(source))


def is_local(source: str) -> bool:
    """Whether a file is meant: it is there, or it looks like one and not like NAME or OWNER/NAME."""
    path = Path(source)
    return (
        is_there(path)
        or path.suffix.lower() in FORMATS
        or source.startswith(("/", ".", "~"))
        or source.partition(":")[0].count("/") > 1
    )


def readable_file(path: Path) -> Path:
    """The path itself; `InputError` where it is no file that can be read."""
    why = why_unreadable(path)
    if why == "is a directory":
        raise InputError(f"{path}: is a directory", hint=f"name one file in it: {', '.join(FORMATS)}")
    if why == "does not exist":
        raise InputError(f"{path}: no such file", hint="check the path")
    if why:
        raise InputError(f"{path}: {why}", hint="copy it to a file that can be read")
    return path


def not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> InputError:
    """The error to raise over a line with bytes that are no UTF-8."""
    return InputError(
        f"{path}: line {line} is not UTF-8 (byte 0x{error.object[error.start]:02x})",
        hint="convert the file to UTF-8 first",
    )


def raw_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end), broken at `\\n` alone: str.splitlines would break texts at form feeds and
    Unicode separators. `InputError` for a line that is not UTF-8."""
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise not_utf8(path, number, error) from error
            yield number, line.removeprefix("\ufeff") if number == 1 else line


def filled_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end), blank lines left out."""
    return ((number, line.rstrip("\r\n")) for number, line in raw_lines(path) if line.strip())
