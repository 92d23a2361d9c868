"""Sparse checkpoints: options that make them, the same zeros by numpy, ways to compare, look at and damage files."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpocli.config.decompose import DecomposeConfig
from mpocli.config.sparsify import SparsifyConfig

WEIGHTS = "model.safetensors"
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
HALF, BRAIN = torch.float16, torch.bfloat16
NAME = "bert.encoder.layer.1.output.dense.weight"
FEW = DecomposeConfig(trunc=6, when_larger="decompose", layers=("embedding", "attention"))


def pruning(sparsity: float = 0.8, **options: Any) -> SparsifyConfig:
    return SparsifyConfig(method="magnitude", sparsity=sparsity, **options)


# --- the oracle: numpy on the dense files, nothing of the package -------------------------------------------

# Of the families here: whatever is no attention and no feed-forward matrix.
_KEPT = re.compile("embed|wte|wpe|shared|lm_head|classifier|pooler|predictions|router|relative_attention|mapping_in")


def zeroed(tensor: Tensor, sparsity: float, *, transposed: bool = False) -> Tensor:
    """⌊n·s⌋ smallest |w| at zero; of equals the first ones, read by rows of (O, I)."""
    values = tensor.float().numpy()
    matrix = np.array(values.T if transposed else values)
    order = np.argsort(np.abs(matrix).reshape(-1), kind="stable")[: math.floor(matrix.size * sparsity)]
    mask = np.ones(matrix.size, dtype=bool)
    mask[order] = False
    mask = mask.reshape(matrix.shape)
    pruned = tensor.clone()
    pruned[torch.from_numpy(np.array(~(mask.T if transposed else mask)))] = 0.0
    return pruned


def prunes(name: str, tensor: Tensor) -> bool:
    return name.endswith(".weight") and tensor.dim() == 2 and not _KEPT.search(name)


def dense_with_zeros(source: Path, target: Path, chosen: Callable[[str, Tensor], bool] = prunes) -> set[str]:
    """An ordinary checkpoint beside `source`, pruned at 0.8; returns what was pruned."""
    shutil.copytree(source, target)
    tensors = load_file(source / WEIGHTS)
    is_conv1d = json.loads((source / "config.json").read_text())["model_type"] == "gpt2"
    pruned = {name for name, tensor in tensors.items() if chosen(name, tensor)}
    for name in pruned:
        tensors[name] = zeroed(tensors[name], 0.8, transposed=is_conv1d and ".h." in name)
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    return pruned


# --- compare and look ----------------------------------------------------------------------------------------------


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(WORDS[tensor.element_size()])


def assert_same(found: Any, expected: Any) -> None:
    """Two state dicts, or two models', bit for bit."""
    found, expected = (x if isinstance(x, dict) else x.state_dict() for x in (found, expected))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def weights_size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def stored(directory: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


# --- damage ---------------------------------------------------------------------------------------------------------


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_weights(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
