"""quantize: round a checkpoint's matrices and cores to few bits, and pack them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mpocli.config.quantize import QuantizeConfig
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.weight import Weight
from mpocli.io.claim import writes_output
from mpocli.io.output import check_output, output_directory
from mpocli.io.totals import Totals
from mpocli.methods.device import device_of
from mpocli.methods.inputs import paths_read
from mpocli.methods.quantize.plan import Target, plan
from mpocli.methods.quantize.rounder import Known, parts_by_inputs, parts_of
from mpocli.methods.rewrite import Rewriting, Stored, as_stored
from mpocli.methods.skipped import Skipped
from mpocli.mpo import MPO
from mpocli.progress import Progress


@dataclass(frozen=True)
class RoundedWeight:
    """One weight whose tensors are rounded: `bytes` of all that the files hold for it, `dense_bytes` before.

    `error` = ‖W−Ŵ‖_F/‖W‖_F of the matrix, also where its cores are rounded; of experts, over their tensors.
    """

    name: str
    role: str | None
    shape: tuple[int, int]
    tensors: int
    bits: int
    error: float
    bytes: int
    dense_bytes: int
    action: str = "quantised"


@dataclass(frozen=True)
class QuantizeReport:
    """`bits_stored` of the rounded tensors' entries, scales and offsets counted."""

    out: str
    seconds: float
    method: str
    bits: int
    group: int
    bits_stored: float
    weights: tuple[RoundedWeight, ...]
    kept: tuple[Skipped, ...]
    before: Totals
    totals: Totals
    warnings: tuple[str, ...] = ()
    architecture: str = "AutoModel"


@writes_output
def run(
    model: str,
    config: QuantizeConfig,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Write a checkpoint whose chosen tensors are packed codes to a new directory `out`.

    Raises `UsageError` and `InputError` for what cannot be rounded, `NumericsError` where a tensor is not finite or no
    float16 scale reaches its entries.
    """
    started = time.perf_counter()
    device = device_of(config.device)
    checkpoint = Checkpoint.open(model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    check_output(out, paths_read(checkpoint.source.directory, config), overwrite=overwrite)
    before = checkpoint.totals()
    targets, kept = plan(checkpoint, config)
    warnings: list[str] = []
    looked = config.rounds_by == "gptq"
    known = Known()
    if looked:
        known = parts_by_inputs(checkpoint, config, targets, device, progress=progress, warn=warnings.append)
        if sparse := sum(target.is_sparse for target in targets):
            warnings.append(f"{sparse} sparse weights are rounded for their own sake, not by their inputs")
    worker = _Rounder(checkpoint, targets, known, searches=looked)
    rewriting = Rewriting(checkpoint, [target.weight for target in targets], worker.stored, progress=progress)
    with output_directory(out) as work:
        options = config.recorded()
        _, totals = rewriting.write(work, "quantize", options, config.seed, config.max_shard_bytes)
    entries = sum(worker.entries.values())
    return QuantizeReport(
        out=str(out),
        seconds=time.perf_counter() - started,
        method=config.rounds_by,
        bits=config.bits,
        group=config.group,
        bits_stored=8 * sum(worker.stored_bytes.values()) / entries,
        weights=tuple(worker.made),
        kept=tuple(kept),
        before=before,
        totals=totals,
        warnings=tuple(warnings),
        architecture=checkpoint.architecture,
    )


class _Rounder:
    """The transform of the rewriting: one weight in memory at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        targets: list[Target],
        known: Known,
        *,
        searches: bool,
    ) -> None:
        self.reader = checkpoint.reader
        self.targets = {target.weight.name: target for target in targets}
        self.known, self.searches = known, searches
        self.made: list[RoundedWeight] = []
        self.entries: dict[str, int] = {}
        self.stored_bytes: dict[str, int] = {}

    def stored(self, weight: Weight) -> Stored:
        target, before = self.targets[weight.name], as_stored(self.reader, weight)
        tensors, stored = dict(before.tensors), dict(before.parts)
        for leaf in tensors:
            tensors[leaf] = self.known.became.get(f"{weight.name}.{leaf}", tensors[leaf])
        for leaf, encoding in target.encodings.items():
            name, tensor = f"{weight.name}.{leaf}", before.tensors[leaf]
            parts = self.known.parts.pop(name, None) or parts_of(
                encoding, tensor, weight.key_of(leaf), searches=self.searches
            )
            stored[leaf] = tuple(part.cpu() for part in parts)
            tensors[leaf] = encoding.unpack(*stored[leaf])
            self.entries[name] = tensor.numel()
            self.stored_bytes[name] = encoding.nbytes(0, 0)
        self.made.append(
            RoundedWeight(
                name=weight.name,
                role=weight.role,
                shape=weight.shape,
                tensors=len(target.encodings),
                bits=next(iter(target.encodings.values())).bits,
                error=_error(weight, before.tensors, tensors),
                bytes=sum(encoding.nbytes(0, 0) for encoding in target.encodings.values())
                + sum(_nbytes(before, leaf) for leaf in before.tensors if leaf not in target.encodings),
                dense_bytes=sum(_nbytes(before, leaf) for leaf in before.tensors),
            )
        )
        entry = weight.entry.unmeasured() if weight.entry else None
        return Stored(tensors, entry, before.encodings | dict(target.encodings), stored)


def _error(weight: Weight, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """‖W−Ŵ‖_F/‖W‖_F of what the tensors stand for; of experts, over the tensors themselves."""
    if weight.entry is not None and not weight.entry.spec.experts:
        wide = [{name: tensor.double() for name, tensor in one.items()} for one in (before, after)]
        before, after = ({"": MPO(tuple(one.values()), weight.shape).to_matrix()} for one in wide)
    total = sum(_square(tensor) for tensor in before.values())
    lost = sum(_square(tensor.double() - after[name].double()) for name, tensor in before.items())
    return (lost / total) ** 0.5 if total else 0.0


def _square(tensor: Tensor) -> float:
    return float(tensor.to(torch.float64).square().sum())


def _nbytes(stored: Stored, leaf: str) -> int:
    parts = stored.parts.get(leaf) or (stored.tensors[leaf],)
    return sum(part.numel() * part.element_size() for part in parts)
