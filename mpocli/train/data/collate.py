"""Padded batches of encoded rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # the label that transformers' losses leave out


def collate(
    features: Sequence[Mapping[str, Any]],
    pad_id: int,
    label_pad: int = IGNORE,
    pad_to_multiple_of: int | None = None,
    side: Literal["right", "left"] = "right",
) -> dict[str, Tensor]:
    """A batch as long as its longest row, or the next multiple: (B, L) ids, and labels (B,) or (B, L_target).

    Class labels are int64, scores float32, token labels padded with `label_pad` (ignored by the loss). `side="left"`
    is for generating from a causal model, which goes on from the last place.
    """
    fills = {"input_ids": pad_id, "attention_mask": 0, "token_type_ids": 0, "labels": label_pad}
    batch = {}
    for key, fill in fills.items():
        if key not in features[0]:
            continue
        values = [feature[key] for feature in features]
        if isinstance(values[0], Sequence):
            batch[key] = _padded(values, fill, pad_to_multiple_of or 1, side)
        else:
            batch[key] = torch.tensor(values, dtype=torch.float32 if isinstance(values[0], float) else torch.int64)
    return batch


def _padded(rows: Sequence[Sequence[int]], fill: int, multiple: int, side: str) -> Tensor:
    length = -(-max(len(row) for row in rows) // multiple) * multiple
    padded = np.full((len(rows), length), fill, dtype=np.int64)
    for place, row in zip(padded, rows, strict=True):
        if side == "right":
            place[: len(row)] = row
        else:
            place[length - len(row) :] = row
    return torch.from_numpy(padded)
