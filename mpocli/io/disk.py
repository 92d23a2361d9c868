"""Errors of a disk that is full or cannot be written, in whatever class a library raises them."""

from __future__ import annotations

import errno

_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
# Of safetensors, and of torch's archive writer, which does not pass on the system's own words.
_WORDS = (
    "No space left",
    "File too large",
    "Disk quota exceeded",
    "Read-only file system",
    "unexpected pos",
    "file write failed",
    "PytorchStreamWriter failed",
    "iostream error",
)


def is_no_room(error: BaseException) -> bool:
    """Whether an error says that something could not be written."""
    if isinstance(error, OSError):
        return error.errno in _NUMBERS
    return any(words in str(error) for words in _WORDS)


def reason(error: BaseException) -> str:
    """The system's words, in one line."""
    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return text.splitlines()[0]
