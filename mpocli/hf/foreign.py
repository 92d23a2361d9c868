"""The boundary to code that is not ours: what it raises over a user's files becomes one line about them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from mpocli.errors import InputError, MpoError
from mpocli.printable import printable

_MOST = 200  # characters of a foreign message
# Frames of these say nothing about who made the mistake: they do what they are told.
_TOOLS = {"torch", "numpy", *sys.stdlib_module_names}


@contextmanager
def foreign(problem: str, *, hint: str) -> Iterator[None]:
    """Third-party code at work on what a user gave: whatever it raises becomes an `InputError`, "problem (its words)".

    To be put around the call alone. What mpocli raises on purpose passes, and so does a bug of mpocli's own that the
    call came back into (a hook, a layer, the loader).
    """
    try:
        yield
    except MpoError:
        raise
    except BaseException as error:
        # A panic of Rust (tokenizers, safetensors) is no `Exception`: its class is meant to end the process.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if _is_ours(error.__traceback__):
            raise
        raise InputError(f"{problem} ({told(error)})", hint=hint) from error


def told(error: BaseException) -> str:
    """The first line of a foreign message, or the class where there is none; never half of a character."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return printable(line if len(line) <= _MOST else f"{line[: _MOST - 1]}…")


def _is_ours(trace: TracebackType | None) -> bool:
    """Whether the innermost frame that decides anything is in mpocli, reached through foreign code."""
    owners = []
    while trace is not None:
        owners.append(str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0])
        trace = trace.tb_next
    # The first frames are those of the call itself.
    past = next((place for place, owner in enumerate(owners) if owner not in ("mpocli", "contextlib")), len(owners))
    deciding = [owner for owner in owners[past:] if owner not in _TOOLS]
    return bool(deciding) and deciding[-1] == "mpocli"
