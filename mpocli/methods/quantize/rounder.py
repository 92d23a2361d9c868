"""The parts of every tensor that is rounded: to nearest, or block by block in the norm of what goes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mpocli.config.quantize import QuantizeConfig
from mpocli.errors import NumericsError, UsageError
from mpocli.hf.activations import Inputs
from mpocli.hf.artifact import Checkpoint
from mpocli.io.encodings.quantised import Quantised
from mpocli.io.encodings.quantised_bitmask import QuantisedBitmask
from mpocli.methods.data.by_blocks import change_by_blocks
from mpocli.methods.quantize.plan import OnGrids, Target
from mpocli.methods.rounding import round_chain, round_matrix
from mpocli.mpo import MPO
from mpocli.mpo.gram import regularised
from mpocli.mpo.linalg import check_finite
from mpocli.nn import MPOModule
from mpocli.progress import Progress
from mpocli.quant.grid import nearest, searched
from mpocli.quant.kept import round_kept

Parts = tuple[Tensor, ...]
# Of the mean of the inputs' second moments, what every direction counts for at least: few tokens tell little.
_DAMPING = 0.01


def parts_of(encoding: OnGrids, tensor: Tensor, name: str, *, searches: bool) -> Parts:
    """Rounded to nearest, or (`searches`) on the grids of least squared error, for what has no inputs that are known.
    Raises `NumericsError` for entries that no float16 scale reaches."""
    check_finite(tensor, name)
    try:
        if isinstance(encoding, QuantisedBitmask):
            matrix, mask = encoding.entries(tensor)
            return encoding.parts_of(mask, round_kept(matrix, mask, encoding.whole.grid, searches=searches))
        return encoding.parts_of((searched if searches else nearest)(encoding.matrix(tensor), encoding.grid))
    except NumericsError as error:
        raise NumericsError(f"{name}: {error.message}", hint="leave it out with --ignore") from error


@dataclass(frozen=True)
class Known:
    """What was found out by the inputs, by the tensors' names: the `parts` of what is rounded, and what other cores
    `became` beside those that are."""

    parts: dict[str, Parts] = field(default_factory=dict)
    became: dict[str, Tensor] = field(default_factory=dict)


def parts_by_inputs(
    checkpoint: Checkpoint,
    config: QuantizeConfig,
    targets: Sequence[Target],
    device: torch.device,
    *,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> Known:
    """The parts of the tensors of layers: GPTQ (Frantar et al., ICLR 2023), along chains too.

    Blocks are rounded in the order of execution, each from the outputs of those that were rounded before it. What has
    no inputs of its own (a table, an expert) or zeros to keep is not in the answer. Raises `UsageError` where that is
    all there is, `InputError` for text or a model that cannot be used, and `NumericsError` for entries that no scale
    reaches.
    """
    assert config.calibration is not None
    layers = {target.weight.name: target for target in targets if _has_inputs(target)}
    if not layers:
        raise UsageError(
            "--calibrate: nothing that is rounded has inputs to look at (tables, experts and sparse weights have none)",
            hint="leave it out",
        )
    made = Known()

    def rounded(name: str, module: nn.Module, inputs: Inputs) -> None:
        assert inputs.gram is not None
        gram = regularised(inputs.gram, inputs.tokens, least=_DAMPING, name=name)
        try:
            _layer(module, layers[name], gram, made)
        except NumericsError as error:
            raise NumericsError(f"{name}: {error.message}", hint="leave it out with --ignore") from error

    change_by_blocks(
        checkpoint,
        config.calibration,
        config.data,
        config.seed,
        device,
        list(layers),
        rounded,
        keys=[target.weight.key_of(leaf) for target in targets for leaf in target.encodings],
        gram=True,
        progress=progress,
        warn=warn,
    )
    return made


def _has_inputs(target: Target) -> bool:
    weight = target.weight
    if target.is_sparse:
        return False
    is_table = weight.kind == "embedding" or len(weight.members) > 1
    return not is_table and (weight.entry is None or not weight.entry.spec.experts)


@torch.no_grad()
def _layer(module: nn.Module, target: Target, gram: Tensor, known: Known) -> None:
    """Rounds a layer in place, and takes down what it became."""
    weight = target.weight
    if not isinstance(module, MPOModule):
        encoding = target.encodings["weight"]
        assert isinstance(encoding, Quantised)
        parameter = module.get_parameter("weight")
        rounded = round_matrix(encoding.matrix(parameter), gram, encoding.grid)
        parameter.copy_(encoding.tensor(rounded.values()))
        known.parts[f"{weight.name}.weight"] = encoding.parts_of(rounded)
        return
    center = weight.entry.center if weight.entry else None
    cores = MPO(tuple(core.detach() for core in module.cores), weight.shape, center)
    by_core = [target.encodings.get(f"core_{k}") for k in range(len(cores.cores))]
    grids = [one.grid if isinstance(one, Quantised) else None for one in by_core]
    chain = round_chain(cores, gram, grids, moves=not target.is_packed)
    parts = iter(chain.rounded)
    for k, (parameter, core, one) in enumerate(zip(module.cores, chain.mpo.cores, by_core, strict=True)):
        name = f"{weight.name}.core_{k}"
        if isinstance(one, Quantised):
            known.parts[name] = one.parts_of(next(parts))
        elif not torch.equal(core.to(parameter), parameter):
            known.became[name] = core.to(parameter).cpu()
        parameter.copy_(core)
