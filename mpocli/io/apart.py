"""What a command writes lies apart from what it reads, and each of its outputs apart from the others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mpocli.errors import InputError
from mpocli.io.readable import real_path

Paths = Mapping[str, "str | Path | Sequence[str | Path] | None"]


def check_apart(writes: Paths, reads: Paths) -> None:
    """`InputError` where a path that is written is, holds or lies in one that is read or also written.

    Both go by what a user chose them with, as an option, or by what they are: "the input". A file that is read may have
    neighbours, a directory (a model) may not get any: nothing is written into it. Names that are no paths, as those of
    hub models, are passed over.
    """
    read = list(_existing(reads))
    written = [(option, path, real_path(path)) for option, path in _listed(writes)]
    for number, (option, path, place) in enumerate(written):
        for other_option, other, other_place in (*read, *written[:number]):
            if _same_file(place, other_place):
                problem = f"{path}: {option} would overwrite {other_option} {other}"
            elif holds(place, other_place) or holds(other_place, place):
                problem = f"{path}: {option} and {other_option} {other} lie inside each other"
            else:
                continue
            raise InputError(problem, hint="" if option.startswith("the ") else f"choose another {option}")


def _listed(paths: Paths) -> Iterator[tuple[str, Path]]:
    for option, value in paths.items():
        several = [value] if isinstance(value, (str, Path)) or value is None else value
        for one in several:
            if one is not None:
                yield option, Path(one)


def _existing(paths: Paths) -> Iterator[tuple[str, Path, Path]]:
    for option, path in _listed(paths):
        expanded = path.expanduser()
        try:
            if os.path.lexists(expanded):
                yield option, path, real_path(expanded)
        except (OSError, ValueError):  # a name that is no path
            continue


def holds(directory: Path, other: Path) -> bool:
    """Whether `other` is the directory, or lies in it; both resolved."""
    return directory == other or directory in other.parents


def _same_file(a: Path, b: Path) -> bool:
    """Under whatever names: a hard link is one, capital letters where the file system does not tell them apart."""
    try:
        return a.samefile(b) and not a.is_dir()
    except OSError:
        return False
