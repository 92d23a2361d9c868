"""Where two JSON objects that should say the same differ, leaf by leaf."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class _Absent:
    """The value on a side that has no such leaf."""

    def __repr__(self) -> str:
        return "nothing"


_ABSENT = _Absent()


@dataclass(frozen=True)
class Difference:
    """One leaf: where it is, what is claimed of it and what is so."""

    where: str
    claimed: Any
    found: Any

    @property
    def unknown(self) -> bool:
        """Whether only the claim has it."""
        return self.found is _ABSENT

    @property
    def unclaimed(self) -> bool:
        return self.claimed is _ABSENT


def differences(claimed: Any, found: Any, where: str = "") -> Iterator[Difference]:
    """Every leaf that is not the same: numbers by value, everything else by type too. Objects in lists that have a
    `name` are told apart by it.

    >>> [str(d.where) for d in differences({"a": [{"name": "x", "n": 1}]}, {"a": [{"name": "x", "n": True}]})]
    ['a[x].n']
    """
    if isinstance(claimed, Mapping) and isinstance(found, Mapping):
        for key in [*claimed, *(key for key in found if key not in claimed)]:
            place = f"{where}.{key}" if where else str(key)
            yield from differences(claimed.get(key, _ABSENT), found.get(key, _ABSENT), place)
    elif _is_list(claimed) and _is_list(found):
        for k in range(max(len(claimed), len(found))):
            a, b = (side[k] if k < len(side) else _ABSENT for side in (claimed, found))
            name = b.get("name") if isinstance(b, Mapping) else None
            yield from differences(a, b, f"{where}[{k if name is None else name}]")
    elif not _is_same(claimed, found):
        yield Difference(where, claimed, found)


def leaves(data: Any) -> int:
    """How many there are."""
    if isinstance(data, Mapping):
        return sum(leaves(value) for value in data.values())
    return sum(map(leaves, data)) if _is_list(data) else 1


def _is_list(data: Any) -> bool:
    return isinstance(data, Sequence) and not isinstance(data, str)


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a == b
    return type(a) is type(b) and bool(a == b)
