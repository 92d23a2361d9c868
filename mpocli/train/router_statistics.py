"""What routers did in training alone, kept across a resume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from mpocli.hf.routing import routers
from mpocli.nn.router import Statistics


class TrainingStatistics(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Routers count what a step routes and nothing between steps, where models are evaluated. Checkpoints hold the
    counts, so that a resumed run reports those of the whole."""

    def __init__(self, model: Any) -> None:
        self.routers = routers(model)
        self.counted = {name: Statistics() for name in self.routers}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}) if state.global_step else {}
        for name, values in saved.items():
            self.counted[name] = _restored(values)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for name, router in self.routers.items():
            router.statistics = self.counted[name]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for router in self.routers.values():
            router.statistics = Statistics()  # forgotten

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.on_step_begin(args, state, control)

    def state(self) -> dict[str, Any]:
        counts = {
            name: {key: value.tolist() for key, value in vars(statistics).items() if value is not None}
            for name, statistics in self.counted.items()
        }
        return {"args": {}, "attributes": counts}


def _restored(values: Mapping[str, Any]) -> Statistics:
    """Out of a checkpoint: the sum of the entropies is the one number that is no count."""
    made: dict[str, Tensor] = {
        key: torch.tensor(value, dtype=torch.float32 if key == "entropy" else torch.int64)
        for key, value in values.items()
    }
    return Statistics(**made)
