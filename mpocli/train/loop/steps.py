"""Progress of training, told step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class Steps(TrainerCallback):  # type: ignore[misc]
    """Tells `progress(step, total, loss line)` after every step, of a segment or of the whole it is part of."""

    def __init__(self, progress: Callable[[int, int, str], None], first: int = 0, total: int | None = None) -> None:
        self.progress, self.first, self.total = progress, first, total
        self.line = ""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            step = self.first + state.global_step
            self.line = f"loss {logs['loss']:.4f}, lr {logs['learning_rate']:.1e} (step {step:,})"
            self._tell(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tell(state)

    def _tell(self, state: Any) -> None:
        if state.is_world_process_zero:
            self.progress(self.first + state.global_step, self.total or state.max_steps, self.line)
