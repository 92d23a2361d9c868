"""inspect: what a checkpoint holds, matrix by matrix, and whether its manifest tells the truth."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpocli.hf.hub import resolve
from mpocli.hf.matrices import M, Matrix, select
from mpocli.hf.metadata import Metadata, read_metadata
from mpocli.hf.recorded import recorded
from mpocli.io.manifest import Manifest
from mpocli.io.mpo_spec import MPOSpec
from mpocli.io.schema import MANIFEST
from mpocli.io.stored import StoredTensors, stored_tensors
from mpocli.io.totals import Totals
from mpocli.progress import Progress


@dataclass(frozen=True)
class ModuleView:
    """One weight matrix: counts, structure, and with a spectrum its σ and entropy (nats) at every inner bond.

    `sparsity` = zeros / entries of its sparse tensor (the matrix, or a core), `zeros` of it, None where no encoding
    tells; `bytes` as stored, and `bits` for each entry of a matrix or chain of which something is in few, with their
    scales, None for others. Of `experts` `shared_params` are everybody's, `expert_params` each one's own (router and
    bias apart).
    """

    name: str
    role: str | None
    action: str  # mpo | experts | kept
    reason: str
    shape: tuple[int, int]
    params: int
    dense_params: int
    central_params: int | None
    auxiliary_params: int | None
    bytes: int
    relative_error: float | None
    out_dims: tuple[int, ...] | None = None
    in_dims: tuple[int, ...] | None = None
    bond_dims: tuple[int, ...] | None = None
    tied: tuple[str, ...] = ()
    experts: int = 0
    shared_params: int = 0
    expert_params: int = 0
    sparsity: float | None = None
    zeros: int | None = None
    singular_values: tuple[tuple[float, ...], ...] | None = None
    entropy_nats: tuple[float, ...] | None = None
    bits: float | None = None
    measured_against: str | None = None  # sha256 of the MPO's weights that the error refers to, None for a dense matrix


@dataclass(frozen=True)
class InspectReport:
    """`problems` lists what `verify` found, empty where everything holds, None where it was not asked. `sparsity` =
    zeros / entries of all sparse tensors, None without any."""

    model: str
    totals: Totals
    modules: tuple[ModuleView, ...]
    rest_params: int
    history: tuple[str, ...]
    seconds: float
    problems: tuple[str, ...] | None = None
    checks: int = 0
    has_manifest: bool = True
    sparsity: float | None = None
    zeros: int = 0


def run(
    model: str,
    *,
    module: tuple[str, ...] = (),
    spectrum: bool = False,
    verify: bool = False,
    count_zeros: bool = False,
    base: str | None = None,
    sites: int = 5,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> InspectReport:
    """Look at an MPO or an ordinary checkpoint; nothing is changed.

    `spectrum` reads the cores of an MPO, and decomposes a dense matrix (on `sites` sites) to see what its bonds
    would carry. `count_zeros` reads the weights that are stored dense and counts theirs too, as is done without being
    asked where `sparsify --storage dense` is the history. `verify` checks hashes, counts, canonical claims, and with
    `base` every claimed error again. Without any of these a checkpoint whose manifest lists its matrices is shown from
    its metadata, and torch is not imported.
    """
    started = time.perf_counter()
    source = resolve(model, revision=revision, trust_remote_code=trust_remote_code)
    metadata = read_metadata(source, stored_tensors)
    if not (spectrum or verify or count_zeros or _zeros_are_dense(metadata.manifest)):
        known = recorded(metadata)
        if known is not None:
            zeros = _zeros_stored(metadata.reader)
            views = [_view(weight, metadata.reader, zeros) for weight in _chosen(known.weights, module)]
            return _report(model, metadata, known.weights, known.totals, views, zeros, started)

    from mpocli.hf import quiet
    from mpocli.hf.artifact import Checkpoint
    from mpocli.methods.inspect import values as inspect_values
    from mpocli.methods.inspect.verify import verify as verify_

    with quiet.transformers():
        checkpoint = Checkpoint.of(metadata, trust_remote_code=trust_remote_code)
        weights, reader = checkpoint.survey.weights, checkpoint.reader
        chosen = _chosen(weights, module)
        zeros = _zeros_stored(reader)
        if count_zeros or _zeros_are_dense(metadata.manifest):
            keys = [key for weight in weights for key in _keys_of(weight) if key not in zeros]
            zeros |= inspect_values.zeros_counted(reader, keys)
        views = []
        for count, weight in enumerate(chosen, 1):
            view = _view(weight, reader, zeros)
            is_experts = weight.entry is not None and weight.entry.spec.experts
            if spectrum and (weight.entry or module or weight.role) and not weight.obstacle and not is_experts:
                view = replace(view, **inspect_values.spectrum(reader, weight, sites))
            views.append(view)
            if progress and spectrum:
                progress(count, len(chosen), weight.name)
        report = _report(model, checkpoint, weights, checkpoint.totals(), views, zeros, started)
        if verify:
            problems, checks = verify_(checkpoint, base, progress)
            report = replace(report, problems=problems, checks=checks, seconds=time.perf_counter() - started)
    return report


def _zeros_are_dense(manifest: Manifest | None) -> bool:
    """Whether `sparsify --storage dense` is the history: its zeros are told by the values alone."""
    return any(
        entry.get("command") == "sparsify" and (entry.get("options") or {}).get("storage") == "dense"
        for entry in (manifest.history if manifest else ())
    )


def _chosen(weights: Sequence[M], globs: tuple[str, ...]) -> list[M]:
    if not globs:
        return list(weights)
    return select(weights, layers=None, targets=globs, ignore=(), default_roles=(), target_option="--module")


def _report(
    model: str,
    opened: Metadata[Any],
    weights: Sequence[Matrix[Any]],
    totals: Totals,
    views: Sequence[ModuleView],
    zeros: Mapping[str, int],
    started: float,
) -> InspectReport:
    history = opened.manifest.history if opened.manifest else ()
    entries = sum(opened.reader.specs[key].numel for key in zeros)
    return InspectReport(
        model=model,
        totals=totals,
        modules=tuple(views),
        rest_params=totals.dense_params - sum(weight.dense_params for weight in weights),
        history=tuple(str(entry.get("command")) for entry in history),
        seconds=time.perf_counter() - started,
        has_manifest=(opened.source.directory / MANIFEST).is_file(),
        sparsity=sum(zeros.values()) / entries if entries else None,
        zeros=sum(zeros.values()),
    )


def _view(weight: Matrix[Any], reader: StoredTensors[Any], zeros: Mapping[str, int]) -> ModuleView:
    return _as_encoded(_structure(weight), weight, reader, zeros)


def _structure(weight: Matrix[Any]) -> ModuleView:
    tied = tuple(member.name for member in weight.members[1:])
    if weight.entry is None:
        size = weight.dense_params
        return ModuleView(
            weight.name,
            weight.role,
            "kept",
            weight.obstacle,
            weight.shape,
            size,
            size,
            None,
            None,
            size * weight.dtype.itemsize,
            0.0,
            tied=tied,
        )
    spec = weight.entry.spec
    dense = spec.experts * weight.dense_params if spec.share == "dense" else 0
    return ModuleView(
        weight.name,
        weight.role,
        "experts" if spec.experts else "mpo",
        "",
        weight.shape,
        spec.params,
        weight.dense_params,
        spec.central_params,
        spec.auxiliary_params,
        spec.params * weight.dtype.itemsize,
        weight.entry.relative_error,
        spec.out_dims,
        spec.in_dims,
        spec.bond_dims,
        tied,
        experts=spec.experts,
        shared_params=spec.central_params if spec.experts and spec.share == "central" else 0,
        expert_params=_expert_params(spec, dense),
        measured_against=weight.entry.measured_against,
    )


def _expert_params(spec: MPOSpec, dense: int) -> int:
    """Of one expert's own."""
    if not spec.experts:
        return 0
    shared = spec.central_params if spec.share == "central" else 0
    return (dense or spec.central_params + spec.auxiliary_params - shared) // spec.experts


