"""A matrix as a chain of cores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from mpocli.errors import InputError
from mpocli.mpo.chain import split
from mpocli.mpo.contract import to_dense
from mpocli.mpo.shape import SiteShape
from mpocli.mpo.truncation import Truncation


@dataclass(frozen=True, eq=False)
class MPO:
    """A matrix product operator: cores (left bond, out, in, right bond) of an O×I matrix, n ≥ 2 sites.

    `shape` = (O, I) is the matrix without padding. `center` = c says that the cores before c are
    left-canonical and those after c right-canonical, None that nothing is known. Immutable: every operation
    returns a new one.

    >>> mpo = MPO.from_matrix(torch.eye(6), SiteShape((2, 3), (3, 2)))
    >>> mpo.bond_dims, torch.allclose(mpo.to_matrix(), torch.eye(6, dtype=torch.float64))
    ((1, 6, 1), True)
    """

    cores: tuple[Tensor, ...]
    shape: tuple[int, int]
    center: int | None = None

    def __post_init__(self) -> None:
        sites = self.site_shape
        bonds = [tuple(core.shape[::3]) for core in self.cores]
        chained = all(a[1] == b[0] for a, b in pairwise(bonds))
        if bonds[0][0] != 1 or bonds[-1][1] != 1 or not chained:
            raise InputError(f"cores whose bonds do not meet: {bonds}", hint="neighbours share one bond dimension")
        sites.check_fits(self.shape)

    @classmethod
    def from_matrix(
        cls,
        matrix: Tensor,
        sites: SiteShape,
        truncation: Truncation = Truncation(),  # noqa: B008 (frozen)
        *,
        name: str = "matrix",
    ) -> MPO:
        """`decompose` without its error report."""
        cores, _ = split(matrix, sites, truncation, name)
        return cls(cores, (matrix.shape[0], matrix.shape[1]), sites.central)

    @property
    def site_shape(self) -> SiteShape:
        return SiteShape(tuple(c.shape[1] for c in self.cores), tuple(c.shape[2] for c in self.cores))

    @property
    def bond_dims(self) -> tuple[int, ...]:
        """n+1 numbers, ends 1."""
        return (1, *(core.shape[3] for core in self.cores))

    @property
    def central(self) -> int:
        return (len(self.cores) - 1) // 2

    @property
    def num_params(self) -> int:
        return sum(core.numel() for core in self.cores)

    @property
    def ratio(self) -> float:
        """MPO parameters / dense parameters: below 1 is smaller, and at full bond it is always above 1."""
        return self.num_params / (self.shape[0] * self.shape[1])

    def to_matrix(self) -> Tensor:
        """The O×I matrix, padding cropped, in the cores' dtype."""
        return to_dense(self.cores)[: self.shape[0], : self.shape[1]]

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> MPO:
        return replace(self, cores=tuple(core.to(dtype=dtype, device=device) for core in self.cores))
