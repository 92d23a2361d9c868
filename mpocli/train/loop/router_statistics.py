"""What routers did in training alone, kept across a resume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from mpocli.hf.routing import routers
from mpocli.nn.router import Statistics


class TrainingStatistics(TrainerCallback, ExportableState):  # type: ignore[misc]
    """What routers did in the steps of training, and not between them, where models are evaluated.

    Checkpoints hold the counts, so that a resumed run reports those of the whole. The first of several processes has
    the sums, from whenever a checkpoint is written and at the end.
    """

    def __init__(self, model: Any) -> None:
        self.routers = routers(model)
        self.counted = {name: Statistics() for name in self.routers}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}) if state.global_step else {}
        for name, values in saved.items():
            # On the device: what is not added to any more is still summed over the processes.
            self.counted[name] = _restored(values, self.routers[name].weight.device)
        if not _is_first():  # what was counted before is in the first one's sums
            self._forget()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for name, router in self.routers.items():
            router.statistics = self.counted[name]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for router in self.routers.values():
            router.statistics = Statistics()  # forgotten
        if control.should_save:
            self._gather()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._gather()
        self.on_step_begin(args, state, control)

    def _gather(self) -> None:
        """Add up what all processes counted, in the first one."""
        if not _are_several():
            return
        for statistics in self.counted.values():
            for value in vars(statistics).values():
                if value is not None:
                    distributed.reduce(value, 0)
        if not _is_first():
            self._forget()

    def _forget(self) -> None:
        for statistics in self.counted.values():
            for name, value in vars(statistics).items():
                setattr(statistics, name, None if value is None else torch.zeros_like(value))

    def state(self) -> dict[str, Any]:
        counts = {
            name: {key: value.tolist() for key, value in vars(statistics).items() if value is not None}
            for name, statistics in self.counted.items()
        }
        return {"args": {}, "attributes": counts}


def _are_several() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _is_first() -> bool:
    return not _are_several() or distributed.get_rank() == 0


def _restored(values: Mapping[str, Any], device: torch.device) -> Statistics:
    """The statistics out of a checkpoint: all are counts, but for the sum of the entropies."""
    made: dict[str, Tensor] = {
        key: torch.tensor(value, dtype=torch.float32 if key == "entropy" else torch.int64, device=device)
        for key, value in values.items()
    }
    return Statistics(**made)
