"""Options of `mpocli sparsify`, and whether they can be meant together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mpocli.config import common
from mpocli.config.bounds import finite, positive
from mpocli.config.calibration import Calibration
from mpocli.config.data import ROWS_OF_TASK, DataOptions
from mpocli.config.distillation import DistillationOptions
from mpocli.config.modes import ALWAYS, Condition, excludes, needs
from mpocli.config.optimisation import Epochs, Optimisation, StepCount
from mpocli.config.option import Option, group, recorded
from mpocli.config.page import HOW, LOOK, PRUNED, PST, RISE
from mpocli.config.scoring import LEARNT, TRAINED, Scoring
from mpocli.errors import InputError, UsageError
from mpocli.sparse.schedule import CubicSchedule

if TYPE_CHECKING:
    from mpocli.sparse import Pattern
else:  # it needs torch
    Pattern = Any

Method = Literal["pst", "magnitude", "movement", "wanda", "sparsegpt"]
CALIBRATED = ("wanda", "sparsegpt")
DEFAULT_ROLES = ("attention", "ffn")
_TAUGHT = ("pst", "movement")

_TASKED = needs("--task")
_MEASURED = needs("--eval", "--test", why="nothing is measured")
_TRAINED_OR_MEASURED = needs("--train", "--eval", "--test", why="nothing is trained or measured")
_LOOKED_AT = needs("--calibrate", why="there is nothing to look at")
_SCORED = needs("--method pst", "--method movement", why="it has no scores")
_GROUPED = Condition("--pattern", test=lambda pattern: pattern != "unstructured")


def _pattern(text: str, option: str) -> Pattern:
    from mpocli.sparse import Pattern

    try:
        return Pattern.parse(text)
    except InputError as error:
        raise UsageError(f"{option} {text!r} is not known", hint=error.hint) from error


def _unstructured() -> Pattern:
    from mpocli.sparse import Pattern

    return Pattern()


@dataclass(frozen=True)
class SparsifyConfig:
    """Options of `mpocli sparsify`. `score_lr` None stands for the learning rate; `scoring` is what `method` learns."""

    sparsity: Annotated[
        float,
        Option(
            "--sparsity",
            "Zeros / entries. Default: 0.9, or N:M's.",
            "X",
            PRUNED,
            short="-s",
            check=finite,
            default=None,
            share=True,
        ),
        ALWAYS,
    ] = 0.9
    method: Annotated[
        Method,
        Option(
            "--method", "pst, movement (both trained), magnitude (trained or not), wanda, sparsegpt.", "HOW", PRUNED
        ),
        ALWAYS,
    ] = "pst"
    scope: Annotated[
        Literal["matrix", "global"],
        Option("--scope", "A threshold for each matrix, or global.", "WHAT", PRUNED),
        excludes("--method wanda", "--method sparsegpt", _GROUPED, of=("global",), why="it compares inside rows"),
    ] = "matrix"
    layers: Annotated[common.Roles, {"help": "Of which roles. Default: attention,ffn.", "panel": PRUNED}, ALWAYS] = None
    targets: Annotated[common.Targets, {"panel": PRUNED}] = ()
    ignore: Annotated[common.Ignored, {"panel": PRUNED}] = ()
    storage: Annotated[
        Literal["bitmask", "dense"],
        Option("--storage", "bitmask, or dense: zeros that any loader reads.", "HOW"),
        ALWAYS,
    ] = "bitmask"
    pattern: Annotated[
        Pattern,
        Option(
            "--pattern",
            "unstructured, 2:4, 4:8 or any N:M.",
            "WHAT",
            PRUNED,
            parse=_pattern,
            default="unstructured",
            recorded=str,
        ),
        ALWAYS,
    ] = field(default_factory=_unstructured)
    calibration: Annotated[
        Calibration | None,
        group(
            source=(
                {"help": "Text; with --task rows of that task.", "panel": LOOK},
                needs("--method wanda", "--method sparsegpt", why="it looks at no activations"),
            ),
            samples=({"panel": LOOK}, _LOOKED_AT),
            seq_len=({"panel": LOOK}, _LOOKED_AT, excludes(ROWS_OF_TASK, why="rows are cut by --max-length")),
        ),
    ] = None
    data: Annotated[
        DataOptions | None,
        group(
            _TASKED,
            task=(needs("--train", "--eval", "--test", "--calibrate"),),
            train=(
                _TASKED,
                excludes(
                    "--method wanda",
                    "--method sparsegpt",
                    why="it needs no training",
                    hint="leave --train out; mpocli finetune keeps the zeros afterwards",
                ),
            ),
            limit=(TRAINED,),
            max_length=(needs("--train", "--eval", "--test", ROWS_OF_TASK, why="windows take --seq-len"),),
            eval_batch_size=(_MEASURED,),
            max_new_tokens=(_MEASURED,),
        ),
    ] = None
    optimisation: Annotated[
        Optimisation,
        group(
            TRAINED,
            without=("mpo_lr",),
            precision=(_TRAINED_OR_MEASURED,),
            seed=({"help": "Of masks, samples, order and dropout."},),
        ),
    ] = field(default_factory=Optimisation)
    scoring: Scoring = field(default_factory=Scoring)
    score_lr: Annotated[
        float | None,
        Option("--score-lr", "Of the scores. Default: --lr.", "X", HOW, check=positive),
        TRAINED,
        _SCORED,
    ] = None
    epochs: Annotated[Epochs, TRAINED] = 3.0
    steps: Annotated[StepCount, TRAINED] = None
    initial_sparsity: Annotated[
        float, Option("--initial-sparsity", "At the first step.", "X", RISE, share=True), TRAINED
    ] = 0.0
    initial_warmup: Annotated[
        float, Option("--initial-warmup", "Share of steps before.", "X", RISE, share=True), TRAINED
    ] = 0.1
    final_warmup: Annotated[
        float, Option("--final-warmup", "Share of steps after.", "X", RISE, share=True), TRAINED
    ] = 0.3
    faithful: Annotated[
        bool, Option("--faithful", "Freeze the head, as the published code.", panel=PST), LEARNT, TRAINED
    ] = False
    distillation: Annotated[DistillationOptions | None, group(teacher=(TRAINED,))] = None
    max_shard_bytes: Annotated[common.ShardBytes, {"recorded": False}] = 5 * 10**9
    device: common.Device = "auto"
    revision: common.Revision = None
    trust_remote_code: common.TrustRemoteCode = False

    @classmethod
    def from_options(
        cls, sparsity: float | None, method: Method, pattern: Pattern, scoring: Scoring, **given: Any
    ) -> SparsifyConfig:
        return cls(
            pattern.sparsity or 0.9 if sparsity is None else sparsity,
            method,
            pattern=pattern,
            scoring=scoring if method == "pst" else Scoring.of(method),
            **given,
        )

    @property
    def trains(self) -> bool:
        return self.data is not None and self.data.train is not None

    def schedule(self, steps: int) -> CubicSchedule:
        """Of the sparsity, over the steps of a run."""
        return CubicSchedule(steps, self.sparsity, self.initial_sparsity, self.initial_warmup, self.final_warmup)

    def recorded(self) -> dict[str, Any]:
        """The options for the manifest: names of files without their folders, nothing of the machine."""
        training = ("optimisation", "scoring", "score_lr", "epochs", "steps", "initial_sparsity", "initial_warmup")
        return recorded(self, () if self.trains else (*training, "final_warmup", "faithful"))


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
    if method in _TAUGHT and not config.trains:
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
