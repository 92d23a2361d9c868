"""The rounds of a squeeze: what is recorded of each, and its state on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mpocli.errors import InputError
from mpocli.hf.shrink import mpo_modules, set_mpo
from mpocli.methods.training.state import drop_states, load_state, save_state
from mpocli.mpo import MPO
from mpocli.train.loop.optimizer_state import Moments

RECORDS = "squeeze.jsonl"
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
    record = {
        "records": [asdict(record) for record in state.records],
        "kept": state.kept,
        "before": state.before,
        "bond_dims": {name: list(module.bond_dims) for name, module in mpo_modules(model).items()},
    }
    save_state(directory, number, dict(model.named_parameters()), state.moments, record)
    write_records(directory / RECORDS, state.records)
    drop_states(directory, {number, state.kept})


def write_records(path: Path, records: Sequence[RoundRecord]) -> None:
    """`squeeze.jsonl`: one line a round, replaced whole so that no line is ever half there."""
    temporary = path.with_name(path.name + _PARTIAL)
    try:
        temporary.write_text("".join(json.dumps(asdict(record)) + "\n" for record in records))
        temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror})", hint="free some space and run again with --resume"
        ) from error


@torch.no_grad()
def load_round(directory: Path, number: int, model: Any) -> Progressed:
    """Put a round's weights into the model it began with, and return the rest. `InputError` where it is damaged."""
    weights, moments, record = load_state(directory, number)
    for name, module in mpo_modules(model).items():
        if module.bond_dims != tuple(record["bond_dims"][name]):
            cores = tuple(weights[f"{name}.core_{k}"] for k in range(module.sites.sites))
            set_mpo(model, name, MPO(cores, module.shape))
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
    records = tuple(RoundRecord.from_dict(found) for found in record["records"])
    return Progressed(records, moments, int(record["kept"]), record["before"])
