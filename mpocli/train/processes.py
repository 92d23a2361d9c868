"""The processes of a data-parallel run, and their random numbers."""

from __future__ import annotations

from typing import Any

import torch


def processes(device: torch.device) -> Any:
    """accelerate's view of this run: `num_processes`, `is_main_process`, `device`, `wait_for_everyone()`.

    One process where nobody launched more (`accelerate launch`, torchrun).
    """
    from accelerate import PartialState

    return PartialState(cpu=device.type == "cpu")


def set_seed(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    import transformers

    transformers.set_seed(seed)
