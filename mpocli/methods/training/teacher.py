"""The teacher that a command distils from: loaded, and compared with its student."""

from __future__ import annotations

from mpocli.config.distillation import DistillationOptions
from mpocli.errors import InputError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.memory import forget_parts
from mpocli.methods.data.task import TaskData, check_trained_head
from mpocli.train.loop.distill import Distillation
from mpocli.train.models import load_model


def distillation_of(
    config: DistillationOptions | None, data: TaskData, checkpoint: Checkpoint, *, trust_remote_code: bool
) -> Distillation | None:
    """None without a teacher. Raises `InputError` for one that was not trained, or has another vocabulary."""
    if config is None:
        return None
    found = Checkpoint.open(config.teacher, trust_remote_code=trust_remote_code)
    check_trained_head(found, data)
    teacher = load_model(
        found.source.directory,
        found.config,
        data.task,
        data.family,
        data.label_names,
        trust_remote_code=trust_remote_code,
    )
    sizes = found.config.vocab_size, checkpoint.config.vocab_size
    if sizes[0] != sizes[1]:
        raise InputError(
            f"--teacher {config.teacher}: a vocabulary of {sizes[0]}, the student has {sizes[1]}",
            hint="teacher and student must share a tokenizer",
        )
    forget_parts(teacher)  # nobody saves it
    return Distillation(
        teacher.requires_grad_(False),
        config.distill_weight,
        config.temperature,
        config.distill_hidden,
        next_token=data.family == "causal",
    )
