"""What a batch's labels ask to be predicted: how many items its loss is the mean over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mpocli.nn.evaluating import evaluating
from mpocli.train.data.collate import IGNORE


def predictions(labels: Tensor, *, next_token: bool) -> Tensor:
    """How many of a batch's labels are asked for, as a tensor of no dimension.

    The first token of a row never is, where the model is a causal language model (`next_token`).

    >>> labels = torch.tensor([[5, 6, IGNORE], [7, 8, 9]])
    >>> [int(predictions(labels, next_token=causal)) for causal in (False, True)]
    [5, 3]
    """
    counted = labels[..., 1:] if next_token else labels
    return (counted != IGNORE).sum()


def shifts_labels(model: Any) -> bool:
    """Whether a language model's own loss compares its prediction at a place with the label of the next one.

    Most that write from left to right do, whatever their class is called; the others (XLM, XLNet) want labels that are
    shifted already. Asked of the loss itself: where the first of two labels alone is given, nothing is left to predict.
    """
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    labels = torch.tensor([[0, IGNORE]], device=model.device)
    with evaluating(model):
        loss = float(model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)["loss"])
    return not loss > 0  # nothing: NaN or zero


def shifted(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch whose labels (B, L) stand where they are predicted from."""
    labels = inputs["labels"]
    last = torch.full_like(labels[:, :1], IGNORE)
    return {**inputs, "labels": torch.cat([labels[:, 1:], last], 1)}
