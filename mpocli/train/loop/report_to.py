"""Whether the reporters that a run is to report to can be had."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mpocli.errors import UsageError


def check_report_to(names: Sequence[str]) -> None:
    """`UsageError` for a reporter that the Trainer does not know or that is not installed.

    Only its own constructor tells, which the Trainer would call after the first evaluation.
    """
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    asked = get_available_reporting_integrations() if "all" in names else [name for name in names if name != "none"]
    problem = ""
    for name in asked:
        with warnings.catch_warnings(), _unraisable_ignored():
            warnings.simplefilter("ignore")
            try:
                for callback in get_reporting_integration_callbacks([name]):
                    callback()
            except Exception as error:  # a reporter's own code: anything can come out of it
                problem = str(error).strip() or type(error).__name__
            if problem:  # out of the handler, so that what was half made is gone
                raise UsageError(f"‹report_to› {name}: {problem.splitlines()[0]}", hint="leave it out, or install it")


@contextmanager
def _unraisable_ignored() -> Iterator[None]:
    """A context in which Python is silent about errors in deletion: reporters that are half made raise some there."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = before
