"""A checkpoint's matrices as its manifest lists them, for whoever looks and does not compute. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpocli.errors import InputError
from mpocli.hf.config import CONFIG
from mpocli.hf.matrices import Matrix, Member, checked
from mpocli.hf.metadata import Metadata
from mpocli.io.digest import file_sha256
from mpocli.io.dtypes import STORED_DTYPES, StoredDType
from mpocli.io.manifest import Manifest
from mpocli.io.matrix_entry import MatrixEntry
from mpocli.io.module_entry import ModuleEntry
from mpocli.io.signpost import check_seal
from mpocli.io.stored import StoredTensors
from mpocli.io.totals import Totals

_DTYPES = {dtype.name: dtype for dtype in STORED_DTYPES.values()}


@dataclass(frozen=True)
class Recorded:
    """The weight matrices of a checkpoint in the model's order, and what the whole model amounts to."""

    weights: tuple[Matrix[StoredDType], ...]
    totals: Totals


def recorded(metadata: Metadata[StoredTensors[StoredDType]]) -> Recorded | None:
    """What a survey of the model's class would find, from metadata alone; None where only the class can tell.

    That is a directory without a manifest that lists them, and any in which something is not as it was written: the
    survey then says what is wrong, in its own words. A config.json or weight file that was changed is no longer the
    one that the manifest describes, and of what the manifest says here all is held against the headers that can be.
    """
    manifest, reader = metadata.manifest, metadata.reader
    if manifest is None or manifest.matrices is None or manifest.totals is None or not _as_written(metadata, manifest):
        return None
    try:
        entries = manifest.by_name
        weights = [_matrix(entry, entries, reader) for entry in manifest.matrices]
        check_seal(CONFIG, metadata.config_json.get("quantization_config") or {}, reader.seal)
    except InputError:
        return None
    names = {member.name for weight in weights for member in weight.members}
    totals = _totals(weights, manifest.totals, reader)
    return Recorded(tuple(weights), totals) if totals and entries.keys() <= names else None


def _totals(weights: Sequence[Matrix[Any]], claimed: Totals, reader: StoredTensors[Any]) -> Totals | None:
    """Those of the manifest, None where they cannot be those of these matrices and files."""
    dense = claimed.dense_params
    more = sum(weight.entry.spec.params - weight.dense_params for weight in weights if weight.entry)
    floats = [spec.dtype for spec in reader.specs.values() if "float" in str(spec.dtype)]
    sizes = {4, *(dtype.itemsize for dtype in floats)}  # what is not stored counts as float32
    possible = dense > 0 and dense * min(sizes) <= claimed.dense_bytes <= dense * max(sizes)
    if not possible or (claimed.params, claimed.bytes) != (dense + more, reader.nbytes):
        return None
    return replace(claimed, ratio=claimed.params / dense)


def _as_written(metadata: Metadata[Any], manifest: Manifest) -> bool:
    """Whether config.json and weight files are those that the manifest describes, and no code of the model's own is
    to be asked; that the listed weight files are unchanged was seen on opening, or the manifest would list nothing."""
    names = {CONFIG, *(file.name for file in metadata.reader.files)}
    if "auto_map" in metadata.config_json or not names <= manifest.files.keys():
        return False
    return bool(file_sha256(metadata.source.directory / CONFIG) == manifest.files[CONFIG]["sha256"])


def _matrix(
    said: MatrixEntry, entries: Mapping[str, ModuleEntry], reader: StoredTensors[StoredDType]
) -> Matrix[StoredDType]:
    """One of them. Raises `InputError` where the headers or the manifest's modules say otherwise."""
    here = [entries[name] for name in (said.name, *said.tied) if name in entries]
    found = Matrix(
        members=(Member(said.name, said.kind), *(Member(name, "") for name in said.tied)),
        roles=frozenset([said.role] if said.role else ()),
        shape=said.shape,
        key=said.key,
        dtype=_DTYPES.get(said.dtype, _DTYPES["float32"]),
        obstacle=said.reason,
        entry=next((entry for entry in here if not entry.spec.tied_to), None),
    )
    if said.key is not None and said.key not in reader:
        raise InputError(f"{said.key} is not in the files")
    if found.entry is None and said.key is not None:
        found = replace(found, dtype=reader.specs[said.key].dtype)
    found = checked(found, reader, said.reason)
    told = found.role, found.shape, found.dtype.name, found.obstacle
    if told != (said.role, said.shape, said.dtype, said.reason) or (here and found.entry is None):
        raise InputError(f"{said.name} is not what it is said to be")
    if any((entry.role, entry.spec.shape) != (said.role, said.shape) for entry in here):
        raise InputError(f"{said.name} is said to be two things")
    return found
