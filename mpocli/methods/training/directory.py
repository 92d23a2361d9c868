"""The directory beside an output in which a long run keeps what it needs to be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpocli.errors import InputError
from mpocli.io.claim import discard
from mpocli.io.disk import reason
from mpocli.io.readable import real_path
from mpocli.methods.training.state import worth_resuming

# The options of the run that made the directory.
RECORD = "run.json"


def training_directory(out: Path) -> Path:
    """`<out>.training`, a sibling of the output."""
    return real_path(out).with_name(f"{real_path(out).name}.training")


def reports_directory(out: Path) -> Path:
    """`<out>.runs`, a sibling of the output."""
    return real_path(out).with_name(f"{real_path(out).name}.runs")


@contextmanager
def reports_beside(out: Path, report_to: Sequence[str]) -> Iterator[None]:
    """TensorBoard's events go to `<out>.runs`, unless the user's environment names a place: the training directory is
    deleted in the end."""
    name = "TENSORBOARD_LOGGING_DIR"
    if name in os.environ or not {"tensorboard", "all"} & set(report_to):
        yield
        return
    os.environ[name] = str(reports_directory(out))
    try:
        yield
    finally:
        del os.environ[name]


@contextmanager
def run_directory(
    directory: Path,
    options: dict[str, Any],
    *,
    files: Sequence[str],
    begins: bool,
    writes: bool,
) -> Iterator[None]:
    """The directory, made anew with empty `files` where a run `begins`; a failure leaves it only if there is something
    to resume. In other processes than the one that `writes` it does nothing."""
    if writes and begins:
        try:
            discard(directory)
            directory.mkdir(parents=True)
            partial = directory / f"{RECORD}.partial"
            partial.write_text(json.dumps(options))
            partial.replace(directory / RECORD)
            for name in files:
                (directory / name).touch()
        except OSError as error:
            discard(directory)
            problem = f"{directory}: cannot be written ({reason(error)})"
            raise InputError(problem, hint="choose another --out") from error
    try:
        yield
    except BaseException:
        if writes and not worth_resuming(directory):
            discard(directory)
        raise
