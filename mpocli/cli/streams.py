"""Standard streams that cannot be written: a reader that has left, a disk that is full. Light: no rich here."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import IO

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


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
