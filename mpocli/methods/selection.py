"""The weights of a checkpoint that a verb's options choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mpocli.hf.artifact import Checkpoint
from mpocli.hf.matrices import select
from mpocli.hf.weight import Weight


class Choosing(Protocol):
    """Options that choose: roles, or None for the verb's own, and globs on names."""

    @property
    def layers(self) -> tuple[str, ...] | None: ...
    @property
    def targets(self) -> tuple[str, ...]: ...
    @property
    def ignore(self) -> tuple[str, ...]: ...


def chosen_weights(checkpoint: Checkpoint, config: Choosing, default_roles: Sequence[str]) -> list[Weight]:
    """In the model's order. Raises what `select` does."""
    return select(
        checkpoint.survey.weights,
        layers=config.layers,
        targets=config.targets,
        ignore=config.ignore,
        default_roles=default_roles,
    )


def check_glob(checkpoint: Checkpoint, glob: str, option: str) -> None:
    """`InputError` for a glob that no weight has, under the name of its option."""
    weights = checkpoint.survey.weights
    select(weights, layers=None, targets=(glob,), ignore=(), default_roles=(), target_option=option)
