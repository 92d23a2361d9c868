"""Ctrl-C in the middle of training: the step is finished and a checkpoint written, from which the run can go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class CheckpointOnInterrupt(TrainerCallback):  # type: ignore[misc]
    """Within `catching`, a signal that asks for the end waits for the end of the step and for the checkpoint that it
    makes the trainer write; then it does what it would have done at once. A second one does not wait.

    Of several processes all stop after the step at whose end the first of them has been asked to.
    """

    def __init__(self) -> None:
        self._asked: int | None = None
        self._stops = False
        self._before: dict[int, Any] = {}

    @contextmanager
    def catching(self) -> Iterator[None]:
        """A context in which such signals wait: those that have a handler in Python, in the main thread."""
        self._asked, self._stops, self._before = None, False, {}
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
                if callable(signal.getsignal(number)):
                    self._before[number] = signal.signal(number, self._ask)
        try:
            yield
        finally:
            self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked is None:
            self._asked = number
        else:
            self._end(number, frame)

    def _end(self, number: int, frame: FrameType | None = None) -> None:
        handler = self._before.get(number)
        self._restore()
        if callable(handler):
            handler(number, frame)
        raise KeyboardInterrupt

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._stops = _any_of(self._asked is not None, args.device)
        control.should_save = control.should_save or self._stops

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._stops:
            self._end(signal.SIGINT if self._asked is None else self._asked)


def _any_of(asked: bool, device: torch.device) -> bool:
    """Whether one of the processes has been asked."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return asked
    flag = torch.tensor(int(asked), device=device)
    distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
    return bool(flag)
