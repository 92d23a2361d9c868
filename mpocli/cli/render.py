"""How results look: tables and bars for people, one JSON object for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mpocli.cli import streams
from mpocli.printable import printable

# Where no terminal says how wide it is (a pipe, a log), tables are never squeezed.
_PIPE_WIDTH = 160
# Seconds between two lines of progress there.
EVERY = 30.0


class _Console(Console):
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


_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
_PIPED = not sys.stdout.isatty()
out = _Console(width=_PIPE_WIDTH if _PIPED else None, soft_wrap=_PIPED, **_PLAIN)
err = _Console(stderr=True, soft_wrap=True, **_PLAIN)

ROLE_ORDER = ("embedding", "attention", "ffn", "pooler", "head", None)


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


@contextmanager
def progress_bar(what: str, *, enabled: bool = True) -> Iterator[Callable[[int, int, str], None] | None]:
    """A progress bar on stderr, as a callback (done, total, item); where no terminal is, a line now and then."""
    if not enabled:
        yield None
        return
    if not err.is_terminal:
        yield _now_and_then(what)
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[item]}", style="dim", markup=False),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=None, item="")

        def update(done: int, total: int, item: str) -> None:
            bar.update(task, completed=done, total=total, item=printable(shortened(item)))

        yield update


def _now_and_then(what: str) -> Callable[[int, int, str], None]:
    """What is done in a moment says nothing; what takes longer, where it is, twice a minute."""
    began = said = time.monotonic()

    def say(done: int, total: int, item: str) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= EVERY:
            said = now
            where = f" ({printable(shortened(item))})" if item else ""
            err.print(f"{what}: {done:,} of {total:,} after {now - began:.0f} s{where}")

    return say


@contextmanager
def training_bar(what: str, *, enabled: bool = True) -> Iterator[Callable[[int, int, str], None] | None]:
    """A progress bar with the loss beside it; where no terminal is, a line for every logged loss."""
    if not enabled or err.is_terminal:
        with progress_bar(what, enabled=enabled) as bar:
            yield bar
        return
    said = ""

    def say(done: int, total: int, line: str) -> None:
        nonlocal said
        if line and line != said:
            said = line
            err.print(f"step {done:,} of {total:,}: {line}")

    yield say


def warn(line: str) -> None:
    """What a user should know before the work begins."""
    err.print(spans((line, "yellow")))


def shortened(name: str, width: int = 44) -> str:
    """A module path that fits a column: its end says more than its beginning."""
    return name if len(name) <= width else "…" + name[-(width - 1) :]


def count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def spans(*parts: str | tuple[str, str]) -> Text:
    """A line of pieces, each plain or (text, style), with nothing in them taken for markup."""
    shown = ((printable(part), "") if isinstance(part, str) else (printable(part[0]), part[1]) for part in parts)
    return Text.assemble(*shown)


def size(number: int) -> str:
    """Bytes in decimal units, as file managers and hubs print them."""
    value, unit = float(number), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def ratio(after: int, before: int) -> str:
    return f"{after / before:.3f}" if before else ""


def metric(value: float) -> str:
    """Four decimals, or three digits of what is too large for them (perplexities of broken models)."""
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.2e}"


def error(value: float | None) -> str:
    if value is None:
        return "?"
    return "0" if value == 0 else f"{value:.1e}" if value < 1e-3 else f"{value:.3f}"


def table(*columns: str) -> Table:
    """A plain table: the first column to the left, numbers to the right. A leading `<` keeps one to the left."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for k, column in enumerate(columns):
        left = k == 0 or column.startswith("<")
        made.add_column(column.removeprefix("<"), justify="left" if left else "right", no_wrap=True)
    return made


def natural_width(made: Table) -> int:
    """The columns of a terminal that a table takes when nothing in it is cut or wrapped."""
    return made.__rich_measure__(out, out.options.update(max_width=10_000)).maximum


def first_that_fits(tables: Iterable[Table], width: int | None = None) -> Table:
    """The first table that a terminal of this width (default: stdout's) has room for, else the last."""
    made = None
    for made in tables:
        if natural_width(made) <= (out.width if width is None else width):
            break
    assert made is not None
    return made


