"""transformers' `TrainingArguments` for a segment."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import TrainingArguments

from mpocli.config.optimisation import Optimisation
from mpocli.train.loop.schedule import SegmentPlace

# A checkpoint costs about as much as three steps: no more often than this, if nobody says so.
_LEAST_SAVE_STEPS = 100


def training_arguments(
    chosen: Optimisation,
    steps: int,
    directory: Path,
    device: torch.device,
    place: SegmentPlace | None,
    *,
    checkpoints: bool,
) -> TrainingArguments:
    """The arguments of a segment of so many `steps`, written to `directory`; `place` where it is one of many."""
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=chosen.batch_size,
        gradient_accumulation_steps=chosen.accumulation,
        max_steps=steps,
        learning_rate=chosen.lr,
        max_grad_norm=chosen.clip,
        bf16=chosen.precision == "bf16",
        use_cpu=device.type == "cpu",
        logging_steps=chosen.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if checkpoints else "no",
        save_steps=chosen.save_steps or _save_steps(steps, chosen.log_steps),
        save_total_limit=2,
        report_to=list(chosen.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        seed=chosen.seed + (1_000_003 * place.number if place else 0),
        data_seed=chosen.seed,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several devices are several processes, never threads of one
    return arguments


def _save_steps(steps: int, log_steps: int) -> int:
    """A tenth of all steps, and a multiple of the logged ones: a resumed run then logs the same averages."""
    return math.ceil(max(_LEAST_SAVE_STEPS, steps // 10) / log_steps) * log_steps
