"""The model that a command trains: loaded for its task, counted, and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mpocli.errors import NumericsError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.replace import local_name
from mpocli.methods.data.task import TaskData
from mpocli.nn.packed import is_packed
from mpocli.train.loop.updates import roles
from mpocli.train.models import listed, load_model


def load_student(
    checkpoint: Checkpoint,
    data: TaskData,
    *,
    trust_remote_code: bool,
    warn: Callable[[str], None] | None = None,
) -> Any:
    """The model that a task trains, in float32, with a padding token. What is sparse in it stays so.

    `warn` is told of a head that begins at random; without it a checkpoint that lacks one is an `InputError`.
    """

    def say(names: list[str]) -> None:
        assert warn is not None
        warn(f"new for task {data.task.name}, and random at first: {listed(names)}")

    model = load_model(
        checkpoint.source.directory,
        checkpoint.config,
        data.task,
        data.family,
        data.label_names,
        trust_remote_code=trust_remote_code,
        on_new=say if warn else None,
    )
    if not data.vocabulary.knows(getattr(model.config, "pad_token_id", None)):
        model.config.pad_token_id = data.pad
    if data.task.kind == "regression" and data.train and not has_head(checkpoint):
        _start_at_the_mean(model, [float(feature["labels"]) for feature in data.train])
    return model


def has_head(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint was saved with a classifier, which then was trained."""
    return checkpoint.architecture.endswith("ForSequenceClassification")


@torch.no_grad()
def _start_at_the_mean(model: Any, scores: Sequence[float]) -> None:
    """Let a new regression head begin at the mean of the training scores.

    From zero, the first hundreds of steps only push all outputs towards that mean, and do so by making the features
    of all inputs alike: a state that small models leave late or never.
    """
    heads = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1]
    if heads and heads[-1].bias is not None:
        heads[-1].bias.fill_(sum(scores) / len(scores))


def roles_of(model: Any, checkpoint: Checkpoint) -> dict[str, str | None]:
    """The role of every matrix, by the module's name in this model's class."""
    members = ((member.name, weight.role) for weight in checkpoint.survey.weights for member in weight.members)
    return {local_name(model, name) or name: role for name, role in members}


def count_trainable(model: Any) -> tuple[int, dict[str, int]]:
    counts = {"auxiliary": 0, "central": 0, "other": 0}
    for _, parameter, role in roles(model):
        if parameter.requires_grad:
            counts[role] += parameter.numel()
    return sum(counts.values()), counts


def check_finite(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if not is_packed(parameter) and not bool(torch.isfinite(parameter).all()):
            raise NumericsError(f"{name} is not finite after training", hint="lower --lr or --mpo-lr")