def _keys_of(weight: Matrix[Any]) -> list[str]:
    """The names in the files of a matrix (of dense experts, of all theirs), or of its cores."""
    if weight.key is None:
        return []
    if weight.entry is None or weight.entry.spec.share == "dense":
        return [weight.key]
    return [weight.key_of(core) for core in weight.entry.spec.core_shapes()]


def _zeros_stored(reader: StoredTensors[Any]) -> dict[str, int]:
    """Zeros of every tensor that is stored sparse."""
    counts = {key: reader.zeros(key) for key in reader.encoded}
    return {key: zeros for key, zeros in counts.items() if zeros is not None}


def _as_encoded(
    view: ModuleView, weight: Matrix[Any], reader: StoredTensors[Any], zeros: Mapping[str, int]
) -> ModuleView:
    """What of the matrix, or of its cores, is sparse or in few bits, and what encodings save of the files."""
    keys = _keys_of(weight)
    parts = {key: sum(part.nbytes for part in reader.parts(key)) for key in keys if key in reader.encoded}
    view = replace(view, bytes=view.bytes - sum(reader.specs[key].nbytes - size for key, size in parts.items()))
    if any(reader.encoding(key).code_bits for key in parts):
        sizes = [(sum(part.nbytes for part in reader.parts(key)), reader.specs[key].numel) for key in keys]
        view = replace(view, bits=8 * sum(size for size, _ in sizes) / sum(entries for _, entries in sizes))
        if weight.entry is None:  # what rounding took is not in the files
            view = replace(view, relative_error=None)
    sparse = [key for key in keys if key in zeros]
    if not sparse:
        return view
    entries, total = sum(reader.specs[key].numel for key in sparse), sum(zeros[key] for key in sparse)
    return replace(view, sparsity=total / entries, zeros=total)
