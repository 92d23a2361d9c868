"""expand-moe: make n experts of every feed-forward network, which share the central cores of their matrices."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from mpocli.config.expand_moe import ExpandConfig
from mpocli.errors import InputError, UsageError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.layout import layouts
from mpocli.hf.skeleton import build_skeleton
from mpocli.hf.values import read_mpo
from mpocli.hf.weight import Weight
from mpocli.io.claim import writes_output
from mpocli.io.encodings.base import Encoding
from mpocli.io.encodings.known import widened
from mpocli.io.module_entry import ModuleEntry
from mpocli.io.mpo_spec import MPOSpec
from mpocli.io.output import check_output, output_directory
from mpocli.methods.expand_moe.plan import Network, networks, placed
from mpocli.methods.expand_moe.report import ExpandReport, experts_report
from mpocli.methods.inputs import paths_read
from mpocli.methods.rewrite import Rewriting, Stored
from mpocli.methods.selection import check_glob, chosen_weights
from mpocli.methods.site_choice import sites_of
from mpocli.methods.skipped import Skipped
from mpocli.mpo import MPO, Truncation, decompose, stored_error
from mpocli.mpo.linalg import cast, dtype_name
from mpocli.nn import DenseExperts, MPOExperts, Router
from mpocli.nn.dispatch import Place
from mpocli.progress import Progress

DEFAULT_ROLES = ("ffn",)
DEFAULT_SITES = 5


@writes_output
def run(
    model: str,
    config: ExpandConfig,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExpandReport:
    """Write a mixture of experts (MPOE, COLING 2022) to a new directory `out`, one matrix in memory at a time.

    Every expert begins as the pretrained network, so that the model computes what it did before. Raises `UsageError`
    and `InputError` for options and models that cannot be expanded.
    """
    started = time.perf_counter()
    if config.experts < config.routing.router.top_k:
        raise UsageError(
            f"--top-k {config.routing.router.top_k}: more than --experts {config.experts}", hint="choose less"
        )
    checkpoint = Checkpoint.open(model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    check_output(out, paths_read(checkpoint.source.directory, config), overwrite=overwrite)
    before = checkpoint.totals()
    found, kept = _chosen(checkpoint, config)
    _check_touched(config, found)
    found, kept, length_first = _placed(checkpoint, found, kept)
    config = replace(config, routing=replace(config.routing, length_first=length_first))
    config = _with_one_routing(checkpoint, config)
    worker = _Expander(checkpoint, config, found)
    routing = config.routing.to_dict()
    rewriting = Rewriting(checkpoint, worker.weights, worker.stored, routing=routing, progress=progress)
    with output_directory(out) as work:
        options = config.recorded()
        manifest, totals = rewriting.write(work, "expand-moe", options, config.seed, config.max_shard_bytes)
    reports = tuple(experts_report(weight, manifest.by_name[weight.name]) for weight in worker.weights)
    router_params = sum(report.router_params for report in reports)
    dense = sum(report.dense_experts_params - report.params + report.router_params for report in reports)
    return ExpandReport(
        out=str(out),
        seconds=time.perf_counter() - started,
        experts=config.experts,
        share=config.share or "dense",
        routing=routing,
        networks=len(found),
        modules=reports,
        kept=tuple(kept),
        totals=totals,
        before=before,
        router_params=router_params,
        dense_experts_params=totals.params + dense,  # which are routed too
        widened=widened(checkpoint.encodings, manifest.encodings),
    )


def _chosen(checkpoint: Checkpoint, config: ExpandConfig) -> tuple[list[Network], list[Skipped]]:
    """The networks that the options choose, and what is kept."""
    chosen = chosen_weights(checkpoint, config, DEFAULT_ROLES)
    found, kept = networks(chosen)
    for glob, _ in config.shapes:
        if not any(fnmatchcase(weight.name, glob) for network in found for weight in network.weights):
            check_glob(checkpoint, glob, "--shape")
            raise InputError(f"--shape {glob!r} matches no matrix that becomes experts", hint="see --layers")
    return found, kept


def _placed(
    checkpoint: Checkpoint, found: list[Network], kept: list[Skipped]
) -> tuple[list[Network], list[Skipped], bool]:
    """The networks whose inputs are known to be tokens, what is kept, and whether the model has (length, batch)."""
    chunk = getattr(checkpoint.config, "chunk_size_feed_forward", 0)
    if chunk:
        raise InputError(
            f"config.json: chunk_size_feed_forward {chunk}: networks get pieces, and routers need whole texts",
            hint="set it to 0",
        )
    skeleton = build_skeleton(checkpoint.config, trust_remote_code=checkpoint.trust_remote_code)
    told = layouts(skeleton, [weight.name for network in found for weight in network.weights])
    found, kept = placed(found, kept, told)
    names = {weight.name for network in found for weight in network.weights}
    return found, kept, any(layout == "length" for name, layout in told.items() if name in names)


def _check_touched(config: ExpandConfig, found: list[Network]) -> None:
    """`UsageError` for options of a decomposition where nothing is decomposed any more."""
    weights = [weight for network in found for weight in network.weights]
    for option, value, touched in (
        ("--trunc", config.trunc, weights),
        ("--sites", config.sites, weights),
        *(
            (f"--shape {glob}", shape, [weight for weight in weights if fnmatchcase(weight.name, glob)])
            for glob, shape in config.shapes
        ),
    ):
        if value is not None and all(weight.entry is not None for weight in touched):
            raise UsageError(
                f"{option}: what it is for is decomposed already, and its cores become the experts' as they are",
                hint="leave it out, or run mpocli merge first",
            )


def _with_one_routing(checkpoint: Checkpoint, config: ExpandConfig) -> ExpandConfig:
    """Routing is the model's: `UsageError` where networks that are experts already would be routed otherwise."""
    stored = checkpoint.routing
    if not stored:
        return config
    if config.share != "central":  # the mask is of others' shared cores
        masks = {name: stored[name] for name in ("mask_prob", "mask_elements")}
        config = replace(config, routing=replace(config.routing, **masks))
    for name, value in config.routing.to_dict().items():
        if name != "length_first" and stored.get(name) != value:
            raise UsageError(
                f"{name} {value}: the experts that the model has already have {stored.get(name)}, and one model routes "
                "in one way",
                hint="give the options that they were made with",
            )
    return config


