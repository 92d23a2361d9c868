"""What a path stands for, asked without an exception: the system may refuse even the question."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_KINDS = (
    (stat.S_ISDIR, "is a directory"),
    (stat.S_ISFIFO, "is a pipe, and files are read more than once"),
    (stat.S_ISSOCK, "is a socket"),
    (stat.S_ISCHR, "is a device"),
    (stat.S_ISBLK, "is a device"),
)


def is_file(path: Path) -> bool:
    """Whether a regular file is there; False for a name that the system does not take."""
    return why_unreadable(path, opened=False) is None


def is_there(path: Path) -> bool:
    """Whether anything is there, or may be: a folder that cannot be looked into hides it."""
    try:
        path.lstat()
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True


def real_path(path: Path) -> Path:
    """`Path.resolve`, which raises for links that go round in circles: here those stand for themselves."""
    return Path(os.path.realpath(path))


def why_unreadable(path: Path, *, opened: bool = True) -> str | None:
    """Why a path is no file that can be read, as the end of a sentence about it; None where it is one.

    With `opened` it is opened too, which is where permissions show.

    >>> why_unreadable(Path("/")), why_unreadable(Path("nowhere/at-all"))
    ('is a directory', 'does not exist')
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            return next((words for test, words in _KINDS if test(mode)), "is no file")
        if opened:
            os.close(os.open(path, os.O_RDONLY))
    except (FileNotFoundError, NotADirectoryError):
        return "is a link to what does not exist" if path.is_symlink() else "does not exist"
    except (OSError, ValueError) as error:
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    return None
