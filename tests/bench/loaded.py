"""What the models in some folders compute, for a process of its own that has imported mpocli or has not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_models
import torch
from transformers.utils import logging


def build(family: str, directory: str) -> None:
    """Save a family's model."""
    logging.set_verbosity_error()
    tiny_models.save(tiny_models.FAMILIES[family], Path(directory))


def measure(family: str, *directories: str) -> None:
    """Load each as a user would and keep its outputs in `<directory>.pt`; print, as JSON, why some cannot be.

    `ratio` is run once more when it is dequantised, for `ratio.dequantised.pt`.
    """
    logging.set_verbosity_error()
    row = tiny_models.FAMILIES[family]
    problems: dict[str, str] = {}
    for directory in directories:
        try:
            model, about = row.model_class.from_pretrained(directory, output_loading_info=True)
            keep = {kind: sorted(map(str, keys)) for kind, keys in about.items() if kind.endswith("_keys")}
            torch.save({"outputs": tiny_models.outputs(row, model.eval()), **keep}, f"{directory}.pt")
            if directory == "ratio":
                dense: Any = model.dequantize() or model
                torch.save({"outputs": tiny_models.outputs(row, dense), **keep}, f"{directory}.dequantised.pt")
        except Exception as error:
            told = (str(error).strip().splitlines() or [""])[0]
            problems[directory] = f"does not load or run: {type(error).__name__}: {told}"
    print(json.dumps(problems))
