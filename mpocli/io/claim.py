"""Claims on outputs: who may write at a path, where it works meanwhile, and what the dead left there."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from mpocli.errors import InputError
from mpocli.io.lock import Lock, take
from mpocli.io.readable import real_path

P = ParamSpec("P")
T = TypeVar("T")

# In a workshop: what stood at the path, between two renames of a system that cannot exchange directories.
ASIDE = "replaced"

# Every entry below a directory: its name, type, size and time of change.
Contents = frozenset[tuple[str, int, int, int]]


@dataclass
class Claim:
    """The right to write at `path`, which nobody else has as long as it is held, and `seen`, what stood there then.

    The workshop, a hidden sibling, is where everything is built that shall not be at `path` yet; it goes with the
    claim.
    """

    path: Path
    lock: Lock
    seen: Contents
    is_building: bool = False
    _workshop: Path | None = field(default=None, repr=False)

    def workshop(self) -> Path:
        """Made when it is first asked for. Raises `OSError`."""
        if self._workshop is None:
            name = f".{self.path.name}.partial"
            # Where nothing may be deleted, the name may stand for someone else's.
            found = self.path.with_name(name if self.lock.is_sure else f"{name}-{secrets.token_hex(4)}")
            found.mkdir()
            self._workshop = found
        return self._workshop

    def release(self) -> None:
        try:
            if self._workshop is not None:
                remove(self._workshop)
        finally:
            self.lock.release()


@dataclass
class _Run:
    """A function under `writes_output`, and what it has claimed."""

    ends: ExitStack
    claims: list[Claim]


_RUN: ContextVar[_Run | None] = ContextVar("_RUN", default=None)


def writes_output(run: Callable[P, T]) -> Callable[P, T]:
    """A function that claims outputs by `claim`, so that they are its own until it returns or raises."""

    @wraps(run)
    def held(*args: P.args, **kwargs: P.kwargs) -> T:
        with ExitStack() as ends:
            token = _RUN.set(_Run(ends, []))
            try:
                return run(*args, **kwargs)
            finally:
                _RUN.reset(token)

    return held


def claim(path: Path) -> Claim:
    """`path` for the rest of the run, from which the dead's leavings are swept. Raises `InputError` while another
    process writes there, and `OSError` where nothing can be written beside it."""
    run, path = _RUN.get(), real_path(path)
    assert run is not None, "outside of a function under writes_output"
    for found in run.claims:
        if found.path == path:
            return found
    made = run.ends.enter_context(claimed(path))
    run.claims.append(made)
    return made


def is_in_a_run() -> bool:
    return _RUN.get() is not None


@contextmanager
def claimed(path: Path) -> Iterator[Claim]:
    """A claim for the block: the run's own, where it has one and does not build there already."""
    path = real_path(path)
    run = _RUN.get()
    own = [found for found in run.claims if found.path == path and not found.is_building] if run else []
    if own:
        yield own[0]
        return
    with _parents(path):
        lock = take(path.with_name(f".{path.name}.lock"))
        if lock is None:
            raise InputError(f"{path}: another process is writing it", hint="wait for its end, or write elsewhere")
        try:
            sweep(path, may_delete=lock.is_sure)
            made = Claim(path, lock, contents(path))
        except BaseException:
            lock.release()
            raise
        try:
            yield made
        finally:
            made.release()


@contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Those that are missing, for the block; they stay if there is something in them then."""
    missing = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()


def contents(path: Path) -> Contents:
    """What is below a directory, or of a file; nothing for a path that is empty or not there."""
    if path.is_dir() and not path.is_symlink():
        below = list(path.rglob("*"))
    else:
        below = [path] if os.path.lexists(path) else []
    return frozenset(_entry(path, entry) for entry in below)


def digest(path: Path) -> str:
    """One word for what is at a path, to compare with later."""
    return hashlib.sha256(repr(sorted(contents(real_path(path)))).encode()).hexdigest()


def _entry(path: Path, entry: Path) -> tuple[str, int, int, int]:
    found = entry.lstat()
    is_directory = entry.is_dir() and not entry.is_symlink()
    size, changed = (0, 0) if is_directory else (found.st_size, found.st_mtime_ns)
    return str(entry.relative_to(path)), found.st_mode, size, changed


def sweep(path: Path, *, may_delete: bool) -> None:
    """Put back what a killed run had moved aside, and delete what else it left. Only under the path's lock."""
    for left in path.parent.glob(f".{glob_escaped(path.name)}.partial*"):
        aside = left / ASIDE
        if aside.exists() and not os.path.lexists(path):
            aside.rename(path)
        # A name of its own is that of a run without a lock: it may still be alive.
        if may_delete and left.name == f".{path.name}.partial":
            remove(left)


def glob_escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def remove(path: Path) -> None:
    """Delete a directory or file, also where an interrupt comes in the middle of that."""
    try:
        _remove(path)
    except KeyboardInterrupt:
        _remove(path)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def discard(directory: Path) -> None:
    """Delete a directory that means something as long as it is there: it is moved away first, so that no kill leaves
    half of it under its name. In a run that has a claim beside it, what a kill leaves is swept with the claim's."""
    if not directory.is_dir():
        return
    run = _RUN.get()
    beside = [found for found in run.claims if found.path.parent == real_path(directory.parent)] if run else []
    name = f"{directory.name}.discarded"
    try:
        away = beside[0].workshop() / name if beside else directory.with_name(name)
        remove(away)
        directory.rename(away)
    except OSError:  # a disk without room for a name
        away = directory
    remove(away)
