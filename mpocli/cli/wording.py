"""Numbers, names and reasons as tables and lines spell them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

ROLE_ORDER = ("embedding", "attention", "ffn", "pooler", "head", None)


def shortened(name: str, width: int = 44) -> str:
    """A module path that fits a column: its end says more than its beginning."""
    return name if len(name) <= width else "…" + name[-(width - 1) :]


def count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def size(number: int) -> str:
    """Bytes in decimal units, as file managers and hubs print them."""
    value, unit = float(number), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def bits(size: int, entries: int) -> str:
    """Bits of an entry, of all bytes that there are for them."""
    return f"{8 * size / entries:.2f}" if entries else ""


def widened(count: int) -> str:
    """What became of tensors in few bits that a command changed."""
    return f"{count} tensors in few bits were read for the values they stand for: what they became is wide"


def ratio(after: int, before: int) -> str:
    return f"{after / before:.3f}" if before else ""


def metric(value: float) -> str:
    """Four decimals, or three digits of what is too large for them (perplexities of broken models)."""
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.2e}"


def error(value: float | None) -> str:
    if value is None:
        return "?"
    return "0" if value == 0 else f"{value:.1e}" if value < 1e-3 else f"{value:.3f}"


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


def written(out: object, seconds: float) -> str:
    """The last line of a command that stores something."""
    return f"written to {out} in {seconds:.{1 if seconds < 60 else 0}f} s"


def loading(architecture: str, out: object) -> str:
    """How to load what an ordinary program would not."""
    return f"load it with: import mpocli, transformers; transformers.{architecture}.from_pretrained({str(out)!r})"


UNKNOWN = "?: not measured (a dry run, or weights that were trained or changed since)"
