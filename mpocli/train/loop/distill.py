"""Distillation: a teacher's logits, and its hidden states, in the student's loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mpocli.errors import InputError
from mpocli.nn.logits import SoftLoss
from mpocli.train.data.collate import IGNORE


@dataclass(frozen=True)
class Distillation:
    """A frozen teacher, and how much it counts: (1−weight)·task + weight·teacher (+ weight·hidden states).

    `next_token` says that the models are causal: their logits at a place are of the token after it.
    """

    teacher: Any
    weight: float = 0.5
    temperature: float = 2.0
    hidden: bool = False
    next_token: bool = False

    def loss(self, task_loss: Tensor, student: Any, inputs: dict[str, Tensor]) -> Tensor:
        """The student's loss, from its output on `inputs` (with hidden states if these are compared)."""
        with torch.no_grad():
            asked = {key: value for key, value in inputs.items() if key not in ("labels", "num_items_in_batch")}
            if self.teacher.config.is_encoder_decoder:
                asked["labels"] = inputs["labels"]  # its decoder reads them, shifted
            teacher = self.teacher(**asked, output_hidden_states=self.hidden)
        labels = inputs.get("labels")
        if student.logits.dim() == 3 and labels is not None and self.next_token:
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # place i predicts token i + 1
        soft = soft_loss(student.logits, teacher.logits, labels, self.temperature)
        total = (1 - self.weight) * task_loss + self.weight * soft
        if self.hidden:
            mask = inputs["attention_mask"]
            total = total + self.weight * hidden_loss(_states(student), _states(teacher), mask)
        return total


def soft_loss(student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) of the softened distributions (Hinton et al., 2015), averaged over predictions.

    (B, C) class logits, (B, L, V) token logits where `labels` (B, L) says which count, or (B, 1) scores, whose loss
    is the squared difference. Raises `InputError` for logits of different sizes.
    """
    if student.shape[-1] != teacher.shape[-1]:
        raise InputError(
            f"the teacher predicts {teacher.shape[-1]} classes, the student {student.shape[-1]}",
            hint="name a ‹teacher› of the same task and vocabulary",
        )
    if student.shape[-1] == 1:
        return F.mse_loss(student.float(), teacher.float())
    if student.dim() == 3 and labels is not None and labels.dim() == 2:
        places = (labels != IGNORE).reshape(-1).nonzero().squeeze(1)
    else:
        places = torch.arange(student.numel() // student.shape[-1], device=student.device)
    rows, taught = (logits.reshape(-1, logits.shape[-1]) for logits in (student, teacher))
    total: Tensor = SoftLoss.apply(rows, taught, places, temperature)  # type: ignore[no-untyped-call]
    return total / max(1, len(places)) * temperature**2


def hidden_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Mean squared difference of the hidden states (B, L, D) at real tokens, layer by layer.

    A deeper teacher is compared at evenly spaced layers, its first and last among them. Raises `InputError` for
    different widths.
    """
    if student[-1].shape[-1] != teacher[-1].shape[-1]:
        raise InputError(
            f"‹distill_hidden›: the teacher is {teacher[-1].shape[-1]} wide, the student {student[-1].shape[-1]}",
            hint="leave out ‹distill_hidden›",
        )
    steps = [round(k * (len(teacher) - 1) / max(1, len(student) - 1)) for k in range(len(student))]
    real = mask.bool()
    losses = [
        F.mse_loss(state[real].float(), teacher[step][real].float()) for state, step in zip(student, steps, strict=True)
    ]
    return torch.stack(losses).mean()


def _states(output: Any) -> tuple[Tensor, ...]:
    states = getattr(output, "hidden_states", None) or getattr(output, "encoder_hidden_states", None)
    assert states is not None
    return tuple(states)
