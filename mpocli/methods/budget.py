"""What the planner is asked for: a size or an error, the shapes it may use, and the text that decides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mpocli.errors import UsageError
from mpocli.methods.calibration_data import Calibration
from mpocli.methods.task_data import DataOptions

SHAPES = ("auto", "svd", "paper")
WEIGHTS = ("fisher", "input")
ALLOCATIONS = ("global", "uniform")


@dataclass(frozen=True)
class Budget:
    """One of `ratio`, `max_bytes` and `max_error`, and how to meet it.

    `ratio` = parameters kept of the selected matrices, `max_bytes` = weight files of the whole output, `max_error` =
    the largest relative error of any matrix, weighted by its inputs where there is a calibration.
    """

    ratio: float | None = None
    max_bytes: int | None = None
    max_error: float | None = None
    shapes: Literal["auto", "svd", "paper"] = "auto"
    allocation: Literal["global", "uniform"] = "global"
    weights: Literal["fisher", "input"] = "fisher"
    sweeps: int = 10
    sequential: bool = False
    compare: bool = False
    sensitivity: str | None = None
    calibration: Calibration | None = None
    data: DataOptions | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("ratio", "max_bytes", "max_error") if getattr(self, name) is not None]
        if len(given) != 1:
            options = " and ".join(f"--{name.replace('_', '-')}" for name in given) or "none"
            raise UsageError(
                f"a plan has one budget: {options} given", hint="choose one of --ratio, --max-bytes and --max-error"
            )
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise UsageError(
                f"--ratio {self.ratio}: parameters kept of the selected matrices, between 0 and 1",
                hint="0.6 keeps 60 %",
            )
        if self.max_error is not None and not 0 < self.max_error < 1:
            raise UsageError(f"--max-error {self.max_error}: a relative error between 0 and 1", hint="such as 0.1")

    @property
    def probes(self) -> bool:
        """Whether gradients of the outputs are looked at."""
        return self.calibration is not None and self.weights == "fisher" and self.max_error is None

    def recorded(self) -> dict[str, Any]:
        """For the manifest: files by their names."""
        names = ("ratio", "max_bytes", "max_error", "allocation", "sweeps")
        options: dict[str, Any] = {name: getattr(self, name) for name in names} | {"candidates": self.shapes}
        if self.calibration is not None:
            options |= {"weights": self.weights, "sequential": self.sequential}
            options |= {"calibrate": Path(self.calibration.source).name, "samples": self.calibration.samples}
            options |= {"seq_len": self.calibration.seq_len, "sensitivity": self.sensitivity is not None}
            options |= {"task": self.data.task} if self.data else {}
        return options
