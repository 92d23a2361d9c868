"""Which tensors sparsify prunes: dense matrices by role and name, and of an MPO its central core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpocli.config.sparsify import CALIBRATED, DEFAULT_ROLES, SparsifyConfig
from mpocli.errors import InputError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.weight import Weight
from mpocli.methods.selection import chosen_weights
from mpocli.methods.skipped import Skipped
from mpocli.nn.masked import Layout


@dataclass(frozen=True)
class Target:
    """A tensor to prune: its name in the model, its key in the files, and how it is read as an (O, I) matrix."""

    module: str
    leaf: str
    key: str
    role: str | None
    layout: Layout
    shape: tuple[int, ...]
    dtype: torch.dtype
    weight: Weight

    @property
    def name(self) -> str:
        return f"{self.module}.{self.leaf}"

    @property
    def numel(self) -> int:
        rows, columns = self.matrix_shape
        return rows * columns

    @property
    def matrix_shape(self) -> tuple[int, int]:
        if self.layout == "core":
            left, out, in_, right = self.shape
            return left * out, in_ * right
        return (self.shape[1], self.shape[0]) if self.layout == "transposed" else (self.shape[0], self.shape[1])

    def matrix(self, stored: Tensor) -> Tensor:
        """(O, I), a view where that is possible."""
        return stored.T if self.layout == "transposed" else stored.reshape(self.matrix_shape)

    def stored(self, matrix: Tensor) -> Tensor:
        return (matrix.T if self.layout == "transposed" else matrix).reshape(self.shape).contiguous()


def plan(checkpoint: Checkpoint, config: SparsifyConfig) -> tuple[list[Target], list[Skipped]]:
    """What is pruned and what is not. Raises `InputError` where nothing is left, or a glob matches nothing."""
    chosen = chosen_weights(checkpoint, config, DEFAULT_ROLES)
    targets, kept = [], []
    for weight in chosen:
        target, reason = _target(weight, config)
        if target is not None:
            targets.append(target)
        else:
            kept.append(Skipped(weight.name, weight.role, reason))
    if not targets:
        roles = ",".join(config.layers or DEFAULT_ROLES)
        why = f": {kept[0].name}: {kept[0].reason}" if kept else f" among {roles}"
        hint = (
            "choose another --pattern" if kept and "no multiple of" in kept[0].reason else "see --layers and --target"
        )
        raise InputError(f"{checkpoint.source.name}: no matrix to prune{why}", hint=hint)
    return targets, kept


def _target(weight: Weight, config: SparsifyConfig) -> tuple[Target | None, str]:
    if weight.obstacle:
        return None, weight.obstacle
    if len(weight.members) > 1:
        return None, f"its weight is tied to {weight.members[1].name}"
    if weight.kind == "embedding" and config.method in CALIBRATED:
        return None, "an embedding has no inputs to look at"
    if weight.entry is not None and weight.entry.spec.experts:
        if weight.entry.spec.share != "central":
            return None, "experts that share no core"
        if config.method in CALIBRATED:
            return None, f"{config.method} looks at one layer's inputs, not at those of experts"
    assert weight.key is not None
    if weight.entry is None:
        layout: Layout = "transposed" if weight.kind == "conv1d" else "matrix"
        shape: Sequence[int] = weight.shape[::-1] if weight.kind == "conv1d" else weight.shape
        target = Target(weight.name, "weight", weight.key, weight.role, layout, tuple(shape), weight.dtype, weight)
    else:
        spec = weight.entry.spec
        leaf = f"core_{spec.sites.central}"
        core_shape = spec.core_shapes()[leaf]
        key = weight.key_of(leaf)
        target = Target(weight.name, leaf, key, weight.role, "core", core_shape, weight.dtype, weight)
    group, columns = config.pattern.group, target.matrix_shape[1]
    if group is not None and columns % group:
        return None, f"{columns} input columns are no multiple of {group}"
    return target, ""
