"""Go through a checkpoint's files once and write some tensors pruned, packed as bitmask and values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mpocli.hf.artifact import Checkpoint, write_surroundings
from mpocli.io.encodings.base import Encoding
from mpocli.io.encodings.bitmask import Bitmask
from mpocli.io.encodings.dense import Dense
from mpocli.io.manifest import MANIFEST, Manifest
from mpocli.io.signpost import SIGNPOST, add_signpost
from mpocli.io.writer import CheckpointWriter
from mpocli.methods.sparsify_config import SparsifyConfig
from mpocli.methods.sparsify_plan import Target
from mpocli.mpo.linalg import check_finite
from mpocli.sparse import global_masks, zeros_in

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class SparseTensor:
    """One pruned tensor as it is stored: `sparsity` = zeros / entries, `bytes` of its bitmask and values."""

    name: str
    role: str | None
    shape: tuple[int, ...]
    entries: int
    zeros: int
    sparsity: float
    bytes: int
    dense_bytes: int


def described(target: Target, stored: Tensor, storage: str, itemsize: int | None = None) -> SparseTensor:
    """Counted on what is stored, in `itemsize` bytes an entry if not in the tensor's own."""
    itemsize = itemsize or stored.element_size()
    entries, zeros = stored.numel(), int((stored == 0).sum())
    return SparseTensor(
        name=target.name,
        role=target.role,
        shape=target.shape,
        entries=entries,
        zeros=zeros,
        sparsity=zeros / entries,
        bytes=_encoding(target, storage).nbytes(zeros, itemsize),
        dense_bytes=entries * itemsize,
    )


def _encoding(target: Target, storage: str, pattern: str = "unstructured") -> Encoding:
    return Bitmask(target.shape, pattern) if storage == Bitmask.name else Dense(target.shape)


def magnitude_pruner(
    checkpoint: Checkpoint, config: SparsifyConfig, targets: Sequence[Target]
) -> Callable[[Target, Tensor], Tensor]:
    """One-shot pruning by |W|, matrix by matrix or with one threshold over all."""
    masks: dict[str, Tensor] = {}
    if config.scope == "global":
        sizes = [target.matrix(checkpoint.reader.read(target.key)).abs().float() for target in targets]
        for target, size in zip(targets, sizes, strict=True):
            check_finite(size, target.key)
        zeros = zeros_in(sum(size.numel() for size in sizes), config.sparsity)
        masks = dict(zip((target.name for target in targets), global_masks(sizes, zeros), strict=True))

    def prune(target: Target, stored: Tensor) -> Tensor:
        check_finite(stored, target.key)
        matrix = target.matrix(stored)
        mask = masks.get(target.name)
        if mask is None:
            mask = config.pattern.mask(matrix.abs().float(), zeros_in(matrix.numel(), config.sparsity))
        return target.stored(torch.where(mask, matrix, matrix.new_zeros(())))

    return prune


def given_pruner(pruned: Mapping[str, Tensor]) -> Callable[[Target, Tensor], Tensor]:
    """Tensors that were pruned in a loaded model, by name."""
    return lambda target, stored: pruned[target.name].to(stored.dtype)


def write_sparse(
    work: Path,
    checkpoint: Checkpoint,
    config: SparsifyConfig,
    targets: Sequence[Target],
    prune: Callable[[Target, Tensor], Tensor],
    *,
    progress: Progress | None = None,
) -> tuple[Manifest, tuple[SparseTensor, ...]]:
    """The checkpoint with every target pruned, one tensor in memory at a time beside what `prune` holds."""
    jobs = {target.key: target for target in targets}
    before = checkpoint.encodings
    made: dict[str, SparseTensor] = {}
    is_packed = config.storage != Dense.name
    encodings = dict(before) if is_packed else {}
    with CheckpointWriter(work, config.max_shard_bytes) as writer:
        for key in checkpoint.reader:
            if key == SIGNPOST:
                continue
            tensor, target = checkpoint.reader.read(key), jobs.get(key)
            encoding = checkpoint.reader.encoding(key) if is_packed else Dense(tuple(tensor.shape))
            if target is not None:
                tensor = prune(target, tensor)
                made[target.name] = described(target, tensor, config.storage)
                encoding = _encoding(target, config.storage, str(config.pattern))
                if is_packed:
                    encodings.pop(checkpoint.reader.encoded.get(key, ""), None)
                    encodings[target.name] = encoding.stored_as(target.name, key)
                if progress:
                    progress(len(made), len(jobs), target.name)
            for part, stored in encoding.encode(key, tensor).items():
                writer.add(part, stored)
        cores = {target.module for target in targets if target.layout == "core"}
        structure = Manifest(
            modules=tuple(
                replace(entry, relative_error=None, discarded_weight=None, center=None)
                if entry.name in cores
                else entry
                for entry in (checkpoint.manifest.modules if checkpoint.manifest else ())
            ),
            encodings=encodings,
            routing=checkpoint.routing,
        )
        if structure.needs_plugin:
            add_signpost(writer, structure.quantization_config())
        files = writer.finish()
    totals = checkpoint.totals(size=sum(file.stat().st_size for file in files))
    manifest = replace(
        structure,
        base_model=checkpoint.base_model(),
        totals=totals,
        history=checkpoint.history("sparsify", config.recorded(), config.optimisation.seed),
    )
    write_surroundings(work, checkpoint, manifest)
    return manifest, tuple(made[target.name] for target in targets)


def add_metrics(work: Path, checkpoint: Checkpoint, manifest: Manifest, metrics: dict[str, float]) -> None:
    """Write the manifest once more, with what the written model was found to do."""
    *earlier, last = manifest.history
    (work / MANIFEST).unlink()
    write_surroundings(work, checkpoint, replace(manifest, history=(*earlier, {**last, "metrics": metrics})))
