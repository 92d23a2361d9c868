"""The format of the manifest: its names, its version, and whether a file says what was understood of it."""

from __future__ import annotations

from typing import Any

from mpocli.errors import InputError
from mpocli.io.differences import differences

MANIFEST = "mpo.json"
QUANT_METHOD = "mpo"
FORMAT = "mpocli"
SCHEMA_VERSION = 1
RESTORE = "restore config.json and mpo.json from the directory that mpocli wrote"


def check_same(file: str, what: str, said: Any, meant: Any) -> None:
    """`InputError` where a file says something else than what was understood of it: a number that is another in its
    own other fields, a field that nobody knows."""
    for difference in differences(said, meant):
        if difference.unclaimed:  # optional, or of a later mpocli's writing
            continue
        place = f" at {difference.where}" if difference.where else ""
        claim = f"{file}: {what} says {_short(difference.claimed)}{place}"
        if difference.unknown:
            raise InputError(f"{claim}, a field that is not known", hint=f"update mpocli, or {RESTORE}")
        raise InputError(f"{claim}, and by all else it is {_short(difference.found)}", hint=RESTORE)


def check_schema(where: str, version: object) -> None:
    """`InputError` for a version that this mpocli does not read. There is one so far: no older one is migrated."""
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise InputError(f"{where}: schema_version is {version!r}, a positive integer was expected")
    if version > SCHEMA_VERSION:
        raise InputError(
            f"{where}: schema_version {version}, this mpocli reads up to {SCHEMA_VERSION}", hint="update mpocli"
        )


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:99]}…"
