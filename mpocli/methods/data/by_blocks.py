"""A model changed layer by layer, block after block, each from the inputs that the changed ones before it make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from mpocli.config.calibration import Calibration
from mpocli.config.data import DataOptions
from mpocli.hf.activations import Inputs
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.calibration import Visit, sequential
from mpocli.hf.loading import load_as_saved
from mpocli.methods.data.calibration import calibration_batches, fed
from mpocli.mpo.linalg import check_finite
from mpocli.progress import Progress


def change_by_blocks(
    checkpoint: Checkpoint,
    calibration: Calibration,
    data: DataOptions | None,
    seed: int,
    device: torch.device,
    layers: Sequence[str],
    change: Visit,
    *,
    keys: Iterable[str],
    gram: bool,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> None:
    """Call `change(name, module, inputs)` for the named layers of the loaded model, in the order of execution.

    `keys` are the tensors in the files that must be finite: a broken weight is told as such, and not by what it makes
    of activations. `warn` is told where a layer has more inputs than there are tokens, of the largest such. Raises
    what `calibration_batches` and `sequential` raise.
    """
    batches = calibration_batches(checkpoint, calibration, data, seed, warn=warn)
    for key in keys:
        check_finite(checkpoint.reader.read(key), key)
    model = load_as_saved(checkpoint).to(device)
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in fed(batches, model)]
    few: tuple[int, str] | None = None
    done = 0

    def visit(name: str, module: nn.Module, inputs: Inputs) -> None:
        nonlocal few, done
        size = len(inputs.squared_norms)
        if inputs.tokens < size and (few is None or size > few[0]):
            few = size, f"{name}: {inputs.tokens} calibration tokens for {size} inputs"
        change(name, module, inputs)
        done += 1
        if progress:
            progress(done, len(layers), name)

    sequential(model, batches, layers, visit, gram=gram)
    if few is not None:
        warn(f"{few[1]}: raise --samples or --seq-len")
