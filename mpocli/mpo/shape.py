"""Site dimensions of a matrix, and the integers that follow from them: bonds, parameters, ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from mpocli.errors import InputError

# The product of given site dimensions may exceed the matrix by this much: more padding than that is
# nearly always a slip of the pen, and it is paid for in parameters.
MAX_PADDING = 1.10


@dataclass(frozen=True)
class SiteShape:
    """How an O×I matrix is split over n sites: row factors `out_dims`, column factors `in_dims`.

    Rows are the output features, as in `nn.Linear.weight` (for an embedding: the vocabulary).
    The products are the padded size, at least O and I.

    >>> SiteShape((3, 4, 4, 4, 4), (4, 4, 4, 4, 3)).full_bond_dims
    (1, 12, 192, 192, 12, 1)
    """

    out_dims: tuple[int, ...]
    in_dims: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.out_dims) != len(self.in_dims):
            raise InputError(
                f"site shape {self}: {len(self.out_dims)} row factors and {len(self.in_dims)} column factors",
                hint="give as many factors for the rows as for the columns",
            )
        if len(self.out_dims) < 2 or min(*self.out_dims, *self.in_dims) < 1:
            raise InputError(
                f"site shape {self}: {len(self.out_dims)} sites, smallest factor "
                f"{min(self.out_dims + self.in_dims, default=0)}",
                hint="give two sites or more and factors of 1 or more",
            )

    def __str__(self) -> str:
        return f"{','.join(map(str, self.out_dims))}x{','.join(map(str, self.in_dims))}"

    @classmethod
    def parse(cls, text: str) -> SiteShape:
        """Read `3,4,4,4,4x4,4,4,4,3` (rows x columns); `InputError` where it cannot be read.

        >>> SiteShape.parse("2,3x4,5").padded_shape
        (6, 20)
        """
        rows, x, columns = text.partition("x")
        try:
            if not x:
                raise ValueError
            factors = tuple(map(int, rows.split(","))), tuple(map(int, columns.split(",")))
        except ValueError:
            raise InputError(
                f"site shape {text!r} cannot be read", hint="write it as 3,4,4,4,4x4,4,4,4,3 (rows x columns)"
            ) from None
        return cls(*factors)

    @property
    def sites(self) -> int:
        return len(self.out_dims)

    @property
    def central(self) -> int:
        """Index of the central core, (n−1)//2 (MPOP, ACL 2021, §3.1: the middle one for odd n)."""
        return (self.sites - 1) // 2

    @property
    def padded_shape(self) -> tuple[int, int]:
        return math.prod(self.out_dims), math.prod(self.in_dims)

    @property
    def site_sizes(self) -> tuple[int, ...]:
        """out_k · in_k for every site."""
        return tuple(map(mul, self.out_dims, self.in_dims))

    @property
    def full_bond_dims(self) -> tuple[int, ...]:
        """d_k = min(Π_{m≤k} o_m i_m, Π_{m>k} o_m i_m), ends 1: n+1 numbers (MPOP, Eq. 2 and appendix)."""
        left = list(accumulate(self.site_sizes, mul, initial=1))
        return tuple(min(product, left[-1] // product) for product in left)

    def capped_bond_dims(self, cap: int | Sequence[int] | None) -> tuple[int, ...]:
        """Full bonds cut to `cap`: one number for all, or n−1 numbers, one for each inner bond."""
        full = self.full_bond_dims
        if cap is None:
            return full
        caps = [cap] * (self.sites - 1) if isinstance(cap, int) else list(cap)
        if len(caps) != self.sites - 1:
            raise InputError(f"{len(caps)} bond dimensions for {self.sites} sites", hint="give one for each inner bond")
        bonds = [1, *map(min, full[1:-1], caps), 1]
        # A given list may ask for more than its neighbours can carry: d_k ≤ d_{k±1} · o i.
        for k, size in enumerate(self.site_sizes):
            bonds[k + 1] = min(bonds[k + 1], bonds[k] * size)
        for k in range(self.sites - 1, 0, -1):
            bonds[k] = min(bonds[k], bonds[k + 1] * self.site_sizes[k])
        return tuple(bonds)

    def num_params(self, bond_dims: Sequence[int] | None = None) -> int:
        """Elements of all cores, Σ_k d_{k−1} o_k i_k d_k; at full bond dimension by default."""
        return sum(self.core_sizes(bond_dims))

    def core_sizes(self, bond_dims: Sequence[int] | None = None) -> tuple[int, ...]:
        bonds = self.full_bond_dims if bond_dims is None else bond_dims
        return tuple(bonds[k] * size * bonds[k + 1] for k, size in enumerate(self.site_sizes))

    def check_fits(self, shape: tuple[int, int], what: str = "matrix") -> None:
        """`InputError` unless the products hold an O×I matrix with at most 10 % of padding each way."""
        for name, product, size in zip(("rows", "columns"), self.padded_shape, shape, strict=True):
            if not size <= product <= MAX_PADDING * size:
                raise InputError(
                    f"{what}: site shape {self} makes {product} {name}, the matrix has {size}",
                    hint=f"choose factors whose product lies between {size} and {int(MAX_PADDING * size)}",
                )
