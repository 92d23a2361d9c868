"""One way through a checkpoint's files: a verb says what becomes of the weights it chose, the rest stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpocli.hf.artifact import Checkpoint
from mpocli.hf.surroundings import write_surroundings
from mpocli.hf.weight import Weight
from mpocli.io.checkpoint import DTYPE_NAMES, CheckpointReader, dtype_wanted
from mpocli.io.encodings.base import Encoding
from mpocli.io.encodings.dense import Dense
from mpocli.io.manifest import Manifest
from mpocli.io.module_entry import ModuleEntry
from mpocli.io.signpost import SIGNPOST, add_signpost
from mpocli.io.totals import Totals
from mpocli.io.writer import CheckpointWriter, Sink, SpecCounter, plan_shards
from mpocli.mpo.linalg import cast
from mpocli.progress import Progress


@dataclass(frozen=True)
class Stored:
    """What the files hold of one weight: `tensors` by their names below its module (`weight`, a core, a router's
    tensor), and the `encodings` of those that are not dense.

    A leaf of which there are `parts` is stored by them: as it was in the files, or rounded already. Its tensor is what
    they stand for.

    `entry` is the manifest's, `unmeasured` where its cores were changed, None for an ordinary matrix. Where a weight
    has cores, the rewriting leaves one zero under every dense name that is gone, so that nothing can load the files by
    mistake.
    """

    tensors: dict[str, Tensor]
    entry: ModuleEntry | None = None
    encodings: dict[str, Encoding] = field(default_factory=dict)
    parts: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)

    def with_tensor(self, leaf: str, tensor: Tensor) -> Stored:
        """The same with another tensor in the place of one."""
        parts = {name: own for name, own in self.parts.items() if name != leaf}
        return replace(self, tensors=self.tensors | {leaf: tensor}, parts=parts)


def as_stored(reader: CheckpointReader, weight: Weight) -> Stored:
    """What the files hold of a weight now: the matrix, or its cores."""
    leaves = list(weight.entry.spec.core_shapes()) if weight.entry else []
    keys = {leaf: weight.key_of(leaf) for leaf in leaves or ["weight"]}
    encoded = {leaf: key for leaf, key in keys.items() if key in reader.encoded}
    return Stored(
        tensors={leaf: reader.read(key) for leaf, key in keys.items()},
        entry=weight.entry,
        encodings={leaf: reader.encoding(key) for leaf, key in encoded.items()},
        parts={leaf: reader.read_parts(key) for leaf, key in encoded.items()},
    )


@dataclass(frozen=True)
class Rewriting:
    """`transform` is asked once for each of the `weights`, in the order of the files, and one weight is in memory at a
    time; for None that weight stays as it is.

    What stays is stored in `dtype`, None for its own, and with `checks` refused where it is not finite; what is no
    parameter goes through byte for byte (a mask may well hold infinities). It stays encoded unless `unpacks`.
    `routing` is the checkpoint's unless it is given. Without `reads` no values are read, and what stays is added to
    the sink as tensors without any: for a dry run, in which `transform` has to do the same.
    """

    checkpoint: Checkpoint
    weights: Sequence[Weight]
    transform: Callable[[Weight], Stored | None]
    dtype: str | None = None
    checks: bool = False
    unpacks: bool = False
    routing: dict[str, Any] | None = None
    reads: bool = True
    progress: Progress | None = None

    def write(
        self, work: Path, command: str, options: dict[str, Any], seed: int, max_shard_bytes: int
    ) -> tuple[Manifest, Totals]:
        """Write the whole model directory into `work`; returns its manifest, `command` last in the history."""
        checkpoint = self.checkpoint
        with CheckpointWriter(work, max_shard_bytes) as writer:
            structure = self.add_to(writer)
            size = sum(file.stat().st_size for file in writer.finish())
        totals = self._totals(structure, size)
        history = checkpoint.history(command, options, seed)
        manifest = replace(structure, base_model=checkpoint.base_model(), totals=totals, history=history)
        write_surroundings(work, checkpoint, manifest, dtype=self.dtype)
        return manifest, totals

    def dry_run(self, max_shard_bytes: int) -> tuple[Manifest, Totals]:
        """Structure and totals of what `write` would write, its exact bytes among them."""
        counter = SpecCounter()
        structure = self.add_to(counter)
        size = sum(shard.nbytes for shard in plan_shards(counter.specs, max_shard_bytes))
        return structure, self._totals(structure, size)

    def add_to(self, sink: Sink) -> Manifest:
        """Go through the files, and say of what structure they then are: no history, no totals."""
        asked = {weight.key: weight for weight in self.weights}
        others = {key for weight in self.weights for key in _other_keys(weight)}
        made: dict[str, ModuleEntry | None] = {}
        encodings: dict[str, Encoding] = {}
        done = 0
        for key in self.checkpoint.reader:
            if key == SIGNPOST or key in others:
                continue
            if key not in asked:
                encodings |= self._keep(sink, key)
                continue
            weight = asked[key]
            stored = self.transform(weight)
            done += 1
            if self.progress:
                self.progress(done, len(asked), weight.name)
            if stored is not None:
                made[weight.name] = stored.entry
                encodings |= _add(sink, weight, stored)
                del stored  # before the next weight is read
                continue
            for name in (key, *_other_keys(weight)):
                if name in self.checkpoint.reader:
                    encodings |= self._keep(sink, name)
        assert done == len(self.weights), "a weight that is in the files under no key of its own was chosen"
        routing = self.checkpoint.routing if self.routing is None else self.routing
        structure = Manifest(modules=tuple(self._entries(made)), encodings=encodings, routing=routing)
        if structure.needs_plugin:
            add_signpost(sink, structure.quantization_config())
        return structure

    def _keep(self, sink: Sink, key: str) -> dict[str, Encoding]:
        """Add a tensor that stays what it is; returns its encoding by its entry's name, nothing for a dense one."""
        reader = self.checkpoint.reader
        is_parameter = key not in self.checkpoint.survey.other_keys
        dtype = dtype_wanted(reader.specs[key].dtype, self.dtype if is_parameter else None)
        encoding = Dense(reader.specs[key].shape) if self.unpacks else reader.encoding(key)
        if self.reads:
            tensor, parts_kept = reader.read(key), None
            if dtype == tensor.dtype or not encoding.is_exact:
                parts_kept = None if self.unpacks else reader.read_parts(key)
            if is_parameter and (self.checks or dtype != tensor.dtype):
                tensor = cast(tensor, dtype, key)
            _add_encoded(sink, key, tensor, encoding, parts_kept)
        else:
            parts = [reader.specs[key]] if self.unpacks else reader.parts(key)
            for spec in encoding.converted(key, parts, dtype):
                sink.add(spec.name, torch.empty(spec.shape, dtype=spec.dtype, device="meta"))
        if key not in reader.encoded or self.unpacks:
            return {}
        return {reader.encoded[key]: encoding.in_dtype(DTYPE_NAMES[dtype])}

    def _entries(self, made: Mapping[str, ModuleEntry | None]) -> Iterator[ModuleEntry]:
        """Manifest entries in the model's order: those that were made, and those that came in."""
        before = self.checkpoint.manifest.by_name if self.checkpoint.manifest else {}
        for weight in self.checkpoint.survey.weights:
            entry = made.get(weight.name)
            if entry is not None:
                yield entry
                for member in weight.members[1:]:
                    spec = replace(entry.spec, kind=member.kind, tied_to=weight.name, scale=member.scale)
                    yield replace(entry, name=member.name, spec=spec)
            elif weight.name not in made:
                for entry in (before[member.name] for member in weight.members if member.name in before):
                    if self.dtype and self.dtype != entry.dtype:
                        # Rounded anew: the measured error no longer holds.
                        entry = replace(entry, dtype=self.dtype, relative_error=None)
                    yield entry

    def _totals(self, structure: Manifest, size: int) -> Totals:
        saved = sum(entry.spec.dense_params - entry.spec.params for entry in structure.modules)
        return self.checkpoint.totals(self.checkpoint.survey.dense_params - saved, size, self.dtype)


