"""The paths that a command reads, by the options that name them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

# Fields of configurations that hold the name of a file, a directory or something on the hub.
_OPTIONS = {
    "train": "--train",
    "eval": "--eval",
    "test": "--test",
    "tokenizer": "--tokenizer",
    "teacher": "--teacher",
    "score_from": "--score-from",
    "source": "--calibrate",
}


def paths_read(model: Path, config: Any) -> dict[str, list[str | Path]]:
    """The model's directory, and all that a configuration (with those in it) names."""
    found: dict[str, list[str | Path]] = {"the input": [model]}
    for option, value in _named(config):
        found.setdefault(option, []).extend([value] if isinstance(value, str) else value)
    return found


def _named(config: Any) -> Iterator[tuple[str, Any]]:
    for field in fields(config) if is_dataclass(config) else ():
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _named(value)
        elif value and field.name in _OPTIONS:
            yield _OPTIONS[field.name], value
