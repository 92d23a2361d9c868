"""What is between two training segments, on disk: tensors, optimiser state and a record, complete or not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpocli.errors import InputError
from mpocli.io.claim import discard
from mpocli.train.loop.checkpoints import last_checkpoint
from mpocli.train.loop.optimizer_state import Moments
from mpocli.train.loop.processes import wait_for_everyone

_STATE = "state-"
_PARTIAL = ".partial"


def save_state(
    directory: Path, number: int, weights: Mapping[str, Tensor], moments: Moments, record: dict[str, Any]
) -> None:
    """Write state `number`, which takes its name last. Raises `InputError` on a full disk; older states stay."""
    place = directory / f"{_STATE}{number}"
    partial = place.with_name(place.name + _PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_file({name: _storable(tensor) for name, tensor in weights.items()}, partial / "weights.safetensors")
        flat = {f"{key}/{name}": value for name, found in moments.items() for key, value in found.items()}
        save_file({key: _storable(value) for key, value in flat.items()}, partial / "moments.safetensors")
        (partial / "record.json").write_text(json.dumps(record))
        discard(place)
        partial.replace(place)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(
            f"{directory}: state {number} cannot be written ({str(error).splitlines()[0]})",
            hint="free some space and run again" + (" with --resume" if last_state(directory) is not None else ""),
        ) from error


def _storable(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def drop_states(directory: Path, keep: set[int]) -> None:
    """Delete all states but those; a leftover of a kill goes with them."""
    kept = {f"{_STATE}{number}" for number in keep}
    for path in directory.glob(f"{_STATE}*"):
        if path.name not in kept:
            discard(path)


def last_state(directory: Path) -> int | None:
    """The newest complete state, None where there is none."""
    names = [path.name.removeprefix(_STATE) for path in directory.glob(f"{_STATE}*")]
    return max((int(name) for name in names if name.isdigit()), default=None)


def worth_resuming(directory: Path) -> bool:
    """Whether a training directory holds a state, or a checkpoint of a segment."""
    places = (directory, *(path for path in directory.glob("*") if path.is_dir()))
    return last_state(directory) is not None or any(last_checkpoint(place) is not None for place in places)


def load_state(directory: Path, number: int) -> tuple[dict[str, Tensor], Moments, dict[str, Any]]:
    """Weights, optimiser state and record. Raises `InputError` where the state is damaged."""
    wait_for_everyone()
    place = directory / f"{_STATE}{number}"
    try:
        record = json.loads((place / "record.json").read_text())
        weights = load_file(place / "weights.safetensors")
        flat = load_file(place / "moments.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{place}: cannot be read ({error})", hint="begin anew with --overwrite") from error
    moments: Moments = {}
    for key, value in flat.items():
        kind, _, name = key.partition("/")
        moments.setdefault(name, {})[kind] = value
    return weights, moments, record
