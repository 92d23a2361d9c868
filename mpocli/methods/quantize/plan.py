"""Which tensors quantize rounds, and how each is stored then."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mpocli.config.of_model import check_model
from mpocli.config.quantize import DEFAULT_ROLES, QuantizeConfig
from mpocli.errors import InputError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.matrices import select
from mpocli.hf.weight import Weight
from mpocli.io.checkpoint import DTYPE_NAMES
from mpocli.io.encodings.dense import Dense
from mpocli.io.encodings.quantised import Quantised
from mpocli.methods.skipped import Skipped


@dataclass(frozen=True)
class Target:
    """A weight of which tensors are rounded: their encodings by the leaf, `weight` or a core's name."""

    weight: Weight
    encodings: dict[str, Quantised]


def plan(checkpoint: Checkpoint, config: QuantizeConfig) -> tuple[list[Target], list[Skipped]]:
    """What is rounded and what is not. Raises `InputError` where nothing is left, or a glob matches nothing, and
    `UsageError` for an option that this model has no use for."""
    chosen = select(
        checkpoint.survey.weights,
        layers=config.layers,
        targets=config.targets,
        ignore=config.ignore,
        default_roles=DEFAULT_ROLES,
    )
    check_model(config, checkpoint.source.name, {"cores"} if any(weight.entry for weight in chosen) else ())
    targets, kept = [], []
    for weight in chosen:
        encodings, reason = _of(weight, checkpoint, config)
        if encodings:
            targets.append(Target(weight, encodings))
        if reason:
            kept.append(Skipped(weight.name, weight.role, reason))
    if not targets:
        why = f": {kept[0].name}: {kept[0].reason}" if kept else f" among {','.join(config.layers or DEFAULT_ROLES)}"
        raise InputError(f"{checkpoint.source.name}: nothing to round{why}", hint="see --layers and --target")
    return targets, kept


def _of(weight: Weight, checkpoint: Checkpoint, config: QuantizeConfig) -> tuple[dict[str, Quantised], str]:
    """The encodings of what is rounded of a weight, and why something of it stays wide."""
    if weight.obstacle or weight.key is None:
        return {}, weight.obstacle
    found: dict[str, Quantised] = {}
    reason = ""
    for leaf, shape in _leaves(weight, config):
        key = weight.key_of(leaf)
        before = checkpoint.reader.encoding(key)
        encoding = Quantised(
            shape,
            bits=config.bits,
            group=config.group,
            offsets=config.has_offsets,
            transposed=leaf == "weight" and weight.kind == "conv1d" and len(shape) == 2,
            dtype=DTYPE_NAMES[checkpoint.reader.specs[key].dtype],
        )
        wide = before.nbytes(0, checkpoint.reader.specs[key].dtype.itemsize)
        if not isinstance(before, Dense):
            reason = f"{leaf} is stored as {before.phrase} already"
        elif encoding.nbytes(0, 0) >= wide:
            reason = f"{leaf} would be no smaller: {encoding.nbytes(0, 0):,} bytes, it has {wide:,}"
        else:
            found[leaf] = encoding
    return found, reason


def _leaves(weight: Weight, config: QuantizeConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    if weight.entry is None:
        yield "weight", weight.shape[::-1] if weight.kind == "conv1d" else weight.shape
        return
    spec = weight.entry.spec
    if spec.share == "dense":
        yield "weight", (spec.experts, *weight.shape)
        return
    central = f"core_{spec.sites.central}"
    for leaf, shape in spec.core_shapes().items():
        if config.cores == "all" or leaf == central:
            yield leaf, shape
