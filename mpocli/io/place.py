"""Put what was built where it belongs, in place of what was seen there and of nothing else."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

from mpocli.errors import InputError
from mpocli.io.claim import ASIDE, Claim, contents

_IN_THE_WAY = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


def put_into_place(work: Path, own: Claim) -> None:
    """Rename a directory or file to the claimed path; what was seen there is then in the workshop, or gone.

    Raises `InputError` where something else is there by now, which stays.
    """
    path = own.path
    if not own.seen or not os.path.lexists(path):
        _rename_to_nothing(work, path)
    elif _exchange(work, path):
        _check_displaced(work, own, lambda: _exchange(work, path))
    else:
        aside = own.workshop() / ASIDE
        try:
            path.rename(aside)
            _check_displaced(aside, own, lambda: aside.rename(path))
            _rename_to_nothing(work, path)
        finally:  # an interrupt may come anywhere between
            if aside.exists() and not os.path.lexists(path):
                aside.rename(path)


def _rename_to_nothing(work: Path, path: Path) -> None:
    """The system itself sees to it, in one step, that nothing or an empty directory is there."""
    try:
        if work.is_dir():
            work.rename(path)
        else:  # a renaming would replace a file
            os.link(work, path)
    except OSError as error:
        if error.errno in _IN_THE_WAY:
            raise _appeared(path) from error
        if work.is_dir() or os.path.lexists(path):
            raise
        work.rename(path)  # a file system without links


def _check_displaced(displaced: Path, own: Claim, undo: Callable[[], object]) -> None:
    """Looked at once it is out of everybody's way: between a look and a renaming others could still write there."""
    if contents(displaced) != own.seen:
        undo()
        raise _appeared(own.path)


def _appeared(path: Path) -> InputError:
    return InputError(
        f"{path}: something was written there since this run began, and stays as it is", hint="choose another ‹out›"
    )


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step, where the system can (Linux): no kill then falls between two renames."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_working_directory, exchange = -100, 2
    done: int = renameat2(at_working_directory, os.fsencode(a), at_working_directory, os.fsencode(b), exchange)
    return done == 0
