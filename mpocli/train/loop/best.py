"""Keep the weights that did best on held-out data, once an epoch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from mpocli.nn.packed import is_packed
from mpocli.train.loop.processes import on_first, wait_for_everyone


class KeepBest(TrainerCallback):  # type: ignore[misc]
    """Calls `measure(model)` at the end of every epoch and of the training; larger is better, the first best counts.

    The state lives in `directory`, so that a resumed run knows it.
    """

    def __init__(self, directory: Path, measure: Callable[[Any], float]) -> None:
        self.directory = directory
        self.measure = measure
        self.value: float | None = None
        self.step: int | None = None
        self.measured: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        record = self.directory / "best.json"
        if record.is_file():
            found = json.loads(record.read_text())
            if found["step"] <= state.global_step:
                self.value, self.step = found["value"], found["step"]
        if state.global_step and state.epoch == int(state.epoch):
            self._look(state, model)  # the kill may have come between the checkpoint and this epoch's measurement

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._look(state, model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._look(state, model)

    def _look(self, state: Any, model: Any) -> None:
        if self.measured == state.global_step:
            return
        self.measured = state.global_step
        value = on_first(lambda: self.measure(model))  # one process measures, and all come to the same choice
        if self.value is not None and value <= self.value:
            return
        self.value, self.step = value, state.global_step
        if state.is_world_process_zero:
            self.directory.mkdir(exist_ok=True)
            temporary = self.directory / "weights.partial"
            torch.save({name: p.detach().cpu() for name, p in _variables(model)}, temporary)
            temporary.replace(self.directory / "weights.pt")
            (self.directory / "best.json").write_text(json.dumps({"value": value, "step": self.step}))

    @torch.no_grad()
    def restore(self, model: Any) -> int:
        """Put the best weights into the model; returns the step that they are of."""
        assert self.step is not None, "restored without training"
        wait_for_everyone()
        best = torch.load(self.directory / "weights.pt", weights_only=True)
        for name, parameter in _variables(model):
            parameter.copy_(best[name])
        return self.step


def _variables(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters but the packed ones, which are constants."""
    yield from ((name, parameter) for name, parameter in model.named_parameters() if not is_packed(parameter))
