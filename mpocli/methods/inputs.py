"""The paths that a command reads, by the options that name them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from mpocli.config.option import Declared, members


def paths_read(model: Path, config: Any) -> dict[str, list[str | Path]]:
    """The model's directory, and all that a configuration (with those in it) names."""
    found: dict[str, list[str | Path]] = {"the input": [model]}
    for option, value in _named(config):
        found.setdefault(option, []).extend([value] if isinstance(value, str) else value)
    return found


def _named(config: Any) -> Iterator[tuple[str, Any]]:
    for member in members(type(config)) if is_dataclass(config) else ():
        value = getattr(config, member.field)
        if not isinstance(member, Declared):
            yield from _named(value)
        elif value and member.option.reads:
            yield member.option.name, value
