"""One weight matrix of the model in the manifest, decomposed or not: what its class says of it beside the files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MatrixEntry:
    """Enough to list a model's matrices without building the model.

    `name` is the module that owns it, `kind` that module's (linear, conv1d, embedding, "" for what is no layer of
    ours), `shape` O×I, `key` its name in the files (None: not stored as such), `dtype` as stored, `reason` why it
    cannot be decomposed, `tied` the other modules that use it.
    """

    name: str
    role: str | None
    kind: str
    shape: tuple[int, int]
    key: str | None
    dtype: str
    reason: str = ""
    tied: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "shape": list(self.shape), "tied": list(self.tied)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MatrixEntry:
        """Raises `KeyError`, `TypeError` or `ValueError` for what is no such entry."""
        rows, columns = map(int, data["shape"])
        return cls(
            name=str(data["name"]),
            role=None if data["role"] is None else str(data["role"]),
            kind=str(data["kind"]),
            shape=(rows, columns),
            key=None if data["key"] is None else str(data["key"]),
            dtype=str(data["dtype"]),
            reason=str(data["reason"]),
            tied=tuple(map(str, data["tied"])),
        )


def listed(entries: Sequence[MatrixEntry]) -> dict[str, Any]:
    """What a manifest says of all of them. Whoever shows the list asks neither values nor class, so that a digest of it
    must tell whether it is whole."""
    data = [entry.to_dict() for entry in entries]
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return {"matrices": data, "matrices_sha256": hashlib.sha256(text.encode()).hexdigest()}
