"""The directory beside an output in which a long run keeps what it needs to be resumed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpocli.errors import InputError
from mpocli.io.output import check_output
from mpocli.methods.segment_state import worth_resuming

_RECORD = "run.json"


def training_directory(out: Path) -> Path:
    """`<out>.training`, a sibling of the output."""
    return out.resolve().with_name(f"{out.resolve().name}.training")


def check_begun(directory: Path, options: dict[str, Any], *, resume: bool, overwrite: bool) -> bool:
    """Whether there is a run to go on with. Raises `InputError` where its options are not those that began it, and
    where one is in the way of a new run."""
    if not resume:
        if directory.exists() and any(directory.iterdir()) and not overwrite:
            raise InputError(
                f"{directory}: is left of an interrupted run",
                hint="pass --resume to go on, or --overwrite to begin anew",
            )
        return False
    record = directory / _RECORD
    if not record.is_file():
        raise InputError(f"{directory}: no interrupted run to resume", hint="run without --resume")
    begun = json.loads(record.read_text())
    options = json.loads(json.dumps(options))  # tuples are lists there
    changed = sorted(key for key in options.keys() | begun.keys() if options.get(key) != begun.get(key))
    if changed:
        key = changed[0]
        raise InputError(
            f"{directory}: the interrupted run had {key} = {begun.get(key)!r}, this one has {options.get(key)!r}",
            hint="resume with the same options, or pass --overwrite instead of --resume to begin anew",
        )
    return True


def check_place(out: Path, source: Path, *, overwrite: bool, resume: bool) -> None:
    """`check_output` for a run with a training directory. Raises `InputError` where there is nothing to resume.

    A run that is resumed was allowed to write to `out` when it began.
    """
    begun = training_directory(out).exists()
    if resume and not begun and (out / "config.json").is_file():
        raise InputError(f"{out}: this run is finished, there is nothing to resume", hint="--overwrite begins anew")
    check_output(out, source, overwrite=overwrite or (resume and begun))


@contextmanager
def reports_beside(out: Path, report_to: Sequence[str]) -> Iterator[None]:
    """TensorBoard's events go to `<out>.runs`, unless the user's environment names a place: the training directory is
    deleted in the end."""
    name = "TENSORBOARD_LOGGING_DIR"
    if name in os.environ or not {"tensorboard", "all"} & set(report_to):
        yield
        return
    os.environ[name] = str(out.resolve().with_name(f"{out.resolve().name}.runs"))
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
        shutil.rmtree(directory, ignore_errors=True)
        try:
            directory.mkdir(parents=True)
            partial = directory / f"{_RECORD}.partial"
            partial.write_text(json.dumps(options))
            partial.replace(directory / _RECORD)
            for name in files:
                (directory / name).touch()
        except OSError as error:
            shutil.rmtree(directory, ignore_errors=True)
            raise InputError(
                f"{directory}: cannot be written ({error.strerror})", hint="choose another --out"
            ) from error
    try:
        yield
    except BaseException:
        if writes and not worth_resuming(directory):
            shutil.rmtree(directory, ignore_errors=True)
        raise