class _Expander:
    """Makes the layer of all experts out of one matrix, and each network's router with the first of its layers."""

    def __init__(self, checkpoint: Checkpoint, config: ExpandConfig, found: Sequence[Network]) -> None:
        self.reader, self.config = checkpoint.reader, config
        self.weights = [weight for network in found for weight in network.weights]
        self.places: dict[str, Place] = {network.last.name: "out" for network in found}
        self.routers = {weight.name: network.first[0].name for network in found for weight in network.weights}

    def stored(self, weight: Weight) -> Stored:
        """All that is stored of one matrix, its bias apart."""
        config, dtype, place = self.config, weight.dtype, self.places.get(weight.name, "in")
        router = None if self.routers[weight.name] == weight.name else self.routers[weight.name]
        # By the matrix's name: what is drawn for it does not depend on what else was chosen.
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + crc32(weight.name.encode())) % 2**63)
        options: dict[str, Any] = {"experts": config.experts, "place": place, "dtype": dtype}
        error: float | None = 0.0
        if config.share is None:
            dense = DenseExperts.from_matrix(self._matrix(weight), **options)
            dense.perturb(config.noise, generator)
            tensors = {"weight": dense.weight.detach()}
            rows, columns = weight.shape
            spec = MPOSpec(weight.kind, weight.shape, (rows, 1), (1, columns), (1, 1, 1))
        else:
            mpo, error = self._mpo(weight)
            layer = MPOExperts.from_mpo(mpo, share=config.share, **options)
            layer.perturb(config.noise, generator)
            tensors = {f"core_{k}": core.detach() for k, core in enumerate(layer.cores)}
            spec = MPOSpec(weight.kind, weight.shape, mpo.site_shape.out_dims, mpo.site_shape.in_dims, mpo.bond_dims)
        if router is None:
            made = Router(weight.shape[1], config.experts, config.routing.router, generator=generator, dtype=dtype)
            tensors |= {"router.weight": made.weight.detach(), "router.bias": made.bias.detach()}
        spec = replace(spec, experts=config.experts, share=config.share or "dense", place=place, router=router)
        measured = None if config.noise else error
        entry = ModuleEntry(weight.name, weight.role, spec, dtype_name(dtype), relative_error=measured)
        encodings = self._encodings(weight)
        packed = {
            leaf: self.reader.read_parts(weight.key_of(leaf)) for leaf, one in encodings.items() if not one.is_exact
        }
        return Stored(tensors, entry, encodings, packed)

    def _encodings(self, weight: Weight) -> dict[str, Encoding]:
        """A core that is pruned or rounded stays packed where it is the one that all experts share."""
        if weight.entry is None or self.config.share != "central":
            return {}
        leaf = f"core_{weight.entry.spec.sites.central}"
        key = weight.key_of(leaf)
        return {leaf: self.reader.encoding(key)} if key in self.reader.encoded else {}

    def _matrix(self, weight: Weight) -> Tensor:
        if weight.entry is not None:
            mpo = read_mpo(self.reader, weight)
            return mpo.to(dtype=torch.float64).to_matrix().to(weight.dtype)
        assert weight.key is not None
        return weight.oriented(self.reader.read(weight.key))

    def _mpo(self, weight: Weight) -> tuple[MPO, float | None]:
        """The stored cores, or a decomposition of the matrix; and its relative error as it will be stored, if known."""
        if weight.entry is not None:
            return read_mpo(self.reader, weight), weight.entry.relative_error
        assert weight.key is not None
        matrix, name = self._matrix(weight), weight.key
        sites = sites_of(weight, self.config.shapes, self.config.sites or DEFAULT_SITES)
        mpo, _ = decompose(matrix, sites, Truncation(self.config.trunc), name=name)
        stored = MPO(tuple(cast(core, weight.dtype, name) for core in mpo.cores), mpo.shape)
        difference, norm = stored_error(matrix, stored)
        return stored, difference / norm if norm else 0.0
