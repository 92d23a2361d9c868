"""Options that some models have no use for, refused once the model is known."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from mpocli.config.modes import OfModel
from mpocli.config.option import Option, parts
from mpocli.errors import UsageError


def check_model(config: object, model: str, traits: Collection[str]) -> None:
    """`UsageError` for the first field that differs from its default and is of models without these `traits`.

    `config` is a dataclass whose fields may be dataclasses in turn; where no option is declared, a field `top_n` is
    `--top-n`.
    """
    for name, value, markers in _changed(config):
        for marker in markers:
            if marker.of and str(value) not in marker.of:
                continue
            if not set(marker.traits) & set(traits):
                option = name + (f" {value}" if marker.of else "")
                raise UsageError(f"{option}: {model} {marker.lacking}", hint=marker.hint or "leave it out")


def _changed(config: object) -> Iterator[tuple[str, Any, list[OfModel]]]:
    """Options whose fields differ from their defaults, with what they ask of the model."""
    assert is_dataclass(config)
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _changed(value)
        elif value != field.default:
            _, metadata = parts(hints[field.name])
            name = next((found.name for found in metadata if isinstance(found, Option)), "")
            yield (
                name or f"--{field.name.replace('_', '-')}",
                value,
                [found for found in metadata if isinstance(found, OfModel)],
            )
