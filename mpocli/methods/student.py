"""The model that a command trains: loaded for its task, counted, checked, and rounded to what is stored."""

from __future__ import annotations

from typing import Any

import torch

from mpocli.errors import NumericsError
from mpocli.hf.artifact import Checkpoint
from mpocli.methods.task_data import TaskData
from mpocli.train.models import load_model
from mpocli.train.updates import roles


def load_student(checkpoint: Checkpoint, data: TaskData, *, trust_remote_code: bool) -> Any:
    """The model that a task trains, in float32, with a padding token."""
    model = load_model(
        checkpoint.source.directory,
        checkpoint.config,
        data.task,
        data.family,
        data.label_names,
        trust_remote_code=trust_remote_code,
    )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = data.pad
    return model


def count_trainable(model: Any) -> tuple[int, dict[str, int]]:
    counts = {"auxiliary": 0, "central": 0, "other": 0}
    for _, parameter, role in roles(model):
        if parameter.requires_grad:
            counts[role] += parameter.numel()
    return sum(counts.values()), counts


@torch.no_grad()
def round_to(model: Any, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def check_finite(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NumericsError(f"{name} is not finite after training", hint="lower --lr or --mpo-lr")
