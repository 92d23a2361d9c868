"""Over-parameterised fine-tuning (OPF, ACL 2023): which matrices train as MPOs, of what shape, and when."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from mpocli.config.overparam import Overparam
from mpocli.errors import UsageError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.expand import overparam_shape
from mpocli.hf.replace import dense_shape
from mpocli.methods.training.student import roles_of
from mpocli.mpo import SiteShape
from mpocli.mpo.weighted import svd_shape

Method = Literal["static", "dynamic", "svd"]
METHODS = ("static", "dynamic", "svd")


@dataclass(frozen=True)
class Expanded:
    """One matrix that became an MPO: after which step, of which group, with what score (None: not scored)."""

    module: str
    group: str
    step: int
    score: float | None
    out_dims: tuple[int, ...]
    in_dims: tuple[int, ...]
    bond_dims: tuple[int, ...]
    params: int
    dense_params: int

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Expanded:
        """From JSON, which has lists."""
        dims = {key: tuple(data[key]) for key in ("out_dims", "in_dims", "bond_dims")}
        return cls(**{**data, **dims})


@dataclass(frozen=True)
class OverparamReport:
    """What over-parameterisation did.

    `scores` of every candidate (empty for `svd`), `training_params` of the whole model while the last segment trained
    (`trainable_by_role` of them in the optimiser), `deployed_params` after folding, and `fold_difference` = max |logit
    difference| of a batch before and after it, beside the largest logit.
    """

    method: str
    expanded: tuple[Expanded, ...]
    scores: dict[str, float]
    score_steps: int
    training_params: int
    trainable_by_role: dict[str, int]
    deployed_params: int
    fold_difference: float
    largest_logit: float

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> OverparamReport:
        """From JSON."""
        return cls(**{**data, "expanded": tuple(Expanded.from_dict(found) for found in data["expanded"])})


def candidates(model: Any, roles: Mapping[str, str | None], layers: Sequence[str]) -> dict[str, list[str]]:
    """The dense linear modules that may be expanded, by group: modules whose names differ by layer numbers alone.

    Tied weights are left out. Raises `UsageError` where there are none.
    """
    tied = {name.removesuffix(".weight") for pair in (model.all_tied_weights_keys or {}).items() for name in pair}
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        shape = dense_shape(module)
        if shape is None or shape[0] == "embedding" or roles.get(name) not in layers or name in tied:
            continue
        found.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), []).append(name)
    if not found:
        raise UsageError(f"--layers {','.join(layers)}: no matrix to over-parameterise", hint="name attention or ffn")
    return found


def top(
    groups: Mapping[str, Sequence[str]], scores: Mapping[str, float], count: int, taken: Sequence[str] = ()
) -> list[str]:
    """Of every group the `count` best that were not taken yet, the first of equals."""
    chosen = []
    for members in groups.values():
        left = [name for name in members if name not in taken]
        chosen += sorted(left, key=lambda name: -scores[name])[:count]
    return chosen


def check_steps(options: Overparam, steps: int) -> None:
    """`UsageError` where a run of so many steps has no room for every portion, or for training after the scores."""
    if options.method == "static" and options.score_from is None and scoring_steps(options, steps) >= steps:
        raise UsageError(
            f"--score-steps {scoring_steps(options, steps)} of {steps} steps: none are left to train in",
            hint="lower --score-steps, or train for more steps",
        )
    if options.method != "dynamic":
        return
    last = options.splits * interval(options, steps)
    if last >= steps:
        every = f"--every {options.every} with " if options.every else ""
        raise UsageError(
            f"{every}--splits {options.splits}: the last portion would come after step {last} of {steps}",
            hint=f"choose --every {(steps - 1) // options.splits} or less"
            if options.every and steps > options.splits
            else "lower --splits, or train for more steps",
        )


def interval(options: Overparam, budget: int) -> int:
    """Steps between two portions."""
    return options.every or max(1, math.ceil(budget / (2 * options.splits)))


def scoring_steps(options: Overparam, steps: int) -> int:
    """Of a run's steps, those that train a copy for the scores."""
    return options.score_steps if options.score_steps is not None else max(1, steps // 4)


def portion(options: Overparam, done: int) -> int:
    """How many of a group's `top_n` the next expansion takes: as even as whole numbers allow."""
    before = options.top_n * done // options.splits
    return options.top_n * (done + 1) // options.splits - before


def check(model: Any, checkpoint: Checkpoint, options: Overparam) -> dict[str, list[str]]:
    """The candidates by group; `UsageError` or `InputError` for layers and shapes that fit nothing."""
    groups = candidates(model, roles_of(model, checkpoint), options.layers)
    names = [name for members in groups.values() for name in members]
    for glob, _ in options.shapes:
        if not any(fnmatchcase(name, glob) for name in names):
            raise UsageError(f"--shape {glob!r} matches none of the {len(names)} matrices", hint=f"such as {names[0]}")
    for name in names:
        found = dense_shape(model.get_submodule(name))
        assert found is not None
        site_shape(name, found[1], options).check_fits(found[1], f"module {name}")
    return groups


def site_shape(name: str, shape: tuple[int, int], options: Overparam) -> SiteShape:
    for glob, given in options.shapes:
        if fnmatchcase(name, glob):
            return given
    return svd_shape(*shape) if options.method == "svd" else overparam_shape(*shape, options.sites)
