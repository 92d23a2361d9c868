"""Errors a user can act on: one line of what and where, a hint of what to try, and an exit code."""

from __future__ import annotations


class MpoError(Exception):
    """Base of every error that mpocli raises on purpose.

    `message` says what failed, where, and the two numbers that disagree; `hint` says what to try. Code that knows of no
    command line names a setting as Python does, ‹max_length›. The command line prints both, with its options in the
    place of settings, and exits with `exit_code`.

    >>> str(InputError("no config.json in 'bert'", hint="name a model directory"))
    "no config.json in 'bert' (name a model directory)"
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(MpoError):
    """An option's value, or a combination of options, that cannot be meant (exit 2)."""

    exit_code = 2


class InputError(MpoError, ValueError):
    """A file, model or shape that cannot be used as it is (exit 3)."""

    exit_code = 3


class NumericsError(MpoError):
    """Arithmetic that left the finite numbers, or a factorisation that failed (exit 4)."""

    exit_code = 4


class TargetNotMetError(MpoError):
    """The work was done and its result misses the target that was asked for (exit 5)."""

    exit_code = 5
