"""Which modules multiply with a weight matrix in a way that cores can take over, told from their classes."""

from __future__ import annotations

import functools
import inspect
import re
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


FUSED = "fused expert weights (one 3-way tensor) are not decomposed"


def kind_of(module: nn.Module, leaf: str) -> tuple[str, str]:
    """(kind, obstacle) of the module that owns a parameter; neither for parameters that are no matrix of ours."""
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
    from transformers.pytorch_utils import Conv1D

    name = type(module).__name__
    own_forward = f"its class {name} has a forward pass of its own"
    if leaf == "weight":
        if isinstance(module, Conv1D):
            return "conv1d", ""
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return "linear", "torch's attention reads its weight directly"
        if isinstance(module, nn.Linear):
            plain = type(module).forward is nn.Linear.forward or name in _PLAIN_LINEARS
            return "linear", "" if plain else own_forward
        if isinstance(module, nn.Embedding):
            plain = type(module).forward is nn.Embedding.forward or _is_scaled(module)
            return "embedding", "" if plain else own_forward
    parameter = getattr(module, leaf)
    if isinstance(module, nn.MultiheadAttention) and parameter.dim() == 2:
        return "", "torch's attention reads its weight directly"
    if parameter.dim() == 3 and "expert" in name.lower():
        return "", FUSED
    return "", ""


# A forward pass of their own that computes x Wᵀ + b all the same.
_PLAIN_LINEARS = {"FalconLinear"}


def _is_scaled(module: nn.Module) -> bool:
    """BART's and Gemma's embeddings, which multiply their rows by a number (that may be 1)."""
    return hasattr(module, "embed_scale") or hasattr(module, "scalar_embed_scale")


def direct_readers(model: PreTrainedModel, token_tables: set[str]) -> dict[str, str]:
    """Modules whose `.weight` some forward pass reads as a matrix, past the module's own: name → obstacle.

    Told from the source (MobileBERT's and DeBERTa's masked-LM heads do this). Reading its dtype or device is
    no obstacle, since the tombstone has both.
    """
    classes: set[Any] = {type(module) for module in model.modules()}
    sources = {cls: _forward_source(cls) for cls in classes}
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(getattr(module, "weight", None), Tensor) and kind_of(module, "weight")[0]:
            parent, _, leaf = name.rpartition(".")
            owner = type(model.get_submodule(parent))
            suspects = sources if name in token_tables else {owner: sources[owner]}
            prefix = r"\b" if name in token_tables else r"\bself\."
            reading = rf"{prefix}{re.escape(leaf)}\.weight\b(?!\.(dtype|device))"
            pattern = r"(?<!isinstance\()(?<!isinstance\(self\.)" + reading
            for cls, source in suspects.items():
                if re.search(pattern, source):
                    found[name] = f"{cls.__name__} reads its weight directly"
    return found


@functools.cache
def _forward_source(cls: Any) -> str:
    try:
        return inspect.getsource(cls.forward) if cls.__module__.startswith("transformers") else ""
    except (OSError, TypeError):
        return ""


def token_tables_of(model: PreTrainedModel) -> set[str]:
    """Names of the token embedding tables, the decoder's own included."""
    tables = set()
    modules = dict(model.named_modules(remove_duplicate=False))
    owners: list[Any] = [m for m in modules.values() if hasattr(m, "get_input_embeddings")]
    found = []
    for owner in owners:
        try:
            found.append(owner.get_input_embeddings())
        except (NotImplementedError, AttributeError):
            continue
    for name, module in modules.items():
        if isinstance(module, nn.Embedding) and any(module is table for table in found):
            tables.add(name)
    return tables
