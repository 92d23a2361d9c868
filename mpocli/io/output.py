"""Output directories that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from mpocli.errors import InputError
from mpocli.io.apart import Paths, check_apart, holds
from mpocli.io.claim import claim, claimed, contents, is_in_a_run, remove
from mpocli.io.disk import is_no_room, reason
from mpocli.io.model_files import foreign_files
from mpocli.io.place import put_into_place
from mpocli.io.readable import real_path


def check_output(
    path: Path,
    reads: Path | Paths | None,
    *,
    overwrite: bool,
    claims: bool = True,
    writes: Paths | None = None,
) -> None:
    """`InputError` unless `path` can become an output directory: absent, empty, or replaceable by request.

    `reads` are the paths that the command reads, by what a user chose them with (or the model's alone, None where it
    has yet to be downloaded), `writes` those that it writes beside the directory. In a run under `writes_output` the
    path is then the run's own, and what stands there is remembered: something else is not replaced. What a killed run
    had moved aside is back at `path` when it is looked at. Without `claims` another process of this run has done all
    that.
    """
    found = reads if isinstance(reads, Mapping) else {"the input": reads}
    check_apart({"‹out›": path, **(writes or {})}, found)
    resolved = real_path(path)
    if resolved.is_symlink():
        raise InputError(f"{path}: is a symbolic link that leads back to itself", hint="choose another ‹out›")
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
            raise InputError(f"{path}: exists and is not a directory", hint="choose another ‹out›")
        return
    if holds(real_path(path), Path.cwd()):
        raise InputError(
            f"{path}: the working directory lies in it, and would be deleted from under the shell",
            hint="choose another ‹out›, or run mpocli from elsewhere",
        )
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{path}: exists and is not empty", hint="choose another ‹out›, or pass ‹overwrite›")
    if not (path / "config.json").is_file():
        raise InputError(
            f"{path}: is not a model directory (no config.json), so ‹overwrite› will not replace it",
            hint="choose another ‹out›",
        )
    foreign = foreign_files(path)
    if foreign:
        names = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise InputError(
            f"{path}: holds {names}, which no model needs and ‹overwrite› would delete",
            hint="move them elsewhere, or choose another ‹out›",
        )


@contextmanager
def output_directory(path: Path) -> Iterator[Path]:
    """A directory beside `path` to build in; renamed to `path` at the end, removed on any failure.

    Whatever stood at `path` when it was claimed is replaced only then, and nothing else ever: what has appeared or
    changed since stays, and the run ends with `InputError`. A kill leaves the old directory as it was; the next run
    with the same output sweeps the remains up. Raises `InputError` too where the disk is full or not writable.
    """
    path = real_path(path)
    try:
        with claimed(path) as own:
            work = own.workshop() / "new"
            work.mkdir()
            own.is_building = True
            try:
                yield work
                _sync(work)
                put_into_place(work, own)
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
        hint="free some space or choose another ‹out›",
    )


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
