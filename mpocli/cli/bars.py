"""How far long work is: bars in a terminal, lines now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mpocli.cli import console
from mpocli.cli.wording import shortened
from mpocli.printable import printable

# Seconds between two lines of progress where no terminal is.
EVERY = 30.0


@contextmanager
def progress_bar(what: str, *, enabled: bool = True) -> Iterator[Callable[[int, int, str], None] | None]:
    """A progress bar on stderr, as a callback (done, total, item); where no terminal is, a line now and then."""
    if not enabled:
        yield None
        return
    if not console.err.is_terminal:
        yield _now_and_then(what)
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[item]}", style="dim", markup=False),
    )
    with Progress(*columns, console=console.err, transient=True) as bar:
        task = bar.add_task(what, total=None, item="")

        def update(done: int, total: int, item: str) -> None:
            bar.update(task, completed=done, total=total, item=printable(shortened(item)))

        yield update


def _now_and_then(what: str) -> Callable[[int, int, str], None]:
    """What is done in a moment says nothing; what takes longer, where it is, twice a minute."""
    began = said = time.monotonic()

    def say(done: int, total: int, item: str) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= EVERY:
            said = now
            where = f" ({printable(shortened(item))})" if item else ""
            console.err.print(f"{what}: {done:,} of {total:,} after {now - began:.0f} s{where}")

    return say


@contextmanager
def training_bar(what: str, *, enabled: bool = True) -> Iterator[Callable[[int, int, str], None] | None]:
    """A progress bar with the loss beside it; where no terminal is, a line for every logged loss."""
    if not enabled or console.err.is_terminal:
        with progress_bar(what, enabled=enabled) as bar:
            yield bar
        return
    said = ""

    def say(done: int, total: int, line: str) -> None:
        nonlocal said
        if line and line != said:
            said = line
            console.err.print(f"step {done:,} of {total:,}: {line}")

    yield say
