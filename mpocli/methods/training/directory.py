"""The directory beside an output in which a long run keeps what it needs to be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpocli.errors import InputError
from mpocli.hf.artifact import Checkpoint
from mpocli.io.claim import digest, discard
from mpocli.io.disk import reason
from mpocli.io.manifest import MANIFEST
from mpocli.io.output import check_output
from mpocli.io.readable import real_path
from mpocli.methods.device import device_of
from mpocli.methods.inputs import paths_read
from mpocli.methods.training.state import worth_resuming
from mpocli.train.processes import processes
from mpocli.train.segment import check_report_to

_RECORD = "run.json"
# What stood at the output when a run began, which is all that it may replace.
_REPLACES = "replaces"


def training_directory(out: Path) -> Path:
    """`<out>.training`, a sibling of the output."""
    return real_path(out).with_name(f"{real_path(out).name}.training")


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
    keys = (options.keys() | begun.keys()) - {_REPLACES}
    changed = sorted(key for key in keys if options.get(key) != begun.get(key))
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
    training, reads = training_directory(out), paths_read(checkpoint.source.directory, config)
    check_place(out, reads, overwrite=overwrite, resume=resume, claims=state.is_main_process)
    check_report_to(config.optimisation.report_to)
    options = {**config.recorded(), "seed": config.optimisation.seed, "input_sha256": checkpoint.reader.sha256}
    options |= {"processes": state.num_processes, "files": config.data.files()}
    goes_on = check_begun(training, options, resume=resume, overwrite=overwrite)
    if goes_on and not overwrite:
        _check_unchanged(out, json.loads((training / _RECORD).read_text()))
    options[_REPLACES] = digest(out)
    return Begun(checkpoint, state.device if state.num_processes > 1 else device, state, training, options, goes_on)


def check_place(
    out: Path, reads: Mapping[str, Sequence[str | Path]], *, overwrite: bool, resume: bool, claims: bool = True
) -> None:
    """`check_output` for a run with directories beside it. Raises `InputError` where there is nothing to resume.

    A run that is resumed was allowed to write to `out` when it began.
    """
    begun = training_directory(out).exists()
    if resume and not begun and (out / "config.json").is_file():
        raise InputError(f"{out}: this run is finished, there is nothing to resume", hint="--overwrite begins anew")
    beside = {"the training directory": training_directory(out), "--report-to": reports_directory(out)}
    check_output(out, reads, overwrite=overwrite or (resume and begun), claims=claims, writes=beside)


def _check_unchanged(out: Path, begun: dict[str, Any]) -> None:
    """`InputError` where something else is at the output than when the run began, unless it is what this run made:
    a kill may fall between the output's renaming and the end of the training directory."""
    if begun.get(_REPLACES, digest(out)) == digest(out):
        return
    try:
        last = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["history"][-1]
        is_its_own = (last["input_sha256"], last["seed"]) == (begun["input_sha256"], begun["seed"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        is_its_own = False
    if not is_its_own:
        raise InputError(
            f"{out}: something was written there since the interrupted run began, and would be replaced",
            hint="move it elsewhere, or add --overwrite",
        )


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
            partial = directory / f"{_RECORD}.partial"
            partial.write_text(json.dumps(options))
            partial.replace(directory / _RECORD)
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
