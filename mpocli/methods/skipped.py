"""A matrix that a command was to change and did not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Skipped:
    """A selected matrix that stays as it is, and why. `action` is what it is: `kept` dense, or `quantised` before."""

    name: str
    role: str | None
    reason: str
    action: str = "kept"
