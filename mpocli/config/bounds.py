"""What values an option may have; `UsageError`s that say which, and what to choose."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mpocli.errors import UsageError

# The search for site dimensions grows exponentially: up to 0.4 s a matrix at 12 sites, 18 s at 16, minutes at 20.
MAX_SITES = 12


def finite(option: str, value: float) -> None:
    """Neither infinity nor NaN."""
    if not math.isfinite(value):
        raise UsageError(f"{option} {value}: must be a finite number", hint=f"write {option} as 0.05, for example")


def at_least(least: float) -> Callable[[str, Any], None]:
    """A finite number that is no smaller."""

    def check(option: str, value: float) -> None:
        finite(option, value)
        if value < least:
            raise UsageError(f"{option} {value}: must be at least {least}", hint=f"choose {option} {least} or more")

    return check


def positive(option: str, value: float) -> None:
    """Not zero, less, infinity or NaN."""
    if not 0 < value < float("inf"):
        raise UsageError(f"{option} {value}: must be above 0", hint=f"choose a positive {option}")


def seed(bits: int) -> Callable[[str, int], None]:
    """A number of so many bits: NumPy, which seeds a training too, takes 32, torch's generators take 63."""

    def check(option: str, value: int) -> None:
        if not 0 <= value < 2**bits:
            raise UsageError(
                f"{option} {value}: must be at least 0 and below 2^{bits}", hint=f"choose one such as {option} 1"
            )

    return check


def share(option: str, value: float) -> None:
    """A number in [0, 1]."""
    if not 0 <= value <= 1:
        raise UsageError(f"{option} {value}: must lie between 0 and 1", hint="it is a share")


def sites(option: str, value: int) -> None:
    """A number of sites that makes an MPO, and whose site dimensions are found soon."""
    at_least(2)(option, value)
    if value > MAX_SITES:
        raise UsageError(
            f"{option} {value}: the largest is {MAX_SITES}", hint=f"choose {option} {MAX_SITES} or fewer, 5 is usual"
        )


def below_one(option: str, value: float) -> None:
    """A number in [0, 1)."""
    if not 0 <= value < 1:  # NaN too
        raise UsageError(f"{option} {value}: must be at least 0 and below 1", hint="choose one such as 0.05")


def one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{option} {value!r} is not known", hint=f"choose {', '.join(choices)}")
