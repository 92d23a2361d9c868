"""One-shot pruning that looks at activations: Wanda and SparseGPT, block by block through a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mpocli.config.sparsify import SparsifyConfig
from mpocli.hf.activations import Inputs
from mpocli.hf.artifact import Checkpoint
from mpocli.methods.data.by_blocks import change_by_blocks
from mpocli.methods.sparsify.plan import Target
from mpocli.nn import MPOModule
from mpocli.progress import Progress
from mpocli.sparse import rowwise_mask
from mpocli.sparse.one_shot import core_gram, sparsegpt, wanda_scores


def prune_by_activations(
    checkpoint: Checkpoint,
    config: SparsifyConfig,
    targets: Sequence[Target],
    device: torch.device,
    *,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> dict[str, Tensor]:
    """The pruned tensors by name, as their modules store them, in float32.

    Blocks are pruned in the order of execution, each from the outputs of those that were pruned before it. Raises
    `InputError` for text or a model that cannot be used.
    """
    assert config.calibration is not None
    by_module = {target.module: target for target in targets}
    pruned: dict[str, Tensor] = {}

    def prune(name: str, module: nn.Module, inputs: Inputs) -> None:
        target = by_module[name]
        parameter = getattr(module, target.leaf)
        gram, norms = inputs.gram, inputs.squared_norms
        if isinstance(module, MPOModule):
            assert gram is not None
            right = [core.detach() for core in module.cores[module.central + 1 :]]
            gram = core_gram(right, gram, module.sites.in_dims, module.central)
            norms = gram.diagonal()
        matrix = target.matrix(parameter.detach())
        with torch.no_grad():
            made = target.stored(_pruned(matrix, norms, gram, config))
            parameter.copy_(made)
        pruned[target.name] = made.cpu()

    change_by_blocks(
        checkpoint,
        config.calibration,
        config.data,
        config.optimisation.seed,
        device,
        list(by_module),
        prune,
        keys=[target.key for target in targets],
        gram=config.method == "sparsegpt" or any(target.layout == "core" for target in targets),
        progress=progress,
        warn=warn,
    )
    return pruned


def _pruned(matrix: Tensor, norms: Tensor, gram: Tensor | None, config: SparsifyConfig) -> Tensor:
    if config.method == "sparsegpt":
        assert gram is not None
        return sparsegpt(matrix, gram, config.sparsity, config.pattern)
    scores = wanda_scores(matrix, norms)
    in_rows = config.pattern.group is None
    mask = rowwise_mask(scores, config.sparsity) if in_rows else config.pattern.mask(scores, 0)
    return torch.where(mask, matrix, matrix.new_zeros(()))
