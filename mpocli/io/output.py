"""Output directories that appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from mpocli.errors import InputError
from mpocli.io.apart import Paths, check_apart, holds
from mpocli.io.claim import ASIDE, Claim, claim, claimed, contents, is_in_a_run, remove
from mpocli.io.disk import is_no_room, reason
from mpocli.io.model_files import foreign_files

_IN_THE_WAY = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


def check_output(
    path: Path,
    reads: Path | Paths | None,
    *,
    overwrite: bool,
    claims: bool = True,
    writes: Paths | None = None,
) -> None:
    """`InputError` unless `path` can become an output directory: absent, empty, or replaceable by request.

    `reads` are the paths that the command reads by option (or the model's alone, None where it has yet to be
    downloaded), `writes` those that it writes beside `--out`. In a run under `writes_output` the path is then the
    run's own, and what stands there is remembered: something else is not replaced. What a killed run had moved aside
    is back at `path` when it is looked at. Without `claims` another process of this run has done all that.
    """
    found = reads if isinstance(reads, Mapping) else {"the input": reads}
    check_apart({"--out": path, **(writes or {})}, found)
    resolved = path.resolve()
    if resolved.is_mount():
        raise InputError(f"{path}: is a mount point, which cannot be replaced", hint="name a directory in it")
    if claims:
        try:
            if is_in_a_run():
                claim(path)
            else:
                with claimed(path):
                    pass
        except OSError as error:
            raise _unwritable(path, error) from error
    _check_replaceable(path, overwrite=overwrite)


def _check_replaceable(path: Path, *, overwrite: bool) -> None:
    if not path.is_dir():
        if path.exists():
            raise InputError(f"{path}: exists and is not a directory", hint="choose another --out")
        return
    if holds(path.resolve(), Path.cwd()):
        raise InputError(
            f"{path}: the working directory lies in it, and would be deleted from under the shell",
            hint="choose another --out, or run mpocli from elsewhere",
        )
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{path}: exists and is not empty", hint="choose another --out, or pass --overwrite")
    if not (path / "config.json").is_file():
        raise InputError(
            f"{path}: is not a model directory (no config.json), so --overwrite will not replace it",
            hint="choose another --out",
        )
    foreign = foreign_files(path)
    if foreign:
        names = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise InputError(
            f"{path}: holds {names}, which no model needs and --overwrite would delete",
            hint="move them elsewhere, or choose another --out",
        )


@contextmanager
def output_directory(path: Path) -> Iterator[Path]:
    """A directory beside `path` to build in; renamed to `path` at the end, removed on any failure.

    Whatever stood at `path` when it was claimed is replaced only then, and nothing else ever: what has appeared or
    changed since stays, and the run ends with `InputError`. A kill leaves the old directory as it was; the next run
    with the same output sweeps the remains up. Raises `InputError` too where the disk is full or not writable.
    """
    path = path.resolve()
    try:
        with claimed(path) as own:
            work = own.workshop() / "new"
            work.mkdir()
            own.is_building = True
            try:
                yield work
                _sync(work)
                _put_into_place(work, own)
                _sync_directory(path.parent)
                own.seen = contents(path)
            finally:
                own.is_building = False
                remove(work)
    except OSError as error:
        raise _unwritable(path, error) from error
    except Exception as error:
        if is_no_room(error):
            raise _unwritable(path, error) from error
        raise


def _unwritable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path}: cannot be written ({reason(error)}); nothing was left behind",
        hint="free some space or choose another --out",
    )


def _put_into_place(work: Path, own: Claim) -> None:
    """Rename `work` to the claimed path; what was seen there is then in the workshop, or gone."""
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
        work.rename(path)
    except OSError as error:
        if error.errno in _IN_THE_WAY:
            raise _appeared(path) from error
        raise


def _check_displaced(displaced: Path, own: Claim, undo: object) -> None:
    """Looked at once it is out of everybody's way: between a look and a renaming others could still write there."""
    if contents(displaced) != own.seen:
        assert callable(undo)
        undo()
        raise _appeared(own.path)


def _appeared(path: Path) -> InputError:
    return InputError(
        f"{path}: something was written there since this run began, and stays as it is", hint="choose another --out"
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


def _sync(directory: Path) -> None:
    """To the disk before the rename: after a power cut the name must not stand for half a file."""
    for path in directory.rglob("*"):
        if path.is_dir():
            _sync_directory(path)
        elif path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    """The names in a directory; not every system and file system can."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
