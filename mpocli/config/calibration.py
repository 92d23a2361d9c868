"""The text or rows whose activations a method looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from mpocli.config.bounds import at_least
from mpocli.config.modes import needs
from mpocli.config.option import Option
from mpocli.config.page import PLAN

CALIBRATED = needs("--calibrate", why="it is about a text")


@dataclass(frozen=True)
class Calibration:
    """Text whose activations a method looks at: `samples` windows of `seq_len` tokens, or rows of the task."""

    source: Annotated[
        str,
        Option(
            "--calibrate",
            "Text, rows of a --task, or a task by its name (the hub's rows), to judge errors by.",
            "DATA",
            PLAN,
            reads=True,
        ),
    ]
    samples: Annotated[int, Option("--samples", "Windows or rows of it.", "N", PLAN, check=at_least(1))] = 128
    seq_len: Annotated[int, Option("--seq-len", "Tokens per window.", "N", PLAN, check=at_least(2))] = 256

    @classmethod
    def from_options(cls, source: str | None, **given: Any) -> Calibration | None:
        return None if source is None else cls(source, **given)
