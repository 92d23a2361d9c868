"""The application: its commands, and how errors leave the process."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any, NoReturn

import typer

from mpocli import __version__
from mpocli.cli.commands import decompose, demo, inspect, merge
from mpocli.errors import MpoError

app = typer.Typer(
    name="mpocli",
    help="Compress pretrained language models with matrix product operators (MPO).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("decompose")(decompose.command)
app.command("inspect")(inspect.command)
app.command("merge")(merge.command)
app.command("demo")(demo.command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mpocli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Compress pretrained language models with matrix product operators (MPO)."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 a bug, 2 usage, 3 input, 4 numerics, 5 target missed, 130 stopped."""
    command: Any = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="mpocli", standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # typer has turned the interrupt into an exit of its own
            raise KeyboardInterrupt
    except MpoError as error:
        code = _say(error.message, error.hint, error.exit_code)
    except BrokenPipeError:
        # `mpocli … | head`: the reader left, and Python's own flush at exit must not complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (KeyboardInterrupt, typer.Abort):
        code = _say("interrupted; nothing half-written was left", "", 130)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of typer's own
            code = _usage(error)
        else:
            traceback.print_exc()
            code = _say(f"this is a bug in mpocli: {type(error).__name__}", "please report it with the lines above", 1)
    sys.exit(code)


def _usage(error: Any) -> int:
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        if message:
            typer.echo(message)
        return 2
    context = getattr(error, "ctx", None)
    where = context.command_path if context else "mpocli"
    return _say(message.replace("\n", " "), f"see {where} --help", int(error.exit_code))


def _say(message: str, hint: str, code: int) -> int:
    typer.echo(typer.style("error: ", fg="red", bold=True) + message, err=True)
    if hint:
        typer.echo(typer.style("  try: ", fg="cyan") + hint, err=True)
    return code
