"""A command's configurations as options of Typer: the only place where the two meet."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mpocli.config import page, text
from mpocli.config.option import Declared, Group, build, declared, one_declared, parts

_TYPES = (bool, int, float, Path)


def translated(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer takes it: each parameter that is a configuration replaced by its options.

    Of a call's values the configurations are built, with all bounds checked, before the command sees them.
    """
    configs: dict[str, tuple[Any, Group]] = {}
    found: list[Declared] = []
    own: dict[str, Declared] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind, metadata = parts(parameter.annotation)
        if is_dataclass(kind):
            chosen = next((one for one in metadata if isinstance(one, Group)), Group())
            configs[parameter.name] = kind, chosen
            found += declared(kind, chosen)  # type: ignore[arg-type]
        else:
            found.append(one_declared(parameter.name, kind, metadata, parameter.default))
            own[parameter.name] = found[-1]

    def call(**given: Any) -> None:
        built = {name: build(config, given, chosen) for name, (config, chosen) in configs.items()}
        values = {name: one.option.value(given[one.option.key], one.choices) for name, one in own.items()}
        command(**values, **built)

    shown = [_parameter(one) for one in _on_page(found)]
    call.__doc__ = command.__doc__
    call.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return call


def _parameter(one: Declared) -> inspect.Parameter:
    """An option as Typer reads it from a signature."""
    option = one.option
    kind: Any = one.kind if one.kind in _TYPES and option.parse is None else str
    named: dict[str, Any] = {"help": option.help, "metavar": option.metavar, "rich_help_panel": option.panel}
    if not option.name.startswith("-"):
        annotation = Annotated[kind, typer.Argument(show_default=False, **named)]
        return inspect.Parameter(option.key, inspect.Parameter.KEYWORD_ONLY, annotation=annotation)
    if option.several:
        kind = list[str] | None
    elif one.default is None:
        kind = kind | None
    info = typer.Option(*option.names, parser=_share(option.name) if option.share else None, **named)
    annotation = Annotated[(kind, info, *one.markers)]  # type: ignore[misc]
    return inspect.Parameter(option.key, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=annotation)


def _share(name: str) -> Callable[[str | float], float]:
    """What reads an option that is a share."""
    return lambda given: text.share(given, name) if isinstance(given, str) else given


def _on_page(options: Iterable[Declared]) -> list[Declared]:
    """Panel by panel, in the order of the page."""
    panels: dict[str | None, list[Declared]] = {}
    for one in options:
        panels.setdefault(one.option.panel, []).append(one)
    made: list[Declared] = []
    for panel in sorted(panels, key=page.panel_place):
        made += sorted(panels[panel], key=lambda one: page.place(one.option.key, panel))
    return made