def show(made: Table) -> None:
    """Print a table whole. In a terminal that is narrower than it is, columns that find no room follow below, with
    the first column again: no number is cut, and no line wraps. A pipe has no width."""
    parts = _parts(made, out.width) if out.is_terminal else [made]
    before = out.width
    for part in parts:
        out.width = max(before, natural_width(part))  # a single column may be too wide even so
        try:
            out.print(part)
        finally:
            out.width = before


def _parts(made: Table, width: int) -> list[Table]:
    """The table, or tables of some of its columns that are no wider than `width`, each with the first one."""
    parts: list[Table] = []
    left = list(range(1, len(made.columns)))
    while left:
        taken = len(left)
        while taken > 1 and natural_width(_columns(made, [0, *left[:taken]])) > width:
            taken -= 1
        parts.append(_columns(made, [0, *left[:taken]]))
        left = left[taken:]
    return parts if len(parts) > 1 else [made]


def _columns(made: Table, chosen: Sequence[int]) -> Table:
    """Some columns of a table, with its sections and the styles of its rows."""
    part = Table(box=made.box, pad_edge=False, collapse_padding=True)
    for k in chosen:
        column = made.columns[k]
        part.add_column(column.header, justify=column.justify, no_wrap=True)
    cells = [list(made.columns[k].cells) for k in chosen]
    for row, found in zip(made.rows, zip(*cells, strict=True), strict=True):
        part.add_row(*found, style=row.style, end_section=row.end_section)
    return part


def matrices(columns: Sequence[str], rows: Iterable[tuple[str, str | None, Sequence[str]]]) -> None:
    """A line for each matrix: its name, its role and cells of numbers. In a terminal that is too narrow for that the
    name has a line of its own; where the cells find no room on one line the last of them (bonds) has one too."""
    found = [(name, role or "", list(cells)) for name, role, cells in rows]
    wide = table("matrix", "<role", *columns)
    for name, role, cells in found:
        wide.add_row(name, role, *cells)
    if not out.is_terminal or natural_width(wide) <= out.width:
        show(wide)
        return
    titles = [column.removeprefix("<") for column in columns]
    widths = [max(map(len, cells)) for cells in zip(titles, *(cells for _, _, cells in found), strict=True)]
    own_line = 2 + sum(widths) + 2 * (len(widths) - 1) > out.width

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column.startswith("<") else cell.rjust(width)
            for cell, width, column in zip(cells, widths, columns, strict=True)
        ]
        if own_line:
            last = f"\n  {titles[-1]} {cells[-1]}" if cells is not titles and cells[-1] else ""
            return ("  " + "  ".join(padded[:-1])).rstrip() + last
        return ("  " + "  ".join(padded)).rstrip()

    out.print(line(titles), style="bold", soft_wrap=True)
    for name, role, cells in found:
        room = max(20, out.width - len(role) - 2)
        out.print(f"{shortened(name, room)}  {role}".rstrip(), style="bold", soft_wrap=True)
        for part in line(cells).split("\n"):
            out.print(part, soft_wrap=True)


def bonds(bond_dims: Sequence[int] | None) -> str:
    """The inner bonds of an MPO."""
    return " ".join(map(str, bond_dims[1:-1])) if bond_dims else ""


def by_role(modules: Iterable[Any]) -> list[tuple[str | None, list[Any]]]:
    """Modules grouped by role, in the order that tables use."""
    groups: dict[str | None, list[Any]] = {}
    for module in modules:
        groups.setdefault(module.role, []).append(module)
    return [(role, groups[role]) for role in ROLE_ORDER if role in groups]


def notes(modules: Iterable[Any]) -> list[str]:
    """Why selected matrices are what they were, one line for each role and reason, with numbers where they are the
    same."""
    grouped: dict[tuple[str, str, str], list[Any]] = {}
    for module in modules:
        if module.reason and module.reason != "not selected":
            what = "kept dense" if module.action == "kept" else "left as it was"
            grouped.setdefault((what, module.role or "other", module.reason.partition(" (")[0]), []).append(module)
    lines = []
    for (what, role, reason), members in grouped.items():
        name = f"{len(members)} {role} matrices" if len(members) > 1 else members[0].name
        full = {member.reason for member in members}
        lines.append(f"{what}: {name}: {full.pop() if len(full) == 1 else reason}")
    return lines


UNKNOWN = "?: not measured (a dry run, or weights that were trained or changed since)"
