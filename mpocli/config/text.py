"""What users write for an option, and the value that it stands for."""

from __future__ import annotations

import re

from mpocli.errors import InputError, UsageError
from mpocli.mpo.shape import SiteShape

# The parts of a model that `--layers` names.
ROLES = ("embedding", "attention", "ffn", "pooler", "head")
Shapes = tuple[tuple[str, SiteShape], ...]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(text: str, option: str) -> int:
    """`5GB`, `300MiB` or `1000` as bytes; `UsageError` for anything else.

    >>> size("5GB", "--max-shard-size")
    5000000000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*((?:[KMG]i?)?B)?\s*", text, flags=re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"{option} {text!r} is no size", hint="write it as 5GB, 300MB or 64MiB")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def share(text: str, option: str) -> float:
    """`0.5` or `50%`; `UsageError` for what is no number.

    >>> share("30%", "--ratio"), share("0.3", "--ratio")
    (0.3, 0.3)
    """
    number = text.strip()
    try:
        return float(number[:-1]) / 100 if number.endswith("%") else float(number)
    except ValueError:
        raise UsageError(f"{option} {text!r} is no share", hint="write it as 0.5 or 50%") from None


def roles(text: str, option: str) -> tuple[str, ...]:
    """`attention,ffn` as roles; `UsageError` for a word that is none."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [role for role in found if role not in ROLES]
    if unknown or not found:
        raise UsageError(
            f"{option} {text!r}: {(unknown or ['nothing'])[0]!r} is no role", hint=f"the roles are {', '.join(ROLES)}"
        )
    return found


def shape(text: str, option: str) -> tuple[str, SiteShape]:
    """`GLOB=3,4,4,4,4x4,4,4,4,3` as glob and site shape; `UsageError` where it cannot be read."""
    glob, equals, dims = text.rpartition("=")
    if not equals or not glob:
        raise UsageError(
            f"{option} {text!r} is not GLOB=ROWSxCOLUMNS", hint=f"write {option} '*attention*=3,4,4,4,4x4,4,4,4,3'"
        )
    try:
        return glob, SiteShape.parse(dims)
    except InputError as error:
        raise UsageError(f"{option} {text!r}: {error.message}", hint=error.hint) from error


def written(shapes: Shapes) -> list[str]:
    """As they are written on the command line."""
    return [f"{glob}={shape}" for glob, shape in shapes]
