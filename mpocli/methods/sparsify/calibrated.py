"""One-shot pruning that looks at activations: Wanda and SparseGPT, block by block through a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mpocli.config.sparsify import SparsifyConfig
from mpocli.hf.activations import Inputs
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.calibration import sequential
from mpocli.hf.loading import load_as_saved
from mpocli.methods.data.calibration import calibration_batches, fed
from mpocli.methods.sparsify.plan import Target
from mpocli.mpo.linalg import check_finite
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
    batches = calibration_batches(checkpoint, config.calibration, config.data, config.optimisation.seed, warn=warn)
    for target in targets:  # a broken weight is told as such, and not by what it makes of activations
        check_finite(checkpoint.reader.read(target.key), target.key)
    model = load_as_saved(checkpoint).to(device)
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in fed(batches, model)]
    by_module = {target.module: target for target in targets}
    pruned: dict[str, Tensor] = {}
    short: tuple[int, str] | None = None

    def visit(name: str, module: nn.Module, inputs: Inputs) -> None:
        nonlocal short
        target = by_module[name]
        parameter = getattr(module, target.leaf)
        gram, norms = inputs.gram, inputs.squared_norms
        if isinstance(module, MPOModule):
            assert gram is not None
            right = [core.detach() for core in module.cores[module.central + 1 :]]
            gram = core_gram(right, gram, module.sites.in_dims, module.central)
            norms = gram.diagonal()
        inputs_of = len(inputs.squared_norms)
        if inputs.tokens < inputs_of and (short is None or inputs_of > short[0]):
            short = inputs_of, f"{name}: {inputs.tokens} calibration tokens for {inputs_of} inputs"
        matrix = target.matrix(parameter.detach())
        with torch.no_grad():
            made = target.stored(_pruned(matrix, norms, gram, config))
            parameter.copy_(made)
        pruned[target.name] = made.cpu()
        if progress:
            progress(len(pruned), len(targets), target.name)

    gram = config.method == "sparsegpt" or any(target.layout == "core" for target in targets)
    sequential(model, batches, list(by_module), visit, gram=gram)
    if short is not None:
        warn(f"{short[1]}: raise --samples or --seq-len")
    return pruned


def _pruned(matrix: Tensor, norms: Tensor, gram: Tensor | None, config: SparsifyConfig) -> Tensor:
    if config.method == "sparsegpt":
        assert gram is not None
        return sparsegpt(matrix, gram, config.sparsity, config.pattern)
    scores = wanda_scores(matrix, norms)
    in_rows = config.pattern.group is None
    mask = rowwise_mask(scores, config.sparsity) if in_rows else config.pattern.mask(scores, 0)
    return torch.where(mask, matrix, matrix.new_zeros(()))
