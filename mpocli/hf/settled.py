"""What a manifest must say of modules and matrices, told from the files and the model's class."""

from __future__ import annotations

from dataclasses import replace

from mpocli.hf.survey import Survey
from mpocli.hf.weight import Weight
from mpocli.io.checkpoint import CheckpointReader
from mpocli.io.manifest import Manifest
from mpocli.io.matrix_entry import MatrixEntry
from mpocli.io.module_entry import ModuleEntry
from mpocli.mpo.linalg import dtype_name


def settled(manifest: Manifest, survey: Survey, reader: CheckpointReader) -> Manifest:
    """The manifest with its modules in the model's order, each as files and class have it, and with all matrices.

    Whoever writes a manifest writes this, and whoever verifies one makes it again and compares.

    Bonds and dims are those of the cores (`survey` compares them); measurements stay as they are. The survey may be
    that of the same class before its matrices were decomposed, `reader` has the files that the manifest describes.
    """
    entries = manifest.by_name
    modules = [
        _settled(weight, member.name, entries, reader)
        for weight in survey.weights
        for member in weight.members
        if member.name in entries
    ]
    matrices = tuple(_matrix(weight, entries, reader) for weight in survey.weights)
    return replace(manifest, modules=tuple(modules), matrices=matrices)


def _matrix(weight: Weight, entries: dict[str, ModuleEntry], reader: CheckpointReader) -> MatrixEntry:
    here = [entries[member.name].spec for member in weight.members if member.name in entries]
    parts = next(([weight.key_of(part) for part in spec.stored_shapes()] for spec in here if not spec.tied_to), ())
    key = next((key for key in (weight.key, *weight.follower_keys) if key and key in reader), None)
    stored = [name for name in (*parts, key, *weight.sources) if name and name in reader]
    return MatrixEntry(
        name=weight.name,
        role=weight.role,
        kind=weight.kind,
        shape=weight.shape,
        key=key,
        dtype=dtype_name(reader.specs[stored[0]].dtype if stored else weight.dtype),
        reason=weight.obstacle,
        tied=tuple(member.name for member in weight.members[1:]),
    )


def _settled(weight: Weight, name: str, entries: dict[str, ModuleEntry], reader: CheckpointReader) -> ModuleEntry:
    member = next(member for member in weight.members if member.name == name)
    here = [entries[other.name] for other in weight.members if other.name in entries]
    owner = next(entry for entry in here if not entry.spec.tied_to)
    spec = replace(
        entries[name].spec,
        kind=member.kind,
        shape=weight.shape,
        scale=member.scale,
        tied_to=None if owner.name == name else owner.name,
    )
    stored = {reader.specs[weight.key_of(core)].dtype for core in spec.core_shapes()}
    cut_known = owner.relative_error is not None and not spec.experts
    return ModuleEntry(
        name=name,
        role=weight.role,
        spec=spec,
        dtype=" and ".join(sorted(map(dtype_name, stored))) if stored else owner.dtype,
        # Whoever shares cores shares what was measured of them; experts' cores are others than those that were cut.
        relative_error=owner.relative_error,
        discarded_weight=owner.discarded_weight if cut_known else None,
        center=None if spec.experts else owner.center,
        measured_against=owner.measured_against,
    )
