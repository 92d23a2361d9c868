"""The rounds of a squeeze as a table, and live while they come."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from mpocli.cli import console, tables, wording
from mpocli.printable import printable

if TYPE_CHECKING:
    from mpocli.methods.squeeze.rounds import Watch
    from mpocli.methods.squeeze.state import RoundRecord

# Of the rounds so far, so many stay in sight.
_SHOWN = 12


@contextmanager
def live_rounds(*, enabled: bool = True) -> Iterator[Watch]:
    """Whom `squeeze` tells: a table that grows with a bar below it, or lines where no terminal is."""
    from mpocli.methods.squeeze.rounds import Watch

    if not enabled:
        yield Watch()
        return
    if not console.err.is_terminal:
        yield Watch(round=lambda record, metric: console.err.print(_line(record)))
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[line]}", style="dim", markup=False),
    )
    seen: list[RoundRecord] = []
    bar = Progress(*columns, console=console.err)
    task = bar.add_task("round 1", total=None, line="")
    with Live(bar, console=console.err, transient=True, refresh_per_second=4) as live:

        def step(done: int, total: int, line: str) -> None:
            bar.update(task, completed=done, total=total, line=printable(line))

        def finished(record: RoundRecord, metric: str) -> None:
            seen.append(record)
            bar.reset(task, description=f"round {record.round + 1}", total=None, line="")
            live.update(Group(_narrowed(seen[-_SHOWN:], metric), bar))

        yield Watch(step, finished)


def final_table(records: Sequence[RoundRecord], metric: str, *, kept: int) -> Table:
    """All columns, with names as long as the terminal has room for."""
    made = (rounds_table(records, metric, kept=kept, width=width) for width in (36, 24, 12))
    return tables.first_that_fits(made)


def _narrowed(records: Sequence[RoundRecord], metric: str) -> Table:
    """As it fits a terminal that is drawn over: shorter names, then fewer columns, never half a number."""
    fewer = ((), ("true",), ("true", "bound"), ("true", "bound", "from → to", "ratio"))
    made = (
        rounds_table(records, metric, width=width, left_out=left_out) for left_out in fewer for width in (36, 24, 12)
    )
    return tables.first_that_fits(made, console.err.width)


def rounds_table(
    records: Sequence[RoundRecord],
    metric: str,
    *,
    kept: int | None = None,
    width: int = 36,
    left_out: Collection[str] = (),
) -> Table:
    """One row a round; the one that was kept is marked. Module names are shortened to `width`."""
    columns = ("round", "<bond", "from → to", "bound", "true", "parameters", "ratio", metric, "drop", "<")
    shown = [column not in left_out for column in columns]
    table = tables.table(*compress(columns, shown))
    for record in records:
        what, widths = _bonds(record, width)
        bound, true = (_root(record, name) for name in ("error_bound", "true_error"))
        value = record.metrics.get(metric)
        cells = (
            str(record.round),
            what,
            widths,
            wording.error(bound),
            wording.error(true),
            f"{record.params:,}",
            f"{record.ratio:.3f}",
            "" if value is None else f"{value:.4f}",
            f"{record.drop:+.4f}",
            "kept" if record.round == kept else "",
        )
        table.add_row(*compress(cells, shown))
    return table


def _root(record: RoundRecord, name: str) -> float:
    """Of several bonds, the norm over all of them."""
    squares: list[Any] = [getattr(cut, name) ** 2 for cut in record.cuts]
    return float(sum(squares) ** 0.5)


def _bonds(record: RoundRecord, width: int = 36) -> tuple[str, str]:
    if not record.cuts:
        return "none: trained only", ""
    first = record.cuts[0]
    if len(record.cuts) == 1:
        return f"{wording.shortened(first.module, width)}:{first.bond}", f"{first.from_dim} → {first.to_dim}"
    roles = {cut.role or "other" for cut in record.cuts}
    widest, narrowest = max(cut.from_dim for cut in record.cuts), min(cut.to_dim for cut in record.cuts)
    what = f"{len(record.cuts)} {roles.pop() if len(roles) == 1 else 'bonds'}"
    bonds = {cut.bond for cut in record.cuts}
    return what + (f":{bonds.pop()}" if len(bonds) == 1 else ""), f"≤ {widest} → ≥ {narrowest}"


def _line(record: RoundRecord) -> str:
    what, widths = _bonds(record)
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in record.metrics.items())
    return f"round {record.round}: {what} {widths}, {record.params:,} parameters ({record.ratio:.3f}), {metrics}"
