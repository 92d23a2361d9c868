"""The two streams of the command line, safe for any name; what a command finds, for people or for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from mpocli.cli import streams
from mpocli.printable import printable

# Where no terminal says how wide it is (a pipe, a log), tables are never squeezed.
_PIPE_WIDTH = 160


class SafeConsole(Console):
    """The one boundary to the terminal: names come out of foreign files, and nothing in them styles, moves or hides
    what is printed. Markup is off unless a call asks for it, which only text with numbers of ours may do."""

    def render_str(self, text: str, *args: Any, **kwargs: Any) -> Text:
        """Every string that is printed comes by, cells of tables too. Only a line of its own is a line's end."""
        inner = text.strip("\n")
        start = text.index(inner) if inner else len(text)
        shown = text[:start] + printable(inner) + text[start + len(inner) :]
        return super().render_str(shown, *args, **kwargs)

    def on_broken_pipe(self) -> None:
        """`mpocli … | head`: go on without the reader, so that the exit code is the command's own.

        rich would leave the process here, and `inspect --verify` without the verdict.
        """
        streams.silence(self.file)


PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
_PIPED = not sys.stdout.isatty()
out = SafeConsole(width=_PIPE_WIDTH if _PIPED else None, soft_wrap=_PIPED, **PLAIN)
err = SafeConsole(stderr=True, soft_wrap=True, **PLAIN)


def report(command: str, found: Any, show: Callable[[], None], *, json: bool) -> None:
    """A command's result: what `show` prints, or one JSON object in the place of all that goes to stdout.

    Notices and warnings go to stderr either way.
    """
    out.quiet = json
    try:
        show()
    finally:
        out.quiet = False
    if json:
        print_json(command, found)


def print_json(command: str, report: Any, **extra: Any) -> None:
    """One object, `schema` first, never NaN."""
    data = {"schema": f"mpocli.{command}/1", **asdict(report), **extra}
    data.pop("is_writer", None)  # the one that prints is
    try:
        sys.stdout.write(json.dumps(data, allow_nan=False) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has left
        streams.silence(sys.stdout)


def warn(line: str) -> None:
    """What a user should know before the work begins."""
    err.print(spans((line, "yellow")))


def spans(*parts: str | tuple[str, str]) -> Text:
    """A line of pieces, each plain or (text, style), with nothing in them taken for markup."""
    shown = ((printable(part), "") if isinstance(part, str) else (printable(part[0]), part[1]) for part in parts)
    return Text.assemble(*shown)
