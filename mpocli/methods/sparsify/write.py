"""What becomes of a tensor that is pruned, and of the checkpoint around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mpocli.config.sparsify import SparsifyConfig
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.surroundings import write_surroundings
from mpocli.hf.weight import Weight
from mpocli.io.encodings.bitmask import Bitmask
from mpocli.io.encodings.dense import Dense
from mpocli.io.manifest import Manifest
from mpocli.io.schema import MANIFEST
from mpocli.io.totals import Totals
from mpocli.methods.rewrite import Rewriting, Stored, as_stored
from mpocli.methods.sparsify.plan import Target
from mpocli.mpo.linalg import check_finite
from mpocli.progress import Progress
from mpocli.sparse import global_masks, zeros_in


@dataclass(frozen=True)
class SparseTensor:
    """One pruned tensor as it is stored: `sparsity` = zeros / entries, `bytes` as stored."""

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
        bytes=(Dense if storage == Dense.name else Bitmask)(target.shape).nbytes(zeros, itemsize),
        dense_bytes=entries * itemsize,
    )


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
) -> tuple[Manifest, Totals, tuple[SparseTensor, ...]]:
    """The checkpoint with every target pruned, one weight in memory at a time beside what `prune` holds."""
    by_weight = {target.weight.name: target for target in targets}
    made: dict[str, SparseTensor] = {}

    def pruned(weight: Weight) -> Stored:
        target, before = by_weight[weight.name], as_stored(checkpoint.reader, weight)
        tensor = prune(target, before.tensors[target.leaf])
        made[target.name] = described(target, tensor, config.storage)
        entry = weight.entry.unmeasured() if weight.entry else None
        encodings = before.encodings | {target.leaf: Bitmask(target.shape, str(config.pattern))}
        if config.storage == Dense.name:
            return Stored(before.tensors | {target.leaf: tensor}, entry)
        return replace(before.with_tensor(target.leaf, tensor), entry=entry, encodings=encodings)

    def tell(done: int, total: int, weight: str) -> None:
        if progress:
            progress(done, total, by_weight[weight].name)

    rewriting = Rewriting(
        checkpoint,
        [target.weight for target in targets],
        pruned,
        unpacks=config.storage == Dense.name,
        progress=tell,
    )
    options, seed = config.recorded(), config.optimisation.seed
    manifest, totals = rewriting.write(work, "sparsify", options, seed, config.max_shard_bytes)
    return manifest, totals, tuple(made[target.name] for target in targets)


def add_metrics(work: Path, checkpoint: Checkpoint, manifest: Manifest, metrics: dict[str, float]) -> None:
    """Write the manifest once more, with what the written model was found to do."""
    *earlier, last = manifest.history
    (work / MANIFEST).unlink()
    write_surroundings(work, checkpoint, replace(manifest, history=(*earlier, {**last, "metrics": metrics})))
