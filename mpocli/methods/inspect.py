"""inspect: what a checkpoint holds, matrix by matrix, and whether its manifest tells the truth."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from mpocli.hf.artifact import Checkpoint
from mpocli.hf.matrices import select
from mpocli.hf.targets import Weight
from mpocli.io.checkpoint import CheckpointReader
from mpocli.io.manifest import MANIFEST, MPOSpec, Totals
from mpocli.methods.merge import read_mpo
from mpocli.methods.verify import verify as verify_
from mpocli.mpo import MPO, bond_spectra, entropy_nats, site_shape
from mpocli.sparse import bitmask_bytes

Progress = Callable[[int, int, str], None]
# A dense tensor with fewer zeros than this part has them by chance.
_SPARSE = 0.01


@dataclass(frozen=True)
class ModuleView:
    """One weight matrix: counts, structure, and with a spectrum its σ and entropy (nats) at every inner bond.

    `sparsity` = zeros / entries of its sparse tensor (the matrix, or a core), `zeros` of it, None where none is
    stored as a bitmask; `bytes` as stored. Of `experts` `shared_params` are everybody's, `expert_params` each one's own
    (router and bias apart).
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
    `base` every claimed error again.
    """
    started = time.perf_counter()
    checkpoint = Checkpoint.open(model, revision=revision, trust_remote_code=trust_remote_code)
    weights = checkpoint.survey.weights
    chosen = list(weights)
    if module:
        chosen = select(weights, layers=None, targets=module, ignore=(), default_roles=(), target_option="--module")
    history = checkpoint.manifest.history if checkpoint.manifest else ()
    stored_dense = any(
        entry.get("command") == "sparsify" and (entry.get("options") or {}).get("storage") == "dense"
        for entry in history
    )
    zeros = _zeros_of(checkpoint.reader, weights, count=count_zeros or stored_dense)
    views = []
    for count, weight in enumerate(chosen, 1):
        view = _with_sparsity(_view(weight), weight, checkpoint.reader, zeros)
        is_experts = weight.entry is not None and weight.entry.spec.experts
        if spectrum and (weight.entry or module or weight.role) and not weight.obstacle and not is_experts:
            view = _with_spectrum(view, checkpoint, weight, sites)
        views.append(view)
        if progress and spectrum:
            progress(count, len(chosen), weight.name)
    problems: tuple[str, ...] | None = None
    checks = 0
    if verify:
        problems, checks = verify_(checkpoint, base, progress)
    rest = checkpoint.survey.dense_params - sum(weight.dense_params for weight in weights)
    entries = sum(checkpoint.reader.specs[key].numel for key in zeros)
    return InspectReport(
        model=model,
        totals=checkpoint.totals(),
        modules=tuple(views),
        rest_params=rest,
        history=tuple(str(entry.get("command")) for entry in history),
        seconds=time.perf_counter() - started,
        problems=problems,
        checks=checks,
        sparsity=sum(zeros.values()) / entries if entries else None,
        zeros=sum(zeros.values()),
        has_manifest=(checkpoint.source.directory / MANIFEST).is_file(),
    )


def _view(weight: Weight) -> ModuleView:
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


def _keys_of(weight: Weight) -> list[str]:
    """The names in the files of a matrix, or of its cores."""
    if weight.key is None:
        return []
    return [weight.key_of(core) for core in weight.entry.spec.core_shapes()] if weight.entry else [weight.key]


def _zeros_of(reader: CheckpointReader, weights: Sequence[Weight], *, count: bool) -> dict[str, int]:
    """Zeros of every sparse tensor: those that are stored as such, and with `count` those that are mostly so."""
    found = {key: reader.specs[key].numel - reader.kept_values[key] for key in reader.encoded}
    if count:
        for key in (key for weight in weights for key in _keys_of(weight) if key not in found and key in reader):
            tensor = reader.read(key)
            zeros = int((tensor == 0).sum())
            if zeros >= _SPARSE * tensor.numel():
                found[key] = zeros
    return found


def _with_sparsity(view: ModuleView, weight: Weight, reader: CheckpointReader, zeros: Mapping[str, int]) -> ModuleView:
    """What of the matrix, or of its cores, is sparse, and what that saves of the files."""
    sparse = [key for key in _keys_of(weight) if key in zeros]
    if not sparse:
        return view
    entries, total = sum(reader.specs[key].numel for key in sparse), sum(zeros[key] for key in sparse)
    saved = sum(
        reader.specs[key].nbytes
        - bitmask_bytes(reader.specs[key].numel, reader.kept_values[key], reader.specs[key].dtype.itemsize)
        for key in sparse
        if key in reader.encoded
    )
    return replace(view, sparsity=total / entries, zeros=total, bytes=view.bytes - saved)


def _with_spectrum(view: ModuleView, checkpoint: Checkpoint, weight: Weight, sites: int) -> ModuleView:
    if weight.entry is not None:
        mpo = read_mpo(checkpoint.reader, weight)
    else:
        assert weight.key is not None
        matrix = weight.oriented(checkpoint.reader.read(weight.key))
        mpo = MPO.from_matrix(matrix, site_shape(*weight.shape, sites), name=weight.key)
    spectra = bond_spectra(mpo)
    return replace(
        view,
        out_dims=mpo.site_shape.out_dims,
        in_dims=mpo.site_shape.in_dims,
        bond_dims=mpo.bond_dims,
        singular_values=tuple(tuple(values.tolist()) for values in spectra),
        entropy_nats=tuple(entropy_nats(values) for values in spectra),
    )
