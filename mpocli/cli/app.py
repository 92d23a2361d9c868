"""The application: its commands, and how errors leave the process."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from typing import Any, NoReturn

import typer

from mpocli import __version__
from mpocli.cli import notices, signals, streams
from mpocli.cli.group import Group, add_commands
from mpocli.cli.settings import as_options
from mpocli.errors import MpoError
from mpocli.printable import printable

app = typer.Typer(
    name="mpocli",
    cls=Group,
    help="Compress pretrained language models with matrix product operators (MPO).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
add_commands(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mpocli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Compress pretrained language models with matrix product operators (MPO)."""


@functools.cache
def _command() -> Any:
    """What typer makes of the names."""
    return typer.main.get_command(app)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 a bug, 2 usage, 3 input, 4 numerics, 5 target missed, 128 + n ended by
    signal n (130 Ctrl-C, 143 SIGTERM, 129 SIGHUP)."""
    streams.reopen()
    with signals.as_interrupts() as ending, notices.shown():
        code = _run(arguments, ending)
    sys.exit(code)


def _run(arguments: list[str] | None, ending: signals.Ending) -> Any:
    try:
        code = _command().main(arguments, prog_name="mpocli", standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # typer has turned the interrupt into an exit of its own
            raise KeyboardInterrupt
    except MpoError as error:
        code = _say(as_options(error.message), as_options(error.hint), error.exit_code)
    except SystemExit as stop:  # typer and older versions of rich make one of a broken pipe
        code = _reader_left() if isinstance(stop.__context__, BrokenPipeError) else stop.code
    except BrokenPipeError:
        code = _reader_left()
    except (KeyboardInterrupt, typer.Abort):
        code = _interrupted(ending)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of typer's own
            code = _usage(error)
        elif ending.signal is not None:  # it came of the interrupt: a terminal that is gone, say
            code = _interrupted(ending)
        elif isinstance(error, OSError) and streams.has_no_room(error):
            streams.silence(sys.stdout)
            problem = f"standard output cannot be written ({error.strerror})"
            code = _say(problem, "free some space, or send the output elsewhere", 3)
        elif isinstance(error, OSError) and streams.is_refused(error):
            name = printable(os.fsdecode(error.filename))
            problem = f"{name if len(name) <= 200 else name[:199] + '…'}: {error.strerror}"
            code = _say(problem, "check the path, its permissions and the disk", 3)
        else:
            sys.stderr.write(printable(traceback.format_exc(), keep="\n"))
            code = _say(f"this is a bug in mpocli: {type(error).__name__}", "please report it with the lines above", 1)
    return code


def _interrupted(ending: signals.Ending) -> int:
    return _say(f"{ending.reason}; nothing half-written was left", "", ending.exit_code)


def _usage(error: Any) -> int:
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        if message:
            typer.echo(message)
        return 2
    context = getattr(error, "ctx", None)
    where = context.command_path if context else "mpocli"
    return _say(message.replace("\n", " "), f"see {where} --help", int(error.exit_code))


def _reader_left() -> int:
    """`mpocli … | head` is no error, and Python's own flush at exit must not complain either."""
    for stream in (sys.stdout, sys.stderr):
        if streams.stuck(stream):
            streams.silence(stream)
    return 0


def _say(message: str, hint: str, code: int) -> int:
    """One line of what is wrong and one of what to try, whatever the names in them are made of."""
    try:
        typer.echo(typer.style("error: ", fg="red", bold=True) + printable(message), err=True)
        if hint:
            typer.echo(typer.style("  try: ", fg="cyan") + printable(hint), err=True)
    except OSError:  # nobody can be told; the exit code still says it
        streams.silence(sys.stderr)
    return code
