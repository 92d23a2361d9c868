"""The second fit of a plan: the same shapes, to the inputs that the compressed blocks before make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mpocli.hf.activations import Batch, Inputs
from mpocli.hf.calibration import sequential
from mpocli.hf.weight import Weight
from mpocli.methods.planner.fit_store import ChosenForm, FitStore
from mpocli.mpo.gram import regularised
from mpocli.progress import Progress


def refit(
    model: Any,
    batches: Sequence[Batch],
    fits: FitStore,
    found: dict[str, ChosenForm | str],
    weights: Sequence[Weight],
    progress: Progress | None,
) -> None:
    """Fits the same shapes anew, block by block, to the inputs that the blocks before make once they are compressed.

    `model` is compressed by that, and `found` is given the new forms.
    """
    by_name = {weight.name: weight for weight in weights}
    names = [
        name
        for name, form in found.items()
        if isinstance(form, ChosenForm) and by_name[name].kind != "embedding" and len(by_name[name].members) == 1
    ]
    for name, form in found.items():  # tables first: they stand before all blocks
        if isinstance(form, ChosenForm) and name not in names:
            _put(model.get_submodule(name), form, by_name[name])
    done = 0

    def visit(name: str, module: nn.Module, inputs: Inputs) -> None:
        nonlocal done
        weight, form = by_name[name], found[name]
        assert isinstance(form, ChosenForm) and inputs.gram is not None and weight.key is not None
        norm = fits.norms.of(weight)
        seen = regularised(inputs.gram, inputs.tokens, least=fits.norms.robust, name=name)
        again = fits.refitted(weight, replace(norm, gram=seen), form)
        found[name] = again
        _put(module, again, weight)
        done += 1
        if progress:
            progress(done, len(names), f"fitting again {name}")

    sequential(model, batches, names, visit, gram=True)


def _put(module: nn.Module, form: ChosenForm, weight: Weight) -> None:
    matrix = weight.oriented(form.mpo(weight.shape).to(dtype=torch.float32).to_matrix())
    with torch.no_grad():
        parameter: Any = module.weight
        parameter.copy_(matrix)
