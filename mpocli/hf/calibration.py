"""The second moments of the inputs of a model's modules over calibration data, block by block in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mpocli.errors import InputError, NumericsError
from mpocli.hf.foreign import foreign
from mpocli.hf.padding import decoder_mask, given_to, padding_id, parameter_names, stack_mask
from mpocli.nn.padding import spread

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = Mapping[str, Tensor]


class Inputs:
    """Sums over the inputs X (tokens × I) of one module: ‖X_j‖² as `squared_norms` (I,), and XᵀX as `gram` (I, I).

    Products are taken in float32, or in the inputs' float64. The norms are summed in float64; the Gram matrix, None
    where it was not asked for, in the dtype of its products, since it is what fills the memory.

    >>> inputs = Inputs(2, gram=True)
    >>> inputs.add(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[True, False]]))
    >>> inputs.tokens, inputs.squared_norms, inputs.gram
    (1, tensor([1., 4.], dtype=torch.float64), tensor([[1., 2.],
            [2., 4.]]))
    """

    def __init__(
        self,
        features: int,
        *,
        gram: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self.tokens = 0
        self.squared_norms = torch.zeros(features, dtype=torch.float64, device=device)
        self.gram = torch.zeros(features, features, dtype=dtype, device=device) if gram else None
        self._dtype = dtype

    def add(self, x: Tensor, keep: Tensor | None = None) -> None:
        """Count the tokens of x (…, I), or of them those where `keep` (…) is True."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if keep is not None:
            rows = rows[keep.reshape(-1)]
        rows = rows.to(self._dtype)
        self.tokens += len(rows)
        self.squared_norms += rows.square().sum(0, dtype=torch.float64)
        if self.gram is not None:
            self.gram.addmm_(rows.T, rows)


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
    progress: Callable[[int, int], None] | None = None,
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
                if not bool(torch.isfinite(found[name].squared_norms).all()):
                    raise NumericsError(
                        f"module {name}: its inputs are not finite", hint="run the model in float32 or bfloat16"
                    )
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
        hint="leave it out with --ignore, or calibrate on more text",
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
        for name in group.names:

            def record(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                x: Tensor = args[0] if args else next(iter(kwargs.values()))
                if name not in found:
                    dtype = torch.promote_types(x.dtype, torch.float32)
                    found[name] = Inputs(x.shape[-1], gram=gram, dtype=dtype, device=x.device)
                found[name].add(x, padding.keep(module, x))

            hooks.callback(model.get_submodule(name).register_forward_pre_hook(record, with_kwargs=True).remove)
        hooks.callback(group.last.register_forward_hook(finish).remove)
        for batch in batches:
            left = group.calls
            padding.start(batch)
            with suppress(_Reached):
                run(model, batch)
    return found


class Padding:
    """Which vectors of a module's input stand for tokens of the text."""

    def __init__(self, model: PreTrainedModel, hooks: ExitStack) -> None:
        self._given: Batch = {}
        self._pad = padding_id(model)
        self._in_encoder = True  # always, of a model that has one side
        self._encoded: Tensor | None = None
        self._mask: Tensor | None = None
        self._decoder_mask: Tensor | None = None
        self._two_sided = bool(model.config.is_encoder_decoder)
        if self._two_sided:
            encoder: Any = model.get_encoder()
            decoder: Any = model.get_decoder()
            hooks.callback(encoder.register_forward_pre_hook(self._enter).remove)
            hooks.callback(encoder.register_forward_hook(self._remember).remove)
            self._names = parameter_names(decoder)
            hooks.callback(decoder.register_forward_pre_hook(self._decode, with_kwargs=True).remove)

    def start(self, batch: Batch) -> None:
        """Take the masks of the batch that runs next."""
        self._encoded = None
        self._in_encoder = not self._two_sided
        self._given = batch
        self._mask = batch.get("attention_mask")
        self._decoder_mask = decoder_mask(batch, self._pad) if self._two_sided else None

    def keep(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """True for the vectors that count, shaped as one per vector of x; None if all do."""
        mask = self._mask if self._in_encoder or self._is_encoded(x) else self._decoder_mask
        if mask is None or mask.dim() != 2:
            return None
        leading = x.shape if isinstance(module, nn.Embedding) else x.shape[:-1]
        found = spread(mask, leading)
        return None if found is None else found.to(x.device)

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._in_encoder = True

    def _remember(self, module: nn.Module, args: Any, output: Any) -> None:
        self._in_encoder, self._encoded = False, output[0]

    def _decode(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        found = stack_mask(given_to(self._names, args, kwargs), self._given, self._pad, decoder=True)
        self._decoder_mask = self._decoder_mask if found is None else found

    def _is_encoded(self, x: Tensor) -> bool:
        """Whether x is the encoder's output itself, as cross-attention's keys and values are made of."""
        encoded = self._encoded
        return encoded is not None and x.shape == encoded.shape and x.data_ptr() == encoded.data_ptr()


def run(model: PreTrainedModel, batch: Batch) -> Any:
    """The model's outputs for a batch from any device; `InputError` where its own code fails at that."""
    moved = {key: value.to(model.device) for key, value in batch.items()}
    with foreign(f"a {type(model).__name__} cannot be run on text", hint="choose what needs no calibration data"):
        return model(**moved)


@contextmanager
def evaluating(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """Evaluation mode without gradients, or with those of activations alone; every setting comes back."""
    modes = {module: module.training for module in model.modules()}
    learnt = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval()
        if gradients:
            model.requires_grad_(False)
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, setting in learnt.items():
            parameter.requires_grad_(setting)