def _other_keys(weight: Weight) -> list[str]:
    """What the files hold of a weight beside its own key: its cores, and the names of what is tied to it."""
    cores = weight.entry.spec.core_shapes() if weight.entry else ()
    return [*(weight.key_of(core) for core in cores), *weight.follower_keys]


def _add(sink: Sink, weight: Weight, stored: Stored) -> dict[str, Encoding]:
    """Add what a weight became, cores first; returns the encodings by their entries' names."""
    cores = list(stored.entry.spec.core_shapes()) if stored.entry else []
    assert weight.key is not None
    encodings: dict[str, Encoding] = {}

    def add(leaf: str) -> None:
        key, tensor = weight.key_of(leaf), stored.tensors[leaf]
        encoding = stored.encodings.get(leaf)
        _add_encoded(sink, key, tensor, encoding or Dense(tuple(tensor.shape)), stored.parts.get(leaf))
        if encoding is not None:
            name = f"{weight.name}.{leaf}"
            encodings[name] = encoding.stored_as(name, key)

    for leaf in cores:
        add(leaf)
    for name in (weight.key, *weight.follower_keys) if cores else ():
        sink.add(name, torch.zeros(1, dtype=stored.tensors[cores[0]].dtype))
    for leaf in stored.tensors:
        if leaf not in cores:
            add(leaf)
    return encodings


def _add_encoded(
    sink: Sink, key: str, tensor: Tensor, encoding: Encoding, parts: tuple[Tensor, ...] | None = None
) -> None:
    packed = encoding.pack(tensor) if parts is None else parts
    for part, stored in encoding.named(key, packed, tensor.new_zeros(1)).items():
        sink.add(part, stored)
