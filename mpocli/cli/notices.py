"""What methods have to say in passing (through `logging`, as of any library), a line each on stderr."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from mpocli.printable import printable


class _Lines(logging.Handler):
    """Each line once: a step that is done twice in a run has no more to say."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = printable(record.getMessage())
        if line not in self._said:
            self._said.add(line)
            typer.echo(typer.style(line, fg="yellow"), err=True)


@contextmanager
def shown() -> Iterator[None]:
    logger, handler = logging.getLogger("mpocli"), _Lines()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
