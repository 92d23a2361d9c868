"""Standard streams that cannot be written: a reader that has left, a disk that is full. Light: no rich here."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import IO

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


# The system's refusals of a file that it was given by name; that one is missing may be a bug of ours.
_REFUSALS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE),
    *(errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
}


def is_refused(error: OSError) -> bool:
    """Whether the system would not have a file read or written that has a name."""
    return error.errno in _REFUSALS and error.filename is not None


def reopen() -> None:
    """Give standard streams that were closed (`>&-`) somewhere to go: nothing else must get their descriptors.

    As with a reader that has left, nobody wants to know.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def has_no_room(error: OSError) -> bool:
    """Whether an error that reached the application is of its standard output: those of files name one, or were
    made an `MpoError` where they arose."""
    return error.errno in _NO_ROOM and error.filename is None


def silence(stream: IO[str]) -> None:
    """Let what is still to be written to a standard stream vanish, Python's own flush at exit included."""
    with suppress(OSError):  # a stream that has no file descriptor needs none of this
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def stuck(stream: IO[str]) -> bool:
    """Whether a stream holds text that it cannot get rid of."""
    try:
        stream.flush()
    except OSError:
        return True
    return False
