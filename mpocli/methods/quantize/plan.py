"""Which tensors quantize rounds, and how each is stored then."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mpocli.config.common import DEFAULT_ROLES
from mpocli.config.of_model import check_model
from mpocli.config.quantize import QuantizeConfig
from mpocli.errors import InputError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.weight import Weight
from mpocli.io.checkpoint import DTYPE_NAMES
from mpocli.io.encodings.bitmask import Bitmask
from mpocli.io.encodings.dense import Dense
from mpocli.io.encodings.quantised import Quantised
from mpocli.io.encodings.quantised_bitmask import QuantisedBitmask
from mpocli.methods.selection import chosen_weights
from mpocli.methods.skipped import Skipped
from mpocli.mpo.linalg import dtype_name

OnGrids = Quantised | QuantisedBitmask


@dataclass(frozen=True)
class Target:
    """A weight of which tensors are rounded: their encodings by the leaf, `weight` or a core's name. `is_packed` where
    another of its tensors is in parts already, and stays as it is."""

    weight: Weight
    encodings: dict[str, OnGrids]
    is_packed: bool = False

    @property
    def is_sparse(self) -> bool:
        """Whether zeros are among what is rounded, which are to stay."""
        return any(encoding.holds_zeros for encoding in self.encodings.values())


def plan(checkpoint: Checkpoint, config: QuantizeConfig) -> tuple[list[Target], list[Skipped]]:
    """What is rounded and what is not. Raises `InputError` where nothing is left, or a glob matches nothing, and
    `UsageError` for an option that this model has no use for."""
    chosen = chosen_weights(checkpoint, config, DEFAULT_ROLES)
    check_model(config, checkpoint.source.name, {"cores"} if any(weight.entry for weight in chosen) else ())
    targets, kept = [], []
    for weight in chosen:
        target, reason = _of(weight, checkpoint, config)
        if target.encodings:
            targets.append(target)
        if reason:
            kept.append(Skipped(weight.name, weight.role, reason, _action(weight, checkpoint, config)))
    if not targets:
        why = f": {kept[0].name}: {kept[0].reason}" if kept else f" among {','.join(config.layers or DEFAULT_ROLES)}"
        again = bool(kept) and all(one.action == "quantised" for one in kept)
        hint = "run mpocli merge first" if again else "see --layers and --target"
        raise InputError(f"{checkpoint.source.name}: nothing to round{why}", hint=hint)
    return targets, kept


def _action(weight: Weight, checkpoint: Checkpoint, config: QuantizeConfig) -> str:
    """What a weight that stays is: in few bits already, or as it was."""
    keys = [weight.key_of(leaf) for leaf, _ in _leaves(weight, config)] if weight.key else []
    found = [checkpoint.reader.encoding(key).code_bits for key in keys if key in checkpoint.reader]
    return "quantised" if any(bits is not None for bits in found) else "kept"


def _of(weight: Weight, checkpoint: Checkpoint, config: QuantizeConfig) -> tuple[Target, str]:
    """What is rounded of a weight, and why something of it stays wide."""
    if weight.obstacle or weight.key is None:
        return Target(weight, {}), weight.obstacle
    found: dict[str, OnGrids] = {}
    reason, is_packed = "", False
    for leaf, shape in _leaves(weight, config):
        key = weight.key_of(leaf)
        spec, before = checkpoint.reader.specs[key], checkpoint.reader.encoding(key)
        if before.code_bits is not None:
            reason, is_packed = f"{leaf} is stored as {before.phrase} already", True
            continue
        if DTYPE_NAMES[spec.dtype] not in ("F64", "F32", "F16", "BF16"):
            reason = f"{leaf} is stored in {dtype_name(spec.dtype)}"
            continue
        encoding: OnGrids = Quantised(
            shape,
            bits=config.bits,
            group=config.group,
            offsets=config.has_offsets,
            transposed=leaf == "weight" and weight.kind == "conv1d" and len(shape) == 2,
            dtype=DTYPE_NAMES[spec.dtype],
        )
        wide = sum(part.nbytes for part in checkpoint.reader.parts(key))
        if isinstance(before, Bitmask):
            kept = checkpoint.reader.parts(key)[1].numel
            encoding = QuantisedBitmask(**vars(encoding), pattern=before.pattern, kept=kept)
        if encoding.nbytes(0, 0) >= wide:
            reason = f"{leaf} would be no smaller: {encoding.nbytes(0, 0):,} bytes, it has {wide:,}"
            is_packed = is_packed or not isinstance(before, Dense)
        else:
            found[leaf] = encoding
    return Target(weight, found, is_packed), reason


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
