"""The commands by name: each is imported, and its signature read, when it is called and no sooner."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from mpocli.cli.command import Command
from mpocli.cli.translate import translated

# Name: (module below `mpocli.cli.commands`, the first line of its help). In the order of the help page.
COMMANDS = {
    "decompose": ("decompose", "Turn weight matrices into matrix product operators."),
    "plan": ("plan", "Show what `decompose` would choose for a budget, matrix by matrix."),
    "finetune": ("finetune", "Fine-tune a model on a task: of an MPO checkpoint, its auxiliary cores alone."),
    "squeeze": ("squeeze", "Shrink a fine-tuned MPO checkpoint bond by bond, fine-tuning in between."),
    "sparsify": ("sparsify", "Set most weights to zero, by training or at once, and store the others."),
    "quantize": ("quantize", "Round weights and cores to 8, 4, 3 or 2 bits, packed in the files."),
    "expand-moe": ("expand_moe", "Make experts of the feed-forward networks, which share their central cores."),
    "eval": ("evaluate", "Measure a checkpoint: the task's metrics, parameters, bytes, memory, latency."),
    "inspect": ("inspect", "Show what a checkpoint holds: parameters by role and matrix, bonds, errors, bytes."),
    "merge": ("merge", "Contract the MPOs back to an ordinary checkpoint, which loads with no mpocli installed."),
    "demo": ("demo", "Make two tiny language models, decompose them, load them, predict."),
}


@functools.cache
def command(name: str) -> Any:
    """The command `name`, with all its options: what Typer makes of a signature takes a while."""
    module = importlib.import_module(f"mpocli.cli.commands.{COMMANDS[name][0]}")
    alone = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    alone.command(name, cls=Command)(translated(module.command))
    return get_command(alone)


class _Commands(dict[str, Any]):
    """The commands by their names, each made when it is looked up: for whoever asks Typer for all of them."""

    def __getitem__(self, name: str) -> Any:
        return command(name)

    def get(self, name: str, default: Any = None) -> Any:
        return command(name) if name in self else default

    def values(self) -> Any:
        return [command(name) for name in self]

    def items(self) -> Any:
        return [(name, command(name)) for name in self]


class Group(TyperGroup):
    """Names and first lines of the commands suffice for its help, and for telling which of them is called."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._lines = dict(self.commands)
        self.commands = _Commands(self._lines)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self._lines)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self._lines.get(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, found, rest = super().resolve_command(ctx, args)
        return name, found if name is None else command(name), rest


def add_commands(app: typer.Typer) -> None:
    for name, (_, line) in COMMANDS.items():
        app.command(name, help=line)(_called_by_name)


def _called_by_name() -> None:
    raise AssertionError("`Group.resolve_command` gives the command itself")
