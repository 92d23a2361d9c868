"""Whether a run of training may begin, or go on: asked before any work."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from mpocli.config.data import DataOptions
from mpocli.config.optimisation import Optimisation
from mpocli.errors import InputError
from mpocli.hf.artifact import Checkpoint
from mpocli.io.claim import digest
from mpocli.io.output import check_output
from mpocli.io.schema import MANIFEST
from mpocli.methods.device import device_of
from mpocli.methods.inputs import paths_read
from mpocli.methods.training.directory import RECORD, reports_directory, training_directory
from mpocli.train.loop.checkpoints import last_checkpoint
from mpocli.train.loop.processes import processes
from mpocli.train.loop.report_to import check_report_to

# What stood at the output when a run began, which is all that it may replace.
_REPLACES = "replaces"


class TrainingConfig(Protocol):
    """What the configurations of all commands that train have in common."""

    @property
    def data(self) -> DataOptions | None: ...
    @property
    def optimisation(self) -> Optimisation: ...
    @property
    def device(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def trust_remote_code(self) -> bool: ...
    def recorded(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class RunSetup:
    """A run that may begin, or that `goes_on`: its checkpoint, where it computes, and what resuming must not change.

    `state` is accelerate's view of the processes, `directory` the training directory beside the output, `resumed_from`
    the step of the newest checkpoint there, 0 without one.
    """

    config: TrainingConfig
    out: Path
    checkpoint: Checkpoint
    device: torch.device
    state: Any
    directory: Path
    options: dict[str, Any]
    goes_on: bool
    resumed_from: int


def begin(model: str, config: TrainingConfig, out: Path, *, overwrite: bool, resume: bool) -> RunSetup:
    """Open the model and see that the output can be written.

    Raises `InputError` and `UsageError` for a model, place or record of an interrupted run that does not allow it.
    """
    assert config.data is not None
    device = device_of(config.device)
    state = processes(device)
    checkpoint = Checkpoint.open(model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    directory, reads = training_directory(out), paths_read(checkpoint.source.directory, config)
    check_place(out, reads, overwrite=overwrite, resume=resume, claims=state.is_main_process)
    check_report_to(config.optimisation.report_to)
    options = {**config.recorded(), "seed": config.optimisation.seed, "input_sha256": checkpoint.reader.sha256}
    options |= {"processes": state.num_processes, "files": config.data.files()}
    goes_on = check_begun(directory, options, resume=resume, overwrite=overwrite)
    if goes_on and not overwrite:
        _check_unchanged(out, json.loads((directory / RECORD).read_text()))
    options[_REPLACES] = digest(out)
    used = state.device if state.num_processes > 1 else device
    newest = last_checkpoint(directory) if goes_on else None
    step = int(newest.name.rpartition("-")[2]) if newest else 0
    return RunSetup(config, out, checkpoint, used, state, directory, options, goes_on, step)


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
    record = directory / RECORD
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
