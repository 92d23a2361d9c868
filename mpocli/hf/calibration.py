"""The second moments of the inputs of a model's modules over calibration data, block by block in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mpocli.errors import InputError
from mpocli.hf.activations import Batch, Inputs, Padding, run, watch_inputs
from mpocli.nn.evaluating import evaluating
from mpocli.progress import StepProgress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Visit = Callable[[str, nn.Module, Inputs], None]


def blocks(model: PreTrainedModel, names: Sequence[str], batch: Batch) -> list[list[str]]:
    """The named modules by the transformer block that they are in, all in the order in which `batch` reaches them.

    A block is the element of the outermost `ModuleList` around a module; a module in none is a group of its own. Of a
    block that was reached, modules that were not (an expert without tokens) come last. Raises `InputError` for a
    module that was not reached, nor anything of its block.
    """
    with evaluating(model):
        return [group.names for group in _groups(model, names, batch)]


def sequential(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    names: Sequence[str],
    visit: Visit,
    *,
    gram: bool,
    progress: StepProgress | None = None,
) -> None:
    """Call `visit(name, module, inputs)` for the named modules block by block, in the order of their execution.

    The batches run anew for every block, as far as its end, so that a block's inputs come out of what `visit` made of
    the blocks before it (as in Wanda and SparseGPT) and only one block's sums are held. `visit` may change the weights
    of its module in place. `progress` is told how many blocks are done, and of how many.

    Padding does not count: of an encoder's or a decoder-only model's inputs, tokens with `attention_mask` 0; of a
    decoder's, those with `decoder_attention_mask` 0, or without one those with no label, or without labels none. The
    encoder's output is masked as the encoder is in cross-attention too. Inputs that are not one vector for each of
    the batch's tokens (a pooler's, an expert's) count as they are.

    Evaluation mode without gradients; the modes of all modules are put back and all hooks removed, errors or not.
    Raises `InputError` without batches and for a module that no token reaches, before its block is visited, and
    `NumericsError` for inputs that are not finite.
    """
    if not batches:
        raise InputError("there are no calibration batches", hint="name a file with text")
    with evaluating(model):
        groups = _groups(model, names, batches[0])
        for done, group in enumerate(groups, 1):
            found = _collect(model, batches, group, gram)
            for name in group.names:
                if name not in found or found[name].tokens == 0:
                    raise _not_reached(name, len(batches))
                found[name].check_finite(name)
            for name in group.names:
                visit(name, model.get_submodule(name), found.pop(name))
            if progress is not None:
                progress(done, len(groups))


# --- blocks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Modules whose inputs are collected together; all are in once `last` has been called `calls` times."""

    names: list[str]
    last: nn.Module
    calls: int  # several where a block is repeated (ALBERT), 0 where its parts are called past it


def _groups(model: PreTrainedModel, names: Sequence[str], batch: Batch) -> list[_Group]:
    homes = {name: _block_of(model, name) for name in names}
    calls: Counter[str] = Counter()  # in the order of the first call
    with ExitStack() as hooks:
        for name in {*homes, *homes.values()}:

            def count(module: nn.Module, args: Any, name: str = name) -> None:
                calls[name] += 1

            hooks.callback(model.get_submodule(name).register_forward_pre_hook(count).remove)
        run(model, batch)
    place = {name: position for position, name in enumerate(calls)}
    never = len(place)
    members: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: place.get(name, never)):
        members.setdefault(homes[name], []).append(name)
    first = {home: min(place.get(part, never) for part in (home, *parts)) for home, parts in members.items()}
    for home, parts in members.items():
        if first[home] == never:
            raise _not_reached(parts[0], 1)
    order = sorted(members, key=lambda home: first[home])
    return [_Group(members[home], model.get_submodule(home), calls[home]) for home in order]


def _block_of(model: nn.Module, name: str) -> str:
    """The outermost element of a `ModuleList` in a module's path, the module itself where there is none."""
    parts, parent = name.split("."), model
    for end, part in enumerate(parts, 1):
        child = parent.get_submodule(part)
        # The elements of a list of lists (Funnel) are the inner ones': a list has no forward of its own.
        if isinstance(parent, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            return ".".join(parts[:end])
        parent = child
    return name


def _not_reached(name: str, batches: int) -> InputError:
    return InputError(
        f"module {name}: no token of {batches} calibration {'batch' if batches == 1 else 'batches'} reaches it",
        hint="leave it out with ‹ignore›, or calibrate on more text",
    )


# --- passes -------------------------------------------------------------------------------------------------------


class _Reached(Exception):
    """The last module of a block has been called: the rest of the forward pass is not needed."""


def _collect(model: PreTrainedModel, batches: Sequence[Batch], group: _Group, gram: bool) -> dict[str, Inputs]:
    """The inputs of a group's modules over all batches, without the modules that were not called."""
    found: dict[str, Inputs] = {}
    left = 0

    def finish(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise _Reached

    with ExitStack() as hooks:
        padding = Padding(model, hooks)

        def record(name: str, module: nn.Module, x: Tensor) -> None:
            if name not in found:
                dtype = torch.promote_types(x.dtype, torch.float32)
                found[name] = Inputs(x.shape[-1], gram=gram, dtype=dtype, device=x.device)
            found[name].add(x, padding.keep(module, x))

        watch_inputs(model, group.names, hooks, record)
        hooks.callback(group.last.register_forward_hook(finish).remove)
        for batch in batches:
            left = group.calls
            padding.start(batch)
            with suppress(_Reached):
                run(model, batch)
    return found
