"""Output directories that appear whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mpocli.errors import InputError


def check_output(path: Path, source: Path | None, *, overwrite: bool) -> None:
    """`InputError` unless `path` can become an output directory: absent, empty, or replaceable by request.

    `source` is the input's directory, None where it has yet to be downloaded. What a killed run had moved aside
    is back at `path` when it is looked at.
    """
    resolved = path.resolve()
    origin = source and source.resolve()
    if origin and (_holds(resolved, origin) or _holds(origin, resolved)):
        raise InputError(
            f"{path}: the output and the input {source} lie inside each other", hint="choose another --out"
        )
    try:
        _sweep(resolved)
    except OSError as error:
        raise _unwritable(path, error) from error
    if path.is_dir():
        if _holds(resolved, Path.cwd()):
            raise InputError(
                f"{path}: the working directory lies in it, and would be deleted from under the shell",
                hint="choose another --out, or run mpocli from elsewhere",
            )
        if not overwrite and any(path.iterdir()):
            raise InputError(f"{path}: exists and is not empty", hint="choose another --out, or pass --overwrite")
        if overwrite and any(path.iterdir()) and not (path / "config.json").is_file():
            raise InputError(
                f"{path}: is not a model directory (no config.json), so --overwrite will not replace it",
                hint="choose another --out",
            )
    elif path.exists():
        raise InputError(f"{path}: exists and is not a directory", hint="choose another --out")


def _holds(directory: Path, other: Path) -> bool:
    return directory == other or directory in other.parents


@contextmanager
def output_directory(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` to build in; renamed to `path` at the end, removed on any failure.

    Whatever stood at `path` is replaced only then. A kill leaves the old directory as it was; the next run
    with the same output sweeps the remains up. Raises `InputError` where the disk is full or not writable.
    """
    path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        work = path.with_name(f".{path.name}.partial-{os.getpid()}")
        work.mkdir()
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        yield work
        _sync(work)
        _put_into_place(work, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    except Exception as error:
        if is_no_room(error):
            raise _unwritable(path, error) from error
        raise
    finally:
        _remove(work)


def is_no_room(error: Exception) -> bool:
    """Whether an error is the system's about writing, in a class of safetensors' or torch's own."""
    text = str(error)
    return any(words in text for words in ("No space left", "File too large", "unexpected pos", "file write failed"))


def _remove(directory: Path) -> None:
    """Delete a directory, also where an interrupt comes in the middle of that."""
    try:
        shutil.rmtree(directory, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _unwritable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); nothing was left behind",
        hint="free some space or choose another --out",
    )


def _put_into_place(work: Path, path: Path) -> None:
    """Rename `work` to `path`; what stood there is then at `work`, or gone."""
    if not path.exists() or not any(path.iterdir()) or not _exchange(work, path):
        old = path.with_name(f".{path.name}.replaced-{os.getpid()}")
        try:
            if path.exists():
                path.rename(old)
            work.rename(path)
        finally:  # an interrupt may come anywhere between
            if path.exists():
                _remove(old)
            elif old.exists():
                old.rename(path)


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


def _sweep(path: Path) -> None:
    """Clear what runs that were killed left beside `path`, and put back what they had moved aside."""
    for marker in (".partial-", ".replaced-"):
        for left in path.parent.glob(f".{_escaped(path.name)}{marker}*"):
            pid = left.name.rpartition("-")[2]
            if not pid.isdigit() or _alive(int(pid)):
                continue
            if marker == ".replaced-" and not path.exists():
                left.rename(path)
            else:
                shutil.rmtree(left, ignore_errors=True)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
