"""JSON that nobody vouches for: bounded in size, depth and digits, its texts real text, or refused in one line.

Whatever passes can be copied, compared, printed and written again without a surprise, by us or by transformers, which
reads the same files once more with no check at all.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mpocli.errors import InputError
from mpocli.io.readable import why_unreadable

# The tokenizers of the largest vocabularies take 35 MB, the index of a thousand shards 20.
MOST_BYTES = 1 << 28
DEEPEST = 64
# Tokenizers write "no limit" as an integer of 31 digits.
MOST_DIGITS = 100
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


def read_json(path: Path, *, strict: bool = False) -> dict[str, Any]:
    """A JSON object from a file; `InputError` where it is absent, broken or something else, and with `strict` where an
    object in it says a thing twice, or a number is none."""
    why = why_unreadable(path)
    if why:
        raise InputError(f"{path}: {why}", hint=_AGAIN)
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise InputError(f"{path}: {size:,} bytes of JSON, {MOST_BYTES:,} are read at most", hint=_AGAIN)
        data = parse_json(path.read_bytes().decode("utf-8"), strict=strict)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not readable as JSON ({error})", hint=_AGAIN) from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: a JSON object was expected, not a {type(data).__name__}", hint=_AGAIN)
    return data


_AGAIN = "download or write the file again"


def parse_json(text: str, *, halves: bool = False, strict: bool = False) -> Any:
    """What a JSON text says.

    Raises `ValueError`, its message one short line, for a text that is not JSON or that is nested deeper than
    `DEEPEST`, a number of more than `MOST_DIGITS` digits or beyond the floating-point numbers, and (but for `halves`) a
    text with half of a surrogate pair. With `strict` also for an object that has a key twice, of which others would
    take the first, and for NaN and Infinity, which JSON has not (Python writes them, so that configs have them).

    >>> parse_json('{"a": [1, 2.5]}')
    {'a': [1, 2.5]}
    >>> parse_json("1e999")
    Traceback (most recent call last):
    ValueError: the number 1e999 is beyond the floating-point numbers
    """
    try:
        more: dict[str, Any] = {"object_pairs_hook": _unique, "parse_constant": _constant} if strict else {}
        data = json.loads(text, parse_int=_integer, parse_float=_number, **more)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_depth(data)
    if not halves and _SURROGATE.search(text):
        _check_text(data)
    return data


_TOO_DEEP = f"nested deeper than {DEEPEST} levels"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)[:60]!r} is there twice")
    return found


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is beyond the floating-point numbers")
    return number


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(DEEPEST):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _children(value: Any) -> Iterable[Any]:
    """The containers in a container."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [child for child in inside if isinstance(child, dict | list)]


def _check_text(data: Any) -> None:
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise ValueError(f"the text has half of a character (\\u{half:04x} without its other half)") from None
