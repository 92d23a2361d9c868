"""What `mpocli squeeze` is told, and the size that it aims at."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from mpocli.errors import UsageError
from mpocli.io.manifest import Totals
from mpocli.methods.squeeze_choice import Order, Step
from mpocli.methods.task_data import DataOptions
from mpocli.train.segment import Optimisation


@dataclass(frozen=True)
class SqueezeConfig:
    """Options of `mpocli squeeze`. At least one of `max_drop`, `rounds` and the targets says when to stop."""

    data: DataOptions
    optimisation: Optimisation = field(default_factory=Optimisation)
    max_drop: float | None = None
    reference: float | None = None
    target_params: int | None = None
    target_ratio: float | None = None
    target_bytes: int | None = None
    rounds: int | None = None
    finetune_steps: int = 100
    step: Step = field(default_factory=lambda: Step(share=0.05))
    order: Order = "error"
    per_param: bool = False
    tie: str = "matrix"
    direct: bool = False
    patience: int = 0
    update: str = "auxiliary"
    layers: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    recompute_weights: bool = False
    device: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

    def recorded(self) -> dict[str, Any]:
        """The options for the manifest, nothing of the machine."""
        options = {**self.data.recorded(), **asdict(self.optimisation)}
        for left_out in ("seed", "report_to", "log_steps", "save_steps"):
            del options[left_out]
        names = ["max_drop", "reference", "target_params", "target_ratio", "target_bytes", "rounds", "finetune_steps"]
        names += ["order", "per_param", "tie", "direct", "patience", "update", "layers", "ignore"]
        step = f"{100 * self.step.share:g}%" if self.step.share else self.step.dims
        return options | {name: getattr(self, name) for name in names} | {"step": step}


def check_options(config: SqueezeConfig) -> None:
    targets = (config.target_params, config.target_ratio, config.target_bytes)
    if config.max_drop is None and config.rounds is None and all(target is None for target in targets):
        raise UsageError(
            "nothing says when to stop",
            hint="pass --max-drop 0.01, --rounds 20, --target-ratio 0.5, --target-params or --target-bytes",
        )


def target_params(config: SqueezeConfig, before: Totals, itemsize: int) -> int | None:
    """The most parameters that all targets together allow; `UsageError` where there is nothing to do."""
    limits = {}
    if config.target_params is not None:
        limits[f"--target-params {config.target_params:,}"] = config.target_params
    if config.target_ratio is not None:
        limits[f"--target-ratio {config.target_ratio:g}"] = int(config.target_ratio * before.dense_params)
    if config.target_bytes is not None:
        # What is in the files beside the cores stays; headers change by some bytes.
        too_many = max(0, before.bytes - config.target_bytes)
        kept = before.params - math.ceil(too_many / itemsize)
        limits[f"--target-bytes {config.target_bytes:,}"] = kept if too_many else before.params
    if not limits:
        return None
    option = min(limits, key=limits.__getitem__)
    if limits[option] >= before.params:
        raise UsageError(
            f"{option}: the checkpoint has {before.params:,} parameters ({before.ratio:.3f} of dense, "
            f"{before.bytes:,} bytes) already",
            hint="choose less",
        )
    return limits[option]
