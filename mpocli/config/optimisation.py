"""How to train: the options that are about steps, not about data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from mpocli.config import bounds
from mpocli.config.bounds import at_least, positive
from mpocli.config.data import PrecisionName
from mpocli.config.modes import ALWAYS, OF_CORES, excludes
from mpocli.config.option import Option
from mpocli.config.page import HOW
from mpocli.errors import UsageError

UPDATE = Option(
    "--update",
    "auxiliary, central or all; what is not decomposed is always trained. Default: auxiliary.",
    "CORES",
    HOW,
    check=lambda option, cores: bounds.one_of(option, cores, ("auxiliary", "central", "all")),
)
Epochs = Annotated[
    float,
    Option("--epochs", "Passes.", "X", HOW, check=positive),
    excludes("--steps", hint="leave one of them out"),
]
StepCount = Annotated[int | None, Option("--steps", "Instead of --epochs.", "N", HOW, check=at_least(1)), ALWAYS]
RecomputeWeights = Annotated[
    bool,
    Option("--recompute-weights", "Less memory: rebuild MPO weights twice.", panel=HOW, recorded=False),
    OF_CORES,
]


@dataclass(frozen=True)
class Optimisation:
    """How to optimise: the options of `finetune` that are about steps, not about data."""

    lr: Annotated[float, Option("--lr", "Peak learning rate.", "X", HOW, check=positive), ALWAYS] = 1e-4
    mpo_lr: Annotated[
        float | None, Option("--mpo-lr", "Of the cores. Default: --lr.", "X", HOW, check=positive), OF_CORES
    ] = None
    weight_decay: Annotated[float, Option("--weight-decay", "AdamW's, of matrices.", "X", HOW), ALWAYS] = 0.0
    warmup: Annotated[
        float, Option("--warmup", "Share of the steps.", "X", HOW, check=bounds.share, share=True), ALWAYS
    ] = 0.06
    clip: Annotated[float, Option("--clip", "Largest gradient norm.", "X", HOW), ALWAYS] = 1.0
    batch_size: Annotated[int, Option("--batch-size", "Per process.", "N", HOW, check=at_least(1)), ALWAYS] = 32
    accumulation: Annotated[int, Option("--accumulation", "Batches per step.", "N", HOW, check=at_least(1)), ALWAYS] = 1
    precision: PrecisionName = "fp32"
    gradient_checkpointing: Annotated[
        bool, Option("--gradient-checkpointing", "Less memory: recompute activations.", panel=HOW), ALWAYS
    ] = False
    group_by_length: Annotated[
        bool, Option("--random-batches", "Do not keep similar lengths together.", panel=HOW, negated=True), ALWAYS
    ] = True
    log_steps: Annotated[
        int, Option("--log-steps", "Steps per logged loss.", "N", check=at_least(1), recorded=False), ALWAYS
    ] = 50
    save_steps: Annotated[
        int | None,
        Option(
            "--save-steps",
            "Steps per checkpoint. Default: a tenth of all, at least 100.",
            "N",
            check=at_least(1),
            recorded=False,
        ),
        ALWAYS,
    ] = None
    report_to: Annotated[
        tuple[str, ...],
        Option("--report-to", "tensorboard, wandb, … as in the Trainer.", "NAME", several=True, recorded=False),
        ALWAYS,
    ] = ()
    seed: Annotated[
        int, Option("--seed", "Of order and dropout.", "N", recorded=False, check=bounds.seed(32)), ALWAYS
    ] = 0

    @classmethod
    def from_options(cls, **given: Any) -> Optimisation:
        """`UsageError` for factors that cannot be meant."""
        decay, clip = given["weight_decay"], given["clip"]
        if not 0 <= decay < float("inf") or not 0 < clip < float("inf"):
            raise UsageError(f"--weight-decay {decay}, --clip {clip}: must not be negative", hint="0 and 1 are usual")
        return cls(**given)
