"""merge: write the MPOs and encoded tensors of a checkpoint as dense weights, for use without mpocli."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mpocli.config.merge import MergeConfig
from mpocli.errors import InputError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.values import dense_experts, dense_tensor
from mpocli.hf.weight import Weight
from mpocli.io.claim import writes_output
from mpocli.io.module_entry import ModuleEntry
from mpocli.io.output import check_output, output_directory
from mpocli.io.totals import Totals
from mpocli.methods.rewrite import Rewriting, Stored
from mpocli.mpo.linalg import cast
from mpocli.progress import Progress


@dataclass(frozen=True)
class MergeReport:
    """`unpacked` tensors that were not stored as they are, of each encoding `unpacked_from`, by what it is called."""

    out: str
    seconds: float
    merged: int
    unpacked: int
    unpacked_from: dict[str, int]
    experts: int
    before: Totals
    totals: Totals


@writes_output
def run(
    model: str,
    config: MergeConfig,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write an ordinary transformers checkpoint: every matrix rebuilt in float64, then cast to its cores' dtype.

    Sparse weights keep their zeros; those of a sparse core vanish in the contraction. What is in few bits becomes the
    values that it stands for. Experts become dense ones, which no stock class has: that output still needs the plug-in.
    Raises `InputError` for a checkpoint that is ordinary already or cannot be read.
    """
    started = time.perf_counter()
    checkpoint = Checkpoint.open(model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    if not checkpoint.is_mpo and not checkpoint.encodings:
        raise InputError(
            f"{model}: has no MPOs to merge, and nothing sparse or in few bits",
            hint="it is an ordinary checkpoint already: load it as it is",
        )
    check_output(out, checkpoint.source.directory, overwrite=overwrite)
    mpos = [weight for weight in checkpoint.survey.weights if weight.entry is not None]
    if mpos and all(weight.entry and weight.entry.spec.share == "dense" for weight in mpos):
        raise InputError(f"{model}: has dense experts, for which there is no stock class", hint="load it as it is")

    dtype = config.dtype

    def merged(weight: Weight) -> Stored:
        assert weight.key is not None and weight.entry is not None
        is_experts = bool(weight.entry.spec.experts)
        tensor = (dense_experts if is_experts else dense_tensor)(checkpoint.reader, weight)
        tensor = cast(tensor, getattr(torch, dtype) if dtype else tensor.dtype, weight.key)
        return Stored({"weight": tensor}, _as_dense(weight, dtype) if is_experts else None)

    rewriting = Rewriting(checkpoint, mpos, merged, dtype, checks=True, unpacks=True, progress=progress)
    with output_directory(out) as work:
        _, totals = rewriting.write(work, "merge", config.recorded(), 0, config.max_shard_bytes)
    return MergeReport(
        out=str(out),
        seconds=time.perf_counter() - started,
        merged=len(mpos),
        unpacked=len(checkpoint.encodings),
        unpacked_from=dict(Counter(encoding.phrase for encoding in checkpoint.encodings.values())),
        experts=sum(1 for weight in mpos if weight.entry and weight.entry.spec.experts),
        before=checkpoint.totals(),
        totals=totals,
    )


def _as_dense(weight: Weight, dtype: str | None) -> ModuleEntry:
    """The manifest's entry of dense experts in the place of those that share a core."""
    assert weight.entry is not None
    rows, columns = weight.shape
    spec = replace(weight.entry.spec, share="dense", out_dims=(rows, 1), in_dims=(1, columns), bond_dims=(1, 1, 1))
    return ModuleEntry(weight.name, weight.role, spec, dtype or weight.entry.dtype)
