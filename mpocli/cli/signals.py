"""SIGTERM and SIGHUP end a command as Ctrl-C does: what it has begun is cleared up, and the exit code says which."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# A closed terminal sends SIGHUP by way of the shell and of the kernel, launchers repeat SIGTERM: one request each.
_SAME_SECONDS = 5.0
_NAMES = ("SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class Terminated(KeyboardInterrupt):
    """Another signal than Ctrl-C's asks for the end; whoever saves or clears up on an interrupt does so here."""


class Ending:
    """What has asked this process to end: `signal`, None as long as nothing but Ctrl-C has."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._process = os.getpid()

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells count."""
        return 128 + (self.signal or signal.SIGINT)

    @property
    def reason(self) -> str:
        return f"ended by {self.signal.name}" if self.signal else "interrupted"

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Raise `Terminated`, once for one request: clearing up must not be cut short by its echo."""
        if os.getpid() != self._process:  # a forked worker has nothing to clear up, and ends as it always did
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self.signal is not None and time.monotonic() < self._since + _SAME_SECONDS:
            return
        self.signal, self._since = signal.Signals(number), time.monotonic()
        raise Terminated(self.signal.name)


@contextmanager
def as_interrupts() -> Iterator[Ending]:
    """Within the block these signals raise `Terminated`. One that has another handler, or is ignored (`nohup`), is
    left as it is; so are all outside the main thread, where Python sets no handlers."""
    ending = Ending()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in _NAMES:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, ending.handle)
    try:
        yield ending
    finally:
        for number, handler in before.items():
            with suppress(ValueError, TypeError):
                signal.signal(number, handler)
