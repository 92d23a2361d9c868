"""A round of a squeeze on disk: weights, optimiser state and the records up to it, complete or not there at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mpocli.errors import InputError
from mpocli.hf.shrink import mpo_modules, set_mpo
from mpocli.mpo import MPO
from mpocli.train.moments import Moments

RECORDS = "squeeze.jsonl"
_STATE = "round-"
_PARTIAL = ".partial"


@dataclass(frozen=True)
class Cut:
    """One bond that was shrunk. `error_bound` ≥ `true_error` = ‖W_before − W_after‖_F, before any fine-tuning."""

    module: str
    role: str | None
    bond: int
    from_dim: int
    to_dim: int
    error_bound: float
    true_error: float


@dataclass(frozen=True)
class RoundRecord:
    """One round: what was cut, what the model amounts to, and its metrics after fine-tuning.

    `drop` is how much worse the task's main metric is than the reference, negative where it is better.
    """

    round: int
    cuts: tuple[Cut, ...]
    params: int
    ratio: float
    metrics: dict[str, float]
    drop: float

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RoundRecord:
        return cls(**{**data, "cuts": tuple(Cut(**cut) for cut in data["cuts"])})


@dataclass(frozen=True)
class Progressed:
    """How far a squeeze is: all rounds so far, the optimiser's state, the round to keep and the metrics at the start.

    `kept` is the last round inside the allowed drop, 0 for the model as it came.
    """

    records: tuple[RoundRecord, ...]
    moments: Moments
    kept: int
    before: dict[str, float]


def save_round(directory: Path, model: Any, state: Progressed) -> None:
    """Write a round, and drop those that are neither the newest nor the one to keep. `InputError` on a full disk."""
    number = len(state.records)
    place = directory / f"{_STATE}{number}"
    partial = place.with_name(place.name + _PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
        save_file(weights, partial / "weights.safetensors")
        flat = {f"{key}/{name}": value.cpu() for name, found in state.moments.items() for key, value in found.items()}
        save_file({key: value.contiguous() for key, value in flat.items()}, partial / "moments.safetensors")
        described = {
            "records": [asdict(record) for record in state.records],
            "kept": state.kept,
            "before": state.before,
            "bond_dims": {name: list(module.bond_dims) for name, module in mpo_modules(model).items()},
        }
        (partial / "state.json").write_text(json.dumps(described))
        shutil.rmtree(place, ignore_errors=True)
        partial.replace(place)
        write_records(directory / RECORDS, state.records)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(
            f"{directory}: round {number} cannot be written ({str(error).splitlines()[0]})",
            hint="free some space and run again with --resume",
        ) from error
    for other in directory.glob(f"{_STATE}*"):
        if other.name not in (place.name, f"{_STATE}{state.kept}"):
            shutil.rmtree(other, ignore_errors=True)


def write_records(path: Path, records: Sequence[RoundRecord]) -> None:
    """`squeeze.jsonl`: one line a round, replaced whole so that no line is ever half there."""
    temporary = path.with_name(path.name + _PARTIAL)
    temporary.write_text("".join(json.dumps(asdict(record)) + "\n" for record in records))
    temporary.replace(path)


def last_round(directory: Path) -> int | None:
    """The newest complete round of a training directory, None where there is none."""
    names = [path.name.removeprefix(_STATE) for path in directory.glob(f"{_STATE}*")]
    numbers = [int(name) for name in names if name.isdigit()]
    return max(numbers, default=None)


def load_round(directory: Path, number: int, model: Any) -> Progressed:
    """Put a round's weights into the model it began with, and return the rest. `InputError` where it is damaged."""
    place = directory / f"{_STATE}{number}"
    try:
        described = json.loads((place / "state.json").read_text())
        weights = load_file(place / "weights.safetensors")
        flat = load_file(place / "moments.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{place}: cannot be read ({error})", hint="begin anew with --overwrite") from error
    for name, module in mpo_modules(model).items():
        if module.bond_dims != tuple(described["bond_dims"][name]):
            cores = tuple(weights[f"{name}.core_{k}"] for k in range(module.sites.sites))
            set_mpo(model, name, MPO(cores, module.shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    moments: Moments = {}
    for key, value in flat.items():
        kind, _, name = key.partition("/")
        moments.setdefault(name, {})[kind] = value
    records = tuple(RoundRecord.from_dict(record) for record in described["records"])
    return Progressed(records, moments, int(described["kept"]), described["before"])
