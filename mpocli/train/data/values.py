"""Texts and scores, checked row by row."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from mpocli.errors import InputError
from mpocli.train.data.table import Locations, short


def texts_of(values: Sequence[Any], column: str, where: Locations) -> tuple[str, ...]:
    """The values of a column of texts; `InputError` for one that is not a text."""
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise InputError(
                f"{where(index)}: column {column} holds {short(json.dumps(value, default=str))}, not a text",
                hint="name another column, or remove the row",
            )
        check_text(value, where(index))
    return tuple(values)


def check_text(text: str, place: str) -> None:
    """`InputError` for half of a surrogate pair (JSON can spell it), which no tokenizer takes and no file holds."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}: half of a character (\\u{ord(text[error.start]):04x} without its other half)",
            hint="write the whole character, or remove the row",
        ) from error


def scores_of(values: Sequence[Any], where: Locations, bounds: tuple[float, float] | None) -> tuple[float, ...]:
    """The values of a column of scores; `InputError` for one that is not a finite number between the bounds."""
    scores = []
    low, high = bounds or (-math.inf, math.inf)
    for index, value in enumerate(values):
        number = number_of(value)
        if number is None or not math.isfinite(number):
            raise InputError(f"{where(index)}: score {short(value)!r} is not a finite number", hint="correct the row")
        if not low <= number <= high:
            raise InputError(
                f"{where(index)}: score {number:g} is outside {low:g} to {high:g}",
                hint="is this a test set without labels, or another scale? ‹task› regression takes any",
            )
        scores.append(number)
    return tuple(scores)


def number_of(value: Any) -> float | None:
    """The number that a value is or spells, None where there is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
