"""What `mpocli sparsify` was asked for, and whether that can be meant."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mpocli.errors import UsageError
from mpocli.methods.calibration_data import Calibration
from mpocli.methods.task_data import DataOptions
from mpocli.nn.masked import Scoring
from mpocli.sparse import CubicSchedule, Pattern
from mpocli.train.segment import Optimisation

Method = Literal["pst", "magnitude", "movement", "wanda", "sparsegpt"]
METHODS = ("pst", "magnitude", "movement", "wanda", "sparsegpt")
CALIBRATED = ("wanda", "sparsegpt")
_LEARNT = ("pst", "movement")
DEFAULT_ROLES = ("attention", "ffn")


@dataclass(frozen=True)
class SparsifyConfig:
    """Options of `mpocli sparsify`. `score_lr` None stands for the learning rate; `scoring` is what `method` learns."""

    sparsity: float = 0.9
    method: Method = "pst"
    pattern: Pattern = field(default_factory=Pattern)
    scope: Literal["matrix", "global"] = "matrix"
    layers: tuple[str, ...] | None = None
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    storage: Literal["bitmask", "dense"] = "bitmask"
    data: DataOptions | None = None
    calibration: Calibration | None = None
    optimisation: Optimisation = field(default_factory=Optimisation)
    scoring: Scoring = field(default_factory=Scoring)
    score_lr: float | None = None
    epochs: float = 3.0
    steps: int | None = None
    initial_sparsity: float = 0.0
    initial_warmup: float = 0.1
    final_warmup: float = 0.3
    faithful: bool = False
    teacher: str | None = None
    distill_weight: float = 0.5
    temperature: float = 2.0
    distill_hidden: bool = False
    max_shard_bytes: int = 5 * 10**9
    device: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def trains(self) -> bool:
        return self.data is not None and self.data.train is not None

    def schedule(self, steps: int) -> CubicSchedule:
        """Of the sparsity, over the steps of a run."""
        return CubicSchedule(steps, self.sparsity, self.initial_sparsity, self.initial_warmup, self.final_warmup)

    def recorded(self) -> dict[str, Any]:
        """The options for the manifest: names of files without their folders, nothing of the machine."""
        names = ("sparsity", "method", "scope", "layers", "targets", "ignore", "storage")
        options: dict[str, Any] = {name: getattr(self, name) for name in names} | {"pattern": str(self.pattern)}
        if self.calibration:
            options |= {**asdict(self.calibration), "source": Path(self.calibration.source).name}
        if self.data is not None:
            options |= self.data.recorded()
        if self.trains:
            training = {**asdict(self.optimisation), **asdict(self.scoring)}
            for left_out in ("seed", "report_to", "log_steps", "save_steps", "mpo_lr"):
                del training[left_out]
            names = ("score_lr", "epochs", "steps", "initial_sparsity", "initial_warmup", "final_warmup", "faithful")
            options |= training | {name: getattr(self, name) for name in names}
        if self.teacher:
            options |= {"teacher": Path(self.teacher).name, "distill_weight": self.distill_weight}
            options |= {"temperature": self.temperature, "distill_hidden": self.distill_hidden}
        return options


def check_options(config: SparsifyConfig) -> None:
    """`UsageError` for options that contradict one another."""
    method = config.method
    if not 0 < config.sparsity < 1:
        raise UsageError(f"--sparsity {config.sparsity}: must lie between 0 and 1", hint="write 90 % as 0.9")
    fixed = config.pattern.sparsity
    if fixed is not None and abs(fixed - config.sparsity) > 1e-9:
        raise UsageError(
            f"--pattern {config.pattern} is a sparsity of {fixed:g}, --sparsity says {config.sparsity:g}",
            hint="leave --sparsity out",
        )
    if method in _LEARNT and not config.trains:
        raise UsageError(
            f"--method {method} learns what to prune, and there is no --train",
            hint="name --task and --train, or use --method magnitude, wanda or sparsegpt",
        )
    if method in CALIBRATED and config.calibration is None:
        raise UsageError(
            f"--method {method} looks at activations, and there is no --calibrate",
            hint="name a text file: --calibrate wiki.train.txt",
        )
    if config.trains:
        config.schedule(100)  # its own errors
