"""The one tensor in the files that is no weight: a name that gives advice, a value that seals what config.json says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from mpocli.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# transformers lists the tensors that a model does not expect right above the error that the tombstones cause,
# so that the name of this one is read by whoever forgot the import.
SIGNPOST = "an_mpo_checkpoint.import_mpocli_before_from_pretrained"
# What of a `quantization_config` says how the files are to be computed with.
_SEALED = ("schema_version", "modules", "encodings", "routing")


def seal_of(quantization: Mapping[str, Any]) -> int:
    """A number of 63 bits that changes with anything that a `quantization_config` says of how to compute.

    Shapes could be told from the files again, but neither routing nor an embedding's scale; sealed, none of them can
    be another than the one that the weights were written with.

    >>> seal_of({"modules": {}}) == seal_of({"modules": {}, "routing": {}}) != seal_of({"modules": {"a": {}}})
    True
    """
    said = {name: quantization[name] for name in _SEALED if quantization.get(name)}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class Adds(Protocol):
    def add(self, name: str, tensor: Tensor) -> None: ...


def add_signpost(sink: Adds, quantization: Mapping[str, Any]) -> None:
    """Write it to the files that `quantization` will describe."""
    sink.add(SIGNPOST, signpost(quantization))


def signpost(quantization: Mapping[str, Any]) -> torch.Tensor:
    import torch

    return torch.tensor([seal_of(quantization)])


def check_seal(where: str, quantization: Mapping[str, Any], stored: int | None) -> None:
    """`InputError` where config.json says something else than what the files (`stored`, None without a seal) were
    written with."""
    if stored is not None and stored != seal_of(quantization):
        raise InputError(
            f"{where}: config.json's quantization_config is not the one that the weights were written with "
            f"(its seal is {seal_of(quantization):016x}, the files have {stored:016x})",
            hint="restore config.json from the directory that was written, or write it again with save_pretrained",
        )
