"""Room for intermediate results, which no end of a run leaves behind for good."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mpocli.errors import InputError
from mpocli.io.claim import claimed, remove
from mpocli.io.disk import is_no_room, reason
from mpocli.io.lock import take

_PREFIX = "mpocli-scratch-"


@contextmanager
def scratch_directory(output: Path | None) -> Iterator[Path]:
    """A directory for the block: in the workshop of an output, which goes with it and is swept with it; without one
    in the system's temporary directory, under a lock of its own, where every run sweeps what the dead left.

    Raises `InputError` where there is no room, in the block too.
    """
    try:
        with ExitStack() as ends:
            if output is None:
                place = ends.enter_context(_temporary())
            else:
                place = ends.enter_context(claimed(output)).workshop() / "scratch"
                place.mkdir()
                ends.callback(remove, place)
            yield place
    except Exception as error:
        if not is_no_room(error):
            raise
        where = tempfile.tempdir if output is None else output.parent
        raise InputError(
            f"{where}: intermediate results cannot be written there ({reason(error)})",
            hint="free some space" if output else "free some space, or name another place in TMPDIR",
        ) from error


@contextmanager
def _temporary() -> Iterator[Path]:
    try:
        base = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise InputError("no temporary directory can be written", hint="name one in TMPDIR") from error
    for left in base.glob(f"{_PREFIX}*.lock"):
        _sweep(left)
    place = base / f"{_PREFIX}{secrets.token_hex(4)}"
    lock = take(place.with_suffix(".lock"))
    assert lock is not None, "a new name"
    try:
        place.mkdir(mode=0o700)
        yield place
    finally:
        try:
            remove(place)
        finally:
            lock.release()


def _sweep(left: Path) -> None:
    """A lock that can be taken is a dead process's. Others' are theirs to sweep, and a link is nobody's."""
    place = left.with_suffix("")
    if any(path.is_symlink() or (path.exists() and not _is_ours(path)) for path in (left, place)):
        return
    try:
        lock = take(left)
    except OSError:
        return
    if lock is None:
        return
    if lock.is_sure:
        remove(place)
    lock.release(keep=not lock.is_sure)


def _is_ours(path: Path) -> bool:
    return not hasattr(os, "getuid") or path.stat().st_uid == os.getuid()
