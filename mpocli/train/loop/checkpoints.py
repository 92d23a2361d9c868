"""Checkpoints of a training directory: which is the newest, and those that hold tensors alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpocli.nn.packed import is_packed

CHECKPOINT = "checkpoint-"  # the step follows
_TENSORS = "parameters.safetensors"


def last_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint of a training directory; the state file is the last that is written."""
    found = []
    for path in directory.glob(f"{CHECKPOINT}*"):
        number = path.name.removeprefix(CHECKPOINT)
        try:
            step = json.loads((path / "trainer_state.json").read_text())["global_step"]
        except (OSError, ValueError, KeyError):
            continue
        if number.isdigit() and int(number) == step:
            found.append((step, path))
    return max(found)[1] if found else None


def save_tensors(model: Any, directory: Path) -> None:
    """A model's tensors by name, in a directory that is made where there is none. Packed ones are constants."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _state_tensors(model)}
    save_file(tensors, directory / _TENSORS)


@torch.no_grad()
def load_tensors(model: Any, directory: Path) -> None:
    """Put tensors into the model whose `save_tensors` they are."""
    saved = load_file(directory / _TENSORS)
    for name, tensor in _state_tensors(model):
        tensor.copy_(saved[name])


def _state_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters, shared ones once, and the buffers that belong to a model's state."""
    yield from (item for item in model.named_parameters() if not is_packed(item[1]))
    stored = set(model.state_dict())
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)
