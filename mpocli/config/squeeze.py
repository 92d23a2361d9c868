"""Options of `mpocli squeeze`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from mpocli.config import bounds, common, text
from mpocli.config.bounds import at_least
from mpocli.config.data import DataOptions, required
from mpocli.config.modes import ALWAYS, OF_CORES_ALONE, Condition, excludes, needs
from mpocli.config.optimisation import UPDATE, Optimisation, RecomputeWeights
from mpocli.config.option import Option, group
from mpocli.config.option import recorded as recorded_of
from mpocli.config.page import BOND, HOW, STOP
from mpocli.errors import UsageError

Order = Literal["error", "cumulative", "entropy", "sensitivity"]

_TRAINED = needs("--finetune-steps", why="nothing is trained")
_TRAINED_OR_FELT = needs("--finetune-steps", "--order sensitivity", why="no training data is read")


@dataclass(frozen=True)
class Step:
    """How much a bond shrinks in one round: so many dimensions, or a share of what it has.

    >>> Step.parse("4").below(100), Step.parse("10%").below(64)
    (96, 57)
    """

    dims: int = 0
    share: float = 0.0

    @classmethod
    def parse(cls, text: str, option: str = "--step") -> Step:
        """`8`, or a share as `5%` or `0.05`; `UsageError` for anything else."""
        try:
            percent = float(text.rstrip("% ")) / 100 if "%" in text else None
            step = (
                cls(dims=int(text)) if percent is None and text.strip().isdigit() else cls(share=percent or float(text))
            )
        except ValueError:
            step = cls()
        if (step.dims < 1) == (not 0 < step.share < 1):
            raise UsageError(
                f"{option} {text!r} is no step", hint="write a number of dimensions, 8, or a share, 5% or 0.05"
            )
        return step

    def below(self, width: int) -> int:
        """The width after one step, at least 1."""
        return max(1, width - (self.dims or math.ceil(self.share * width)))

    def recorded(self) -> str | int:
        """For the manifest."""
        return f"{100 * self.share:g}%" if self.share else self.dims


def _above(option: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise UsageError(f"{option} {value}: must be above 0", hint="choose one such as 0.6")


@dataclass(frozen=True)
class SqueezeConfig:
    """Options of `mpocli squeeze`. At least one of `max_drop`, `rounds` and the targets says when to stop."""

    data: Annotated[DataOptions, group(limit=(_TRAINED_OR_FELT,))]
    optimisation: Annotated[
        Optimisation,
        group(
            _TRAINED,
            batch_size=(_TRAINED_OR_FELT,),
            warmup=({"help": "Share of the first round's steps."}, _TRAINED),
            save_steps=({"help": "Steps per checkpoint within a round. Default: 100 in long ones."}, _TRAINED),
            precision=(),
            seed=(),
        ),
    ] = field(default_factory=Optimisation)
    max_drop: Annotated[
        float | None,
        Option(
            "--max-drop",
            "Stop when the task's main metric is worse by more than this, as 0.01; keep the last model inside.",
            "X",
            STOP,
            check=at_least(0),
        ),
        ALWAYS,
    ] = None
    reference: Annotated[
        float | None,
        Option("--reference", "What the drop is measured from. Default: MODEL's.", "X", STOP, check=bounds.finite),
        ALWAYS,
    ] = None
    target_params: Annotated[
        int | None, Option("--target-params", "Parameters of the whole model.", "N", STOP, check=at_least(1)), ALWAYS
    ] = None
    target_ratio: Annotated[
        float | None,
        Option("--target-ratio", "Of the dense model's parameters.", "X", STOP, check=_above, share=True),
        ALWAYS,
    ] = None
    target_bytes: Annotated[
        int | None, Option("--target-bytes", "Of weights, as 60MB.", "SIZE", STOP, parse=text.size), ALWAYS
    ] = None
    rounds: Annotated[int | None, Option("--rounds", "No more than these.", "N", STOP, check=at_least(1)), ALWAYS] = (
        None
    )
    finetune_steps: Annotated[
        int, Option("--finetune-steps", "After each round; 0: none.", "N", HOW, check=at_least(0)), ALWAYS
    ] = 100
    order: Annotated[
        Order,
        Option(
            "--order",
            "error (a cut adds the least to ‖W−Ŵ‖), cumulative (the matrix has lost the least in all: the paper's "
            "rule), entropy (least of its width in use), or sensitivity (least loss).",
            "HOW",
            BOND,
        ),
        excludes("--direct", of=("sensitivity",), why="it ranks by spectra alone"),
    ] = "error"
    per_param: Annotated[bool, Option("--per-param", "Divide by the parameters saved.", panel=BOND), ALWAYS] = False
    tie: Annotated[
        Literal["matrix", "kind"], Option("--tie", "matrix, or kind: all of a role together.", "WHAT", BOND), ALWAYS
    ] = "matrix"
    direct: Annotated[
        bool,
        Option("--direct", "For comparison: cut to the target at once, then train.", panel=BOND),
        needs("--target-params", "--target-ratio", "--target-bytes", why="it cuts to a target"),
    ] = False
    patience: Annotated[
        int,
        Option("--patience", "Rounds in a row outside --max-drop.", "N", STOP, check=at_least(0)),
        needs(Condition("--max-drop", test=lambda drop: drop is not None, example="--max-drop X")),
    ] = 0
    update: Annotated[str, UPDATE, {"default": None}, OF_CORES_ALONE, _TRAINED] = "auxiliary"
    layers: Annotated[common.Roles, {"help": "Only these roles.", "panel": BOND}, ALWAYS] = None
    ignore: Annotated[common.Ignored, {"panel": BOND}] = ()
    step: Annotated[
        Step,
        Option(
            "--step",
            "Of a bond's width, per round.",
            "N|P%",
            BOND,
            parse=Step.parse,
            default="5%",
            recorded=Step.recorded,
        ),
        ALWAYS,
    ] = field(default_factory=lambda: Step(share=0.05))
    recompute_weights: Annotated[RecomputeWeights, _TRAINED] = False
    device: common.Device = "auto"
    revision: common.Revision = None
    trust_remote_code: common.TrustRemoteCode = False

    @classmethod
    def from_options(cls, data: DataOptions | None, update: str | None, **given: Any) -> SqueezeConfig:
        return cls(required(data), update=update or "auxiliary", **given)

    def recorded(self) -> dict[str, Any]:
        """The options for the manifest, nothing of the machine."""
        return recorded_of(self)


def check_options(config: SqueezeConfig) -> None:
    """`UsageError` where nothing says when to stop."""
    targets = (config.target_params, config.target_ratio, config.target_bytes)
    if config.max_drop is None and config.rounds is None and all(target is None for target in targets):
        raise UsageError(
            "nothing says when to stop",
            hint="pass --max-drop 0.01, --rounds 20, --target-ratio 0.5, --target-params or --target-bytes",
        )
