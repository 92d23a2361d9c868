"""How a loaded model is to be stored: what plain `save_pretrained` packs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpocli.hf.plugin import MPOConfig, MPOQuantizer
from mpocli.hf.sparse import sparse_parameters
from mpocli.io.encodings.known import Encodings
from mpocli.nn.held_zeros import release_zeros_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def set_encodings(model: PreTrainedModel, encodings: Encodings) -> None:
    """Say how a loaded model's tensors are to be stored: plain `save_pretrained` then packs them."""
    config: Any = getattr(model.config, "quantization_config", None)
    if not isinstance(config, MPOConfig):
        config = MPOConfig()
    config.encodings = {name: encoding.to_dict() for name, encoding in sorted(encodings.items())}
    anything: Any = model
    if config.modules or config.encodings:
        model.config.quantization_config = config
        anything.hf_quantizer = MPOQuantizer(config)
        anything.is_quantized = True
        anything.quantization_method = config.quant_method
    elif getattr(anything, "hf_quantizer", None) is not None:
        del model.config.quantization_config
        anything.hf_quantizer, anything.is_quantized = None, False


def release_zeros(model: PreTrainedModel) -> None:
    """Let training fill the zeros of a sparse model, which is then saved as an ordinary one.

    >>> model = AutoModel.from_pretrained("bert-50")  # doctest: +SKIP
    >>> mpocli.release_zeros(model)  # doctest: +SKIP
    """
    for parameter in sparse_parameters(model).values():
        release_zeros_of(parameter)
    set_encodings(model, {})
