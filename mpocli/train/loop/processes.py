"""The processes of a data-parallel run, and their random numbers."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def processes(device: torch.device) -> Any:
    """accelerate's view of this run: `num_processes`, `is_main_process`, `device`, `wait_for_everyone()`.

    One process where nobody launched more (`accelerate launch`, torchrun).
    """
    from accelerate import PartialState

    # The others wait while the first evaluates, which can take long.
    return PartialState(cpu=device.type == "cpu", timeout=timedelta(hours=12))


def on_first(call: Callable[[], T]) -> T:
    """The result of a call in the first process, given to all; in a run of one process just the call."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    if state.num_processes == 1:
        return call()
    box: list[Any] = [call() if state.is_main_process else None]
    broadcast_object_list(box)
    result: T = box[0]
    return result


def wait_for_everyone() -> None:
    """Wait until all processes of a run have come this far, and can read what the first one wrote before."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()


def set_seed(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    import transformers

    transformers.set_seed(seed)
