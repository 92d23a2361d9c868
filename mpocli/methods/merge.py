"""merge: write the MPOs and sparse tensors of a checkpoint as dense weights, for use without mpocli."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mpocli.errors import InputError
from mpocli.hf.artifact import Checkpoint, write_surroundings
from mpocli.hf.targets import Weight
from mpocli.io.checkpoint import CheckpointReader
from mpocli.io.claim import writes_output
from mpocli.io.manifest import Manifest, ModuleEntry, Totals
from mpocli.io.output import check_output, output_directory
from mpocli.io.signpost import SIGNPOST, add_signpost
from mpocli.io.writer import CheckpointWriter
from mpocli.mpo import MPO
from mpocli.mpo.linalg import cast, check_finite


@dataclass(frozen=True)
class MergeReport:
    out: str
    seconds: float
    merged: int
    unpacked: int
    experts: int
    before: Totals
    totals: Totals


@writes_output
def run(
    model: str,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> MergeReport:
    """Write an ordinary transformers checkpoint: every matrix rebuilt in float64, then cast to its cores' dtype.

    Sparse weights keep their zeros; those of a sparse core vanish in the contraction. Experts become dense ones, which
    no stock class has: that output still needs the plug-in. Raises `InputError` for a checkpoint that is ordinary
    already or cannot be read.
    """
    started = time.perf_counter()
    checkpoint = Checkpoint.open(model, revision=revision, trust_remote_code=trust_remote_code)
    if not checkpoint.is_mpo and not checkpoint.encodings:
        raise InputError(
            f"{model}: has no MPOs to merge, and nothing sparse",
            hint="it is an ordinary checkpoint already: load it as it is",
        )
    check_output(out, checkpoint.source.directory, overwrite=overwrite)
    reader = checkpoint.reader
    mpos = {weight.key: weight for weight in checkpoint.survey.weights if weight.entry is not None}
    experts = [weight for weight in mpos.values() if weight.entry is not None and weight.entry.spec.experts]
    if mpos and all(weight.entry and weight.entry.spec.share == "dense" for weight in mpos.values()):
        raise InputError(f"{model}: has dense experts, for which there is no stock class", hint="load it as it is")
    skip = {SIGNPOST}
    entries = tuple(_as_dense(weight, dtype) for weight in experts)
    structure = Manifest(modules=entries, routing=checkpoint.routing)
    for weight in mpos.values():
        assert weight.entry is not None
        skip |= {weight.key_of(core) for core in weight.entry.spec.core_shapes()} | set(weight.follower_keys)
    with output_directory(out) as work, CheckpointWriter(work, max_shard_bytes) as writer:
        done = 0
        for key in reader:
            if key in skip:
                continue
            if key in mpos:
                is_experts = mpos[key] in experts
                tensor = dense_experts(reader, mpos[key]) if is_experts else dense_tensor(reader, mpos[key])
                done += 1
                if progress:
                    progress(done, len(mpos), mpos[key].name)
            else:
                tensor = reader.read(key)
                if key in checkpoint.survey.other_keys:
                    writer.add(key, tensor)
                    continue
            writer.add(key, cast(tensor, getattr(torch, dtype) if dtype else tensor.dtype, key))
        if experts:
            add_signpost(writer, structure.quantization_config())
        files = writer.finish()
        size = sum(file.stat().st_size for file in files)
        more = sum(entry.spec.params - entry.spec.dense_params for entry in entries)
        totals = checkpoint.totals(checkpoint.survey.dense_params + more, size, dtype)
        manifest = replace(
            structure,
            base_model=checkpoint.base_model(),
            totals=totals,
            history=checkpoint.history("merge", {"dtype": dtype}, 0),
        )
        write_surroundings(work, checkpoint, manifest, dtype=dtype)
    return MergeReport(
        out=str(out),
        seconds=time.perf_counter() - started,
        merged=len(mpos),
        unpacked=len(checkpoint.encodings),
        experts=len(experts),
        before=checkpoint.totals(),
        totals=totals,
    )


def _as_dense(weight: Weight, dtype: str | None) -> ModuleEntry:
    """The manifest's entry of dense experts in the place of those that share a core."""
    assert weight.entry is not None
    rows, columns = weight.shape
    spec = replace(weight.entry.spec, share="dense", out_dims=(rows, 1), in_dims=(1, columns), bond_dims=(1, 1, 1))
    return ModuleEntry(weight.name, weight.role, spec, dtype or weight.entry.dtype)


def dense_experts(reader: CheckpointReader, weight: Weight) -> torch.Tensor:
    """(n, O, I), the matrices of a layer's experts in their cores' dtype."""
    assert weight.entry is not None
    spec = weight.entry.spec
    if spec.share == "dense":
        return reader.read(weight.key_of("weight"))
    cores = [reader.read(weight.key_of(core)) for core in spec.core_shapes()]
    for core, name in zip(cores, spec.core_shapes(), strict=True):
        check_finite(core, weight.key_of(name))
    matrices = []
    for expert in range(spec.experts):
        own = tuple((core[expert] if core.dim() == 5 else core).double() for core in cores)
        matrices.append(MPO(own, weight.shape).to_matrix().to(cores[0].dtype))
    return torch.stack(matrices)


def read_mpo(reader: CheckpointReader, weight: Weight) -> MPO:
    """The stored cores of a decomposed weight. Raises `InputError` where one is not finite."""
    assert weight.entry is not None
    cores = []
    for core in weight.entry.spec.core_shapes():
        name = weight.key_of(core)
        tensor = reader.read(name)
        check_finite(tensor, name)
        cores.append(tensor)
    return MPO(tuple(cores), weight.shape, weight.entry.center)


def dense_tensor(reader: CheckpointReader, weight: Weight) -> torch.Tensor:
    """The dense weight of a decomposed module, in the orientation and dtype that its layer stores."""
    mpo = read_mpo(reader, weight)
    matrix = mpo.to(dtype=torch.float64).to_matrix().to(mpo.cores[0].dtype)
    return weight.oriented(matrix).contiguous()
