"""The columns of a table that a task reads."""

from __future__ import annotations

from collections.abc import Sequence

from mpocli.config.tasks import Task
from mpocli.errors import InputError, UsageError
from mpocli.train.data.table import Table, listed


def choose_columns(
    table: Table, task: Task, text_columns: Sequence[str], label_column: str | None, needs_labels: bool
) -> tuple[list[str], str | None]:
    """The text columns and the label column (None where it is not needed) among those of the table."""
    if len(text_columns) > 2:
        raise UsageError(f"‹text_column›: {len(text_columns)} given, at most two make one input")
    fields = tuple((name,) for name in text_columns) or task.texts
    if not fields:
        if len(table.names) > 1 or needs_labels:
            raise UsageError(
                f"‹task› {task.name} needs ‹text_column›; {table.source} has: {listed(table.names)}",
                hint="name one column, or two for pairs",
            )
        fields = (table.names,)  # one column: no doubt about which
    columns = [require_column(table, names, "text_column") for names in fields]
    if not needs_labels or task.kind == "lm":
        return columns, None
    label = (label_column,) if label_column else task.label
    if not label:
        raise UsageError(
            f"‹task› {task.name} needs ‹label_column›; {table.source} has: {listed(table.names)}",
            hint="name the column of the labels",
        )
    return columns, require_column(table, label, "label_column")


def require_column(table: Table, names: Sequence[str], setting: str) -> str:
    """The first of the names that the table has, else its only column of such a name with other spaces around."""
    for name in names:
        if name in table.names:
            return name
    for name in names:  # as in "text , label"
        near = [own for own in table.names if own.strip() == name.strip()]
        if len(near) == 1:
            return near[0]
    raise InputError(
        f"{table.source}: no column {' or '.join(names)}; it has: {listed(table.names)}",
        hint=f"name it with ‹{setting}›, or the ‹task› whose columns these are; the first line has to be a header",
    )
