"""Logits over a vocabulary, of which no more are held at a time than a limit says.

Of a batch of 8 × 512 tokens and a vocabulary of 49,152 they take 0.8 GB in float32, and every copy that a softmax or a
choice of rows makes as much again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# What a model may put out at once, in elements: 256 MB of float32, or a single row of the batch where that is more.
MOST_LOGITS = 1 << 26
# What is worked on at once: 32 MB.
_SLICE = 1 << 23


def rows_at_once(rows: int, length: int, vocabulary: int) -> int:
    """How many of a batch's `rows` sequences may go through a model at once, one at least.

    >>> rows_at_once(8, 512, 49_152), rows_at_once(8, 512, 300), rows_at_once(8, 8192, 151_936)
    (2, 8, 1)
    """
    return max(1, min(rows, MOST_LOGITS // max(1, length * vocabulary)))


def slices(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Consecutive parts of `tokens` predictions, each small enough to be copied some times."""
    step = max(1, min(_SLICE, MOST_LOGITS) // vocabulary)
    for first in range(0, tokens, step):
        yield slice(first, min(first + step, tokens))


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(softmax p ‖ softmax q) of logits (…, V), in nats: (…). What p rules out adds nothing.

    >>> kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.])
    """
    log_p, log_q = F.log_softmax(p, -1), F.log_softmax(q, -1)
    return torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


def drawn(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The softmax (N, V) in float32 of logits (N, V), and a label (N,) drawn from each row of it.

    The draw is one number a row and made on the CPU: the same on every device, and however rows are cut into parts.
    """
    chances = logits.float().softmax(-1)
    below = chances.cpu().double().cumsum(-1)
    numbers = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
    labels = torch.searchsorted(below, numbers * below[:, -1:], right=True)  # never one of no chance
    return chances, labels.squeeze(1).clamp_max(logits.shape[-1] - 1)


class SoftLoss(torch.autograd.Function):
    """Σ KL(softmax t/T ‖ softmax s/T) over the chosen predictions, as a function of s alone.

    `apply(s, t, places, T)`: logits (N, V) of student and teacher, the rows (K,) that count, the temperature. The
    gradient (softmax s/T − softmax t/T)/T is made along with the loss, a few rows at a time: autograd would keep
    half a dozen tensors of the logits' size.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, places: Tensor, temperature: float) -> Tensor:
        gradient = torch.zeros_like(student)
        total = student.new_zeros((), dtype=torch.float32)
        for part in slices(len(places), student.shape[-1]):
            rows = places[part]
            log_s, log_t = (F.log_softmax(z[rows].float() / temperature, -1) for z in (student, teacher))
            p = log_t.exp()
            total += torch.where(log_t.isneginf(), 0.0, p * (log_t - log_s)).sum()
            gradient[rows] = ((log_s.exp() - p) / temperature).to(gradient)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient), None, None, None
