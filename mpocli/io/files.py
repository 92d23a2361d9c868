"""Single files that a command writes: predictions, pictures, measurements."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mpocli.errors import InputError
from mpocli.io.claim import claimed, contents
from mpocli.io.disk import is_no_room, reason
from mpocli.io.place import put_into_place
from mpocli.io.readable import real_path


class OutputFile:
    """A file to be, looked at before the work: it may not be there yet, unless `overwrite` says so.

    Raises `InputError` for a place where no file can be written. At the end it appears whole, and only where nothing
    has changed since.
    """

    def __init__(self, option: str, path: Path, *, overwrite: bool) -> None:
        self.option, self.path = option, path
        if path.is_dir():
            raise self._refused("is a directory", "name a file")
        if not path.absolute().parent.is_dir():
            raise self._refused(f"there is no directory {path.parent}", "make it first")
        if path.exists() and not path.is_file():
            raise self._refused("is no regular file", "name another")
        if path.exists() and not overwrite:
            raise self._refused("exists", "name another file, or pass ‹overwrite›")
        if not os.access(path.absolute().parent, os.W_OK):
            raise self._refused("nothing can be written there", "name another file")
        self._seen = contents(real_path(path))

    def write(self, fill: Callable[[Path], object]) -> None:
        """`fill(path)` writes a file of the same suffix elsewhere. Raises `InputError` on a full disk."""
        try:
            with claimed(self.path) as own:
                work = own.workshop() / self.path.name
                fill(work)
                own.seen = self._seen
                put_into_place(work, own)
                self._seen = contents(own.path)
        except Exception as error:
            if not is_no_room(error):
                raise
            raise self._refused(f"cannot be written ({reason(error)})", "name another") from error

    def write_text(self, text: str) -> None:
        self.write(lambda path: path.write_text(text, encoding="utf-8"))

    def _refused(self, what: str, hint: str) -> InputError:
        return InputError(f"{self.option} {self.path}: {what}", hint=hint)
