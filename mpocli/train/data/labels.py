"""Class labels: which names there are, and which class a row is of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from mpocli.errors import InputError
from mpocli.train.data.table import Locations, listed, short
from mpocli.train.data.values import check_text, number_of


def classes_of(
    values: Sequence[Any],
    where: Locations,
    canonical: tuple[str, ...],
    column: tuple[str, ...],
    given: tuple[str, ...],
    renames: bool,
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Class indices of the rows, and the class names they count in.

    A class goes by its name or by its integer, which counts in the column's own list (hub data sets carry one) or in
    the task's. It is then found by name among the names to be used, which may stand in another order (`given`, a
    model's); only where the two lists have no name in common (LABEL_0, LABEL_1) by its place.
    """
    for index, value in enumerate(values):
        if value is None or not str(value).strip():
            raise InputError(f"{where(index)}: no label", hint="correct or remove the row")
        if not isinstance(value, str | int | float | Decimal):  # a list of labels, an object, a date
            kind = {"list": "a list", "dict": "an object"}.get(type(value).__name__, f"a {type(value).__name__}")
            raise InputError(
                f"{where(index)}: label {short(value)} is {kind}, and a class is one name or number",
                hint="give each row one label, or choose another ‹label_column›",
            )
        check_text(str(value), where(index))
    texts = [str(value).strip() for value in values]
    if column:  # its values are integers; those outside the list (-1: unlabelled) stay, and are refused below
        own = {str(number): name for number, name in enumerate(column)}
        texts = [own.get(text, text) for text in texts]
    if given and not canonical and all(_NAMELESS.fullmatch(name) for name in given):
        given = _named(texts, where, column, given, renames)
    names = given or canonical or column or _inferred(texts, where)
    known: dict[str, int] = {}
    for index, text in enumerate(texts):
        if text not in known:
            position = _class_index(text, names, column or canonical)
            if position is None:
                raise InputError(
                    f"{where(index)}: label {short(text)!r} is not one of the {len(names)}: {listed(names)}",
                    hint="correct the row, or choose another ‹label_column›; test sets often come without labels",
                )
            known[text] = position
    return tuple([known[text] for text in texts]), names


_NAMELESS = re.compile(r"LABEL_\d+")


def _named(
    texts: Sequence[str], where: Locations, column: tuple[str, ...], given: tuple[str, ...], renames: bool
) -> tuple[str, ...]:
    """The names of a head that has none: as given for rows labelled by number, else the rows' own where it is
    trained on them. `InputError` where nothing says which class is which."""
    if all(_class_index(text, given, column) is not None for text in set(texts)):
        return given
    own = column or _inferred(texts, where)
    if not renames or len(own) != len(given):
        problem = "nothing says which is which" if len(own) == len(given) else "the numbers differ"
        raise InputError(
            f"{where.source}: {len(own)} classes ({listed(own)}), and the model's head has {len(given)} without names "
            f"({listed(given)}): {problem}",
            hint="name the head's classes in id2label of its config.json, or label the rows by number",
        )
    return own


def _class_index(text: str, names: tuple[str, ...], numbered: tuple[str, ...]) -> int | None:
    """The index among `names` of a label, which may be a name or a number among the `numbered`; None where unknown."""
    found = _by_name(text, names)
    if found is not None:
        return found
    place = _by_name(text, numbered)
    if place is None:
        number = number_of(text)
        if number is None or not number.is_integer():
            return None
        place = int(number)
    if any(number_of(name) is not None for name in names):  # classes that are numbers go by name alone
        return _by_name(str(place), names)
    if any(_by_name(name, names) is not None for name in numbered):
        return _by_name(numbered[place], names) if 0 <= place < len(numbered) else None
    return place if 0 <= place < len(names) else None


def _by_name(text: str, names: tuple[str, ...]) -> int | None:
    """The index of a name: spelled the same, or the only one that differs in case alone."""
    if text in names:
        return names.index(text)
    folded = [index for index, name in enumerate(names) if name.casefold() == text.casefold()]
    return folded[0] if len(folded) == 1 else None


def _inferred(values: Sequence[str], where: Locations) -> tuple[str, ...]:
    """The distinct labels in order, by number where all are numbers."""
    distinct = set(values)
    numbers = {text: number_of(text) for text in distinct}
    fractions = [text for text, number in numbers.items() if number is not None and not number.is_integer()]
    if fractions:
        raise InputError(
            f"{where.source}: label {short(min(fractions))!r} is no class but a number",
            hint="use ‹task› regression, or choose another ‹label_column›",
        )
    if len(distinct) < 2:
        raise InputError(
            f"{where.source}: {len(distinct)} class ({listed(sorted(distinct))}) in {len(values)} rows, 2 are needed",
            hint="choose another ‹label_column›",
        )
    if None not in numbers.values():
        return tuple(sorted({str(int(number)) for number in numbers.values() if number is not None}, key=int))
    return tuple(sorted(distinct))
