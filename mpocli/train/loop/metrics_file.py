"""The file `metrics.jsonl` of a training directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

METRICS = "metrics.jsonl"


class MetricsFile(TrainerCallback):  # type: ignore[misc]
    """`metrics.jsonl`: one line for every logged step, and for the last of a segment.

    A resumed run drops what lies behind its first step. `first` steps were logged by the segments before.
    """

    def __init__(self, path: Path, first: int = 0) -> None:
        self.path, self.first = path, first

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and self.path.exists():
            last = self.first + state.global_step
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= last]
            self.path.write_text("".join(f"{line}\n" for line in kept))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:  # a run shorter than the distance of two logs says something, too
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            keys = ("loss", "learning_rate", "grad_norm", "sparsity", *(() if self.first else ("epoch",)))
            line = {"step": self.first + state.global_step, **{key: _plain(logs[key]) for key in keys if key in logs}}
            with self.path.open("a") as stream:
                stream.write(json.dumps(line) + "\n")


def last_loss(path: Path) -> float | None:
    """The last loss in a `metrics.jsonl`, None where there is none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return float(json.loads(lines[-1])["loss"]) if lines else None


def _plain(value: Any) -> float:
    return float(value)


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # half a line, left by a kill
