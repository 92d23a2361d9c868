"""What goes into a model's modules while a batch runs through it: seen by hooks, without padding, and summed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mpocli.errors import NumericsError
from mpocli.hf.foreign import foreign
from mpocli.hf.padding import decoder_mask, given_to, padding_id, parameter_names, stack_mask
from mpocli.nn.padding import spread

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = Mapping[str, Tensor]


def run(model: PreTrainedModel, batch: Batch) -> Any:
    """The model's outputs for a batch from any device; `InputError` where its own code fails at that."""
    moved = {key: value.to(model.device) for key, value in batch.items()}
    with foreign(f"a {type(model).__name__} cannot be run on text", hint="choose what needs no calibration data"):
        return model(**moved)


def watch_inputs(
    model: nn.Module, names: Iterable[str], hooks: ExitStack, see: Callable[[str, nn.Module, Tensor], None]
) -> None:
    """Call `see(name, module, x)` whenever one of the named modules is called on x, until `hooks` are closed."""
    for name in names:

        def enter(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            see(name, module, args[0] if args else next(iter(kwargs.values())))

        hooks.callback(model.get_submodule(name).register_forward_pre_hook(enter, with_kwargs=True).remove)


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

    def check_finite(self, name: str) -> None:
        """`NumericsError` for sums over the inputs of module `name` that are not finite."""
        sums = [self.squared_norms, *([] if self.gram is None else [self.gram.diagonal()])]
        if not all(bool(torch.isfinite(total).all()) for total in sums):
            raise NumericsError(
                f"module {name}: its inputs are not finite", hint="run the model in float32 or bfloat16"
            )


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
