"""Every command of the application: options that were given outside their mode are refused before it runs."""

from __future__ import annotations

import inspect
from typing import Any

import typer
from typer.core import TyperCommand

from mpocli.config import modes


class Command(TyperCommand):
    """A command whose options' markers are heeded, whatever the command itself does."""

    def invoke(self, ctx: Any) -> Any:
        modes.check(options(ctx))
        return super().invoke(ctx)


def options(context: typer.Context) -> list[modes.Called]:
    """The options of a command that was called, with the markers of its function's parameters."""
    signature = inspect.signature(inspect.unwrap(context.command.callback or (lambda: None)), eval_str=True)
    found = []
    for parameter in context.command.params:
        name = parameter.name or ""
        if name not in signature.parameters or not parameter.opts[0].startswith("-"):
            continue
        source = context.get_parameter_source(name)
        found.append(
            modes.Called(
                name=next((opt for opt in parameter.opts if opt.startswith("--")), parameter.opts[0]),
                value=context.params.get(name),
                given=source is not None and source.name == "COMMANDLINE",
                markers=modes.markers_of(signature.parameters[name].annotation),
                metavar="" if getattr(parameter, "is_flag", False) else str(parameter.metavar or ""),
            )
        )
    return found
