"""The directory beside an output in which a long run keeps what it needs to be resumed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpocli.errors import InputError
from mpocli.hf.artifact import Checkpoint
from mpocli.io.output import check_output
from mpocli.methods.device import device_of
from mpocli.methods.segment_state import worth_resuming
from mpocli.train.processes import processes
from mpocli.train.segment import check_report_to

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


@dataclass(frozen=True)
class Begun:
    """A run that may begin, or `goes_on`: its checkpoint, where it computes, and what it must not change on resuming.

    `state` is accelerate's view of the processes, `training` the directory beside the output.
    """

    checkpoint: Checkpoint
    device: torch.device
    state: Any
    training: Path
    options: dict[str, Any]
    goes_on: bool


def begin(model: str, config: Any, out: Path, *, overwrite: bool, resume: bool) -> Begun:
    """Open the model and see that the output can be written, before any work; `config` is a command's own.

    Raises `InputError` and `UsageError` for a model, place or record of an interrupted run that does not allow it.
    """
    device = device_of(config.device)
    state = processes(device)
    checkpoint = Checkpoint.open(model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    check_place(out, checkpoint.source.directory, overwrite=overwrite, resume=resume)
    check_report_to(config.optimisation.report_to)
    training = training_directory(out)
    options = {**config.recorded(), "seed": config.optimisation.seed, "input_sha256": checkpoint.reader.sha256}
    options |= {"processes": state.num_processes, "files": config.data.files()}
    goes_on = check_begun(training, options, resume=resume, overwrite=overwrite)
    return Begun(checkpoint, state.device if state.num_processes > 1 else device, state, training, options, goes_on)


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
