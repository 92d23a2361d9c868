"""The directory beside an output in which a long run keeps what it needs to be resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpocli.errors import InputError

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


@contextmanager
def run_directory(
    directory: Path,
    options: dict[str, Any],
    *,
    files: Sequence[str],
    begins: bool,
    writes: bool,
    worth_keeping: Callable[[], bool],
) -> Iterator[None]:
    """The directory, made anew with empty `files` where a run `begins`; a failure leaves it only if it is worth
    keeping. In other processes than the one that `writes` it does nothing."""
    if writes and begins:
        shutil.rmtree(directory, ignore_errors=True)
        try:
            directory.mkdir(parents=True)
            (directory / _RECORD).write_text(json.dumps(options))
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
        if writes and not worth_keeping():
            shutil.rmtree(directory, ignore_errors=True)
        raise
