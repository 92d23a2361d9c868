"""Locks held by the living: the kernel lets go of them however a process ends, and counts no process ids."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_HELD = (errno.EAGAIN, errno.EACCES)


class Lock:
    """A lock file that this process holds. Without `is_sure` the file system has no locks (some of NFS, of FUSE):
    then nobody can tell a leftover from another's work in progress, and nothing must be deleted on its account."""

    def __init__(self, path: Path, descriptor: int, *, is_sure: bool) -> None:
        self.path, self.is_sure = path, is_sure
        self._descriptor = descriptor

    def release(self, *, keep: bool = False) -> None:
        """Delete the file, then let go: who waits for it sees that it is gone and makes a new one."""
        try:
            if not keep:
                with suppress(OSError):
                    self.path.unlink()
        finally:
            os.close(self._descriptor)


def take(path: Path) -> Lock | None:
    """The lock of this file, which is made where it is not; None while someone else holds it.

    Raises `OSError` where the file cannot be made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            is_sure = _lock(descriptor)
            if is_sure is None:
                os.close(descriptor)
                return None
            if not is_sure or _is_at(descriptor, path):
                return Lock(path, descriptor, is_sure=is_sure)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has deleted it meanwhile


def _lock(descriptor: int) -> bool | None:
    """Whether the file system has locks; None while another descriptor holds this one."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in _HELD else False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
