"""How a weight may be stored: as the matrix or as two factors, each of them wide or on a grid of few bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mpocli.hf.weight import Weight
from mpocli.io.checkpoint import DTYPE_NAMES, DTYPES
from mpocli.io.encodings.corrected import Corrected
from mpocli.io.encodings.quantised import Quantised
from mpocli.io.module_entry import ModuleEntry
from mpocli.io.mpo_spec import MPOSpec
from mpocli.methods.rewrite import Stored
from mpocli.methods.site_choice import spec_of
from mpocli.mpo import SiteShape
from mpocli.mpo.linalg import dtype_name
from mpocli.quant.grid import Grid


@dataclass(frozen=True)
class Format:
    """A weight's site shape and bonds (None: the matrix itself), and the grid of the matrix or of every core (None:
    wide). A `correction` is the rank of what is stored beside a rounded matrix, 0 for nothing."""

    name: str
    grids: tuple[Grid | None, ...]
    sites: SiteShape | None = None
    bonds: tuple[int, ...] | None = None
    correction: int = 0

    def spec(self, weight: Weight) -> MPOSpec | None:
        """What the module of the cores is built from, None for a matrix."""
        if self.sites is None or self.bonds is None:
            return None
        return spec_of(weight, self.sites, self.bonds)

    def shapes(self, weight: Weight) -> dict[str, tuple[int, ...]]:
        """The tensors by their names below the module, as they are stored."""
        spec = self.spec(weight)
        if spec is not None:
            return spec.core_shapes()
        return {"weight": weight.shape[::-1] if weight.kind == "conv1d" else weight.shape}

    def encodings(self, weight: Weight, dtype: torch.dtype) -> dict[str, Quantised | Corrected]:
        """Of the tensors that are on a grid."""
        kind: Any = partial(Corrected, rank=self.correction) if self.correction else Quantised
        return {
            leaf: kind(
                shape,
                bits=grid.bits,
                group=grid.group,
                offsets=grid.offsets,
                transposed=leaf == "weight" and weight.kind == "conv1d",
                dtype=DTYPE_NAMES[dtype],
            )
            for (leaf, shape), grid in zip(self.shapes(weight).items(), self.grids, strict=True)
            if grid is not None
        }

    def nbytes(self, weight: Weight, dtype: torch.dtype) -> int:
        """Of the tensors' data in the files."""
        encodings = self.encodings(weight, dtype)
        return sum(
            encodings[leaf].nbytes(0, 0) if leaf in encodings else torch.Size(shape).numel() * dtype.itemsize
            for leaf, shape in self.shapes(weight).items()
        )

    def params(self, weight: Weight) -> int:
        """Elements of the tensors."""
        return sum(torch.Size(shape).numel() for shape in self.shapes(weight).values())

    def outline(self, weight: Weight, dtype: torch.dtype) -> Stored:
        """What the files hold of it, without values: for a dry run."""
        encodings = self.encodings(weight, dtype)
        tensors = {leaf: torch.empty(shape, dtype=dtype, device="meta") for leaf, shape in self.shapes(weight).items()}
        packed = {leaf: _outline(encoding) for leaf, encoding in encodings.items()}
        return Stored(tensors, self.entry(weight, dtype), dict(encodings), packed)

    def entry(self, weight: Weight, dtype: torch.dtype, relative_error: float | None = None) -> ModuleEntry | None:
        """The manifest's entry of the cores."""
        spec = self.spec(weight)
        if spec is None:
            return None
        return ModuleEntry(weight.name, weight.role, spec, dtype_name(dtype), relative_error=relative_error)


def _outline(encoding: Quantised | Corrected) -> tuple[Tensor, ...]:
    return tuple(torch.empty(shape, dtype=DTYPES[dtype], device="meta") for shape, dtype in encoding.part_shapes())
