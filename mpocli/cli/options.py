"""Options that several commands share, and how their text becomes values. Light: no torch here."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpocli.errors import UsageError
from mpocli.io.readable import real_path
from mpocli.modes import ALWAYS

if TYPE_CHECKING:
    from mpocli.mpo import SiteShape

MODEL = "Model directory, or a hub model such as bert-base-uncased."
DANGER = "Dangerous options"
ROLES = ("embedding", "attention", "ffn", "pooler", "head")
DTYPES = ("float32", "bfloat16", "float16", "float64")

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL, show_default=False)]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="DIR", help="Output directory.", show_default=False), ALWAYS
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of tables."), ALWAYS]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output directory if it exists."), ALWAYS]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="DTYPE", help=f"Store as {', '.join(DTYPES)}. Default: as in the model."),
    ALWAYS,
]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a hub model."), ALWAYS
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run model code that the checkpoint brings.", rich_help_panel=DANGER),
    ALWAYS,
]
ShardSize = Annotated[
    str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest weight file, as 5GB."), ALWAYS
]

# The search for site dimensions grows exponentially: up to 0.4 s a matrix at 12 sites, 18 s at 16, minutes at 20.
MAX_SITES = 12

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str, option: str) -> int:
    """`5GB`, `300MiB` or `1000` as bytes; `UsageError` for anything else.

    >>> parse_bytes("5GB", "--max-shard-size")
    5000000000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*((?:[KMG]i?)?B)?\s*", text, flags=re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"{option} {text!r} is no size", hint="write it as 5GB, 300MB or 64MiB")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def share_of(option: str) -> Callable[[str | float], float]:
    """What reads an option that is a share."""

    def read(text: str | float) -> float:
        return share(text, option) if isinstance(text, str) else text

    return read


def share(text: str, option: str) -> float:
    """`0.5` or `50%`; `UsageError` for what is no number.

    >>> share("30%", "--ratio"), share("0.3", "--ratio")
    (0.3, 0.3)
    """
    number = text.strip()
    try:
        return float(number[:-1]) / 100 if number.endswith("%") else float(number)
    except ValueError:
        raise UsageError(f"{option} {text!r} is no share", hint="write it as 0.5 or 50%") from None


def parse_layers(text: str | None) -> tuple[str, ...] | None:
    """`attention,ffn` as roles; `UsageError` for a word that is none."""
    if text is None:
        return None
    roles = tuple(part.strip() for part in text.split(",") if part.strip())
    unknown = [role for role in roles if role not in ROLES]
    if unknown or not roles:
        raise UsageError(
            f"--layers {text!r}: {(unknown or ['nothing'])[0]!r} is no role", hint=f"the roles are {', '.join(ROLES)}"
        )
    return roles


def parse_shapes(texts: list[str]) -> tuple[tuple[str, SiteShape], ...]:
    """`GLOB=3,4,4,4,4x4,4,4,4,3` as (glob, site shape) pairs; `UsageError` where one cannot be read."""
    from mpocli.errors import InputError
    from mpocli.mpo import SiteShape

    shapes = []
    for text in texts:
        glob, equals, shape = text.rpartition("=")
        if not equals or not glob:
            raise UsageError(
                f"--shape {text!r} is not GLOB=ROWSxCOLUMNS", hint="write --shape '*attention*=3,4,4,4,4x4,4,4,4,3'"
            )
        try:
            shapes.append((glob, SiteShape.parse(shape)))
        except InputError as error:
            raise UsageError(f"--shape {text!r}: {error.message}", hint=error.hint) from error
    return tuple(shapes)


def at_least(option: str, value: float | None, least: float) -> None:
    """`UsageError` for a number below the smallest that makes sense, infinity or NaN."""
    check_finite(option, value)
    if value is not None and value < least:
        raise UsageError(f"{option} {value}: must be at least {least}", hint=f"choose {option} {least} or more")


def check_finite(option: str, value: float | None) -> None:
    """`UsageError` for infinity and NaN."""
    if value is not None and not math.isfinite(value):
        raise UsageError(f"{option} {value}: must be a finite number", hint=f"write {option} as 0.05, for example")


def check_sites(value: int) -> None:
    """`UsageError` for a number of sites that makes no MPO, or one whose site dimensions take too long to find."""
    at_least("--sites", value, 2)
    if value > MAX_SITES:
        raise UsageError(
            f"--sites {value}: the largest is {MAX_SITES}", hint=f"choose --sites {MAX_SITES} or fewer, 5 is usual"
        )


def check_tolerance(value: float | None) -> None:
    """`UsageError` for a --rel-tol outside [0, 1)."""
    if value is not None and not 0 <= value < 1:  # NaN too
        raise UsageError(f"--rel-tol {value}: must be at least 0 and below 1", hint="choose one such as 0.05")


def check_out_before_download(model: str, out: Path, *, overwrite: bool) -> None:
    """Refuse an output that no hub model could make right, before one is downloaded. A local one is soon read."""
    if not Path(model).expanduser().exists():
        from mpocli.io.output import check_output

        check_output(out, None, overwrite=overwrite)


def one_of(option: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise UsageError(f"{option} {value!r} is not known", hint=f"choose {', '.join(choices)}")


def default_out(model: str, suffix: str) -> Path:
    """The model's bare name and what was done to it: in the working directory, or beside a model that holds it."""
    path = Path(model).expanduser()
    directory = real_path(path)
    name = f"{directory.name if path.name in ('', '..') else path.name}-{suffix}"
    working = Path.cwd()
    inside = path.is_dir() and (directory == working or directory in working.parents)
    return Path(os.path.relpath(directory.parent / name)) if inside else Path(name)
