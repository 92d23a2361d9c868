"""The site shapes that a matrix may take, and the bonds of a shape that fill a given size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from mpocli.errors import UsageError
from mpocli.mpo.factorize import site_shape
from mpocli.mpo.shape import SiteShape
from mpocli.mpo.weighted import svd_shape


@dataclass(frozen=True)
class Candidate:
    """A site shape under the name that tables call it by: svd, balanced, unbalanced, or n sites."""

    name: str
    sites: SiteShape


def svd(rows: int, columns: int) -> Candidate:
    """The truncated SVD, bond r: r (O+I) parameters, and as many multiplications for a vector."""
    return Candidate("svd", svd_shape(rows, columns))


def papers(rows: int, columns: int, sites: int = 5) -> Candidate:
    """The published shape of n sites, or the balanced one of a size that was not published."""
    return Candidate(f"{sites} sites", site_shape(rows, columns, sites))


def all_of(rows: int, columns: int) -> tuple[Candidate, ...]:
    """SVD, two sites balanced and unbalanced, and 3, 5 and 7 sites: each shape once.

    >>> [candidate.name for candidate in all_of(768, 3072)]
    ['svd', 'balanced', 'unbalanced', '3 sites', '5 sites', '7 sites']
    """
    found = [svd(rows, columns), Candidate("balanced", site_shape(rows, columns, 2))]
    between = unbalanced(rows, columns)
    found += [between] if between else []
    found += [papers(rows, columns, sites) for sites in (3, 5, 7)]
    once: dict[SiteShape, Candidate] = {}
    for candidate in found:
        once.setdefault(candidate.sites, candidate)
    return tuple(once.values())


def unbalanced(rows: int, columns: int) -> Candidate | None:
    """Two sites half-way between the SVD and the balanced shape: (O/b, b)x(c, I/c), b ≈ O^{1/4}, c ≈ I^{1/4}.

    None where a dimension has no such divisor.

    >>> unbalanced(256, 256)
    Candidate(name='unbalanced', sites=SiteShape(out_dims=(64, 4), in_dims=(4, 64)))
    """
    b, c = (_divisor_near(size, size**0.25) for size in (rows, columns))
    if b == 1 or c == 1:
        return None
    return Candidate("unbalanced", SiteShape((rows // b, b), (c, columns // c)))


def _divisor_near(size: int, wanted: float) -> int:
    """The divisor that differs least from `wanted` as a factor, at most its square."""
    divisors = (k for k in range(1, int(wanted**2) + 1) if size % k == 0)
    return min(divisors, key=lambda k: max(k / wanted, wanted / k))


def bonds_within(sites: SiteShape, params: int) -> tuple[int, ...]:
    """The widest bonds (n+1 numbers) with at most so many parameters: one cap for all, then bond by bond.

    Raises `UsageError` where even bonds of 1 take more.

    >>> bonds_within(SiteShape((8, 1), (1, 8)), 50), bonds_within(SiteShape((2, 2, 2), (2, 2, 2)), 50)
    ((1, 3, 1), (1, 3, 2, 1))
    """
    inner = sites.sites - 1
    if sites.num_params(_bonds(sites, [1] * inner)) > params:
        least = sites.num_params(_bonds(sites, [1] * inner))
        raise UsageError(f"site shape {sites} takes {least:,} parameters at least, {params:,} are left for it")

    def widest(place: Callable[[int], list[int]], low: int, high: int) -> int:
        """The largest cap in low … high that still fits where `place` puts it, given that `low` does."""
        return _largest(low, high, lambda cap: sites.num_params(_bonds(sites, place(cap))) <= params)

    caps = [widest(lambda cap: [cap] * inner, 1, max(sites.full_bond_dims))] * inner
    for k in range(inner):
        place = partial(_between, caps[:k], caps[k + 1 :])
        caps[k] = widest(place, caps[k], sites.full_bond_dims[k + 1])
    return _bonds(sites, caps)


def _between(before: list[int], after: list[int], cap: int) -> list[int]:
    return [*before, cap, *after]


def _bonds(sites: SiteShape, caps: Sequence[int]) -> tuple[int, ...]:
    return sites.capped_bond_dims(caps)


def _largest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The largest number in low … high for which a monotone condition holds, given that it does for `low`."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
