"""Read safetensors checkpoints tensor by tensor, whole or sharded, without mapping them into memory."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mpocli.errors import InputError
from mpocli.io.digest import files_sha256
from mpocli.io.dtypes import STORED_DTYPES
from mpocli.io.encodings.known import Encodings
from mpocli.io.stored import StoredTensors

DTYPES: dict[str, torch.dtype] = {code: getattr(torch, dtype.name) for code, dtype in STORED_DTYPES.items()}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_wanted(own: torch.dtype, wanted: str | None) -> torch.dtype:
    """What a tensor is stored in, where all floating-point ones are to be in `wanted`."""
    made: torch.dtype = getattr(torch, wanted) if wanted and own.is_floating_point else own
    return made


class CheckpointReader(StoredTensors[torch.dtype]):
    """The tensors of a model directory, and their data on `read`."""

    def __init__(self, directory: Path, encodings: Encodings | None = None) -> None:
        super().__init__(directory, encodings, DTYPES, framework="pt")

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own; an encoded one as the dense tensor, bit for bit."""
        try:
            return self.encoding(name).unpack(*self.read_parts(name))
        except InputError as error:
            raise InputError(
                f"{self.directory}: tensor {name}: {error.message}", hint="download or write the file again"
            ) from error

    def read_parts(self, name: str) -> tuple[Tensor, ...]:
        """What the files hold for a tensor: itself, or the parts of an encoded one, in their order."""
        return tuple(self._stored(part.name) for part in self.parts(name))

    @property
    def main_dtype(self) -> torch.dtype:
        """That of most elements."""
        sizes: Counter[torch.dtype] = Counter()
        for spec in self.specs.values():
            sizes[spec.dtype] += spec.numel
        return max(sizes, key=lambda dtype: (sizes[dtype], str(dtype)))

    @cached_property
    def sha256(self) -> str:
        """One digest over the weight files."""
        return files_sha256(self.files)
