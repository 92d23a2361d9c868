"""Tables that lose no digit, however narrow the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table

from mpocli.cli import console
from mpocli.cli.wording import shortened


def table(*columns: str) -> Table:
    """An empty plain table: the first column to the left, numbers to the right. A leading `<` keeps one to the left."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for k, column in enumerate(columns):
        left = k == 0 or column.startswith("<")
        made.add_column(column.removeprefix("<"), justify="left" if left else "right", no_wrap=True)
    return made


def natural_width(made: Table) -> int:
    """The columns of a terminal that a table takes when nothing in it is cut or wrapped."""
    return made.__rich_measure__(console.out, console.out.options.update(max_width=10_000)).maximum


def first_that_fits(tables: Iterable[Table], width: int | None = None) -> Table:
    """The first table that a terminal of this width (default: stdout's) has room for, else the last."""
    made = None
    for made in tables:
        if natural_width(made) <= (console.out.width if width is None else width):
            break
    assert made is not None
    return made


def show(made: Table) -> None:
    """Print a table whole. In a terminal that is narrower than it is, columns that find no room follow below, with
    the first column again: no number is cut, and no line wraps. A pipe has no width."""
    parts = _parts(made, console.out.width) if console.out.is_terminal else [made]
    before = console.out.width
    for part in parts:
        console.out.width = max(before, natural_width(part))  # a single column may be too wide even so
        try:
            console.out.print(part)
        finally:
            console.out.width = before


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
    if not console.out.is_terminal or natural_width(wide) <= console.out.width:
        show(wide)
        return
    titles = [column.removeprefix("<") for column in columns]
    widths = [max(map(len, cells)) for cells in zip(titles, *(cells for _, _, cells in found), strict=True)]
    own_line = 2 + sum(widths) + 2 * (len(widths) - 1) > console.out.width

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column.startswith("<") else cell.rjust(width)
            for cell, width, column in zip(cells, widths, columns, strict=True)
        ]
        if own_line:
            last = f"\n  {titles[-1]} {cells[-1]}" if cells is not titles and cells[-1] else ""
            return ("  " + "  ".join(padded[:-1])).rstrip() + last
        return ("  " + "  ".join(padded)).rstrip()

    console.out.print(line(titles), style="bold", soft_wrap=True)
    for name, role, cells in found:
        room = max(20, console.out.width - len(role) - 2)
        console.out.print(f"{shortened(name, room)}  {role}".rstrip(), style="bold", soft_wrap=True)
        for part in line(cells).split("\n"):
            console.out.print(part, soft_wrap=True)
