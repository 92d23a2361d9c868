"""Choose the site dimensions of a matrix of any size: the papers' where they exist, else the best balanced ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations

from mpocli.errors import InputError
from mpocli.mpo.shape import MAX_PADDING, SiteShape
from mpocli.mpo.tables import published_shape

# (largest over smallest factor, padding allowed for it): the most even factorings first, loosened together
# with the padding, since uneven factors cost little and padding is paid for in full.
_BALANCE_STEPS = ((2.0, 1.01), (3.0, 1.02), (4.0, 1.05), (6.0, MAX_PADDING), (float("inf"), MAX_PADDING))
# Padded sizes to consider at each step; later ones are larger and only rarely better.
_PADDED_CANDIDATES = 3


@lru_cache(maxsize=1024)
def site_shape(rows: int, columns: int, sites: int) -> SiteShape:
    """Site shape of a rows×columns matrix on `sites` sites.

    The papers' table first. For every other size (primes and vocabularies too): among the balanced
    factorings of both dimensions, padded by at most 10 % where a dimension does not factor evenly, the
    pairing and order with the fewest full-bond parameters. It matters: the even factors 2,3,4,4,4 of
    384×384 make an MPO of 1.13 or of 1.46 times the matrix, by their order alone.

    >>> shape = site_shape(384, 384, 5)
    >>> round(shape.num_params() / 384**2, 2)
    1.13
    """
    if sites < 2 or rows < 1 or columns < 1:
        raise InputError(f"a {rows}x{columns} matrix on {sites} sites", hint="use two sites or more")
    published = published_shape(rows, columns, sites)
    if published is not None:
        return published
    of_sizes: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # parameters depend on nothing else
    for out_factors in _even_factorings(rows, sites):
        for in_factors in _even_factorings(columns, sites):
            for pairs in _pairings(out_factors, in_factors):
                of_sizes.setdefault(tuple(sorted(o * i for o, i in pairs)), pairs)
    # A dimension always has the factoring (size, 1, 1, ...), so that there is one.
    return min((_best_order(pairs) for pairs in of_sizes.values()), key=SiteShape.num_params)


def _even_factorings(size: int, sites: int) -> list[tuple[int, ...]]:
    """Factorings of `size`, else of the next sizes up to 10 % larger, whose factors differ least.

    Sites of 1 carry nothing, so as few as the size allows.
    """
    for ones in range(sites):
        for balance, padding in _BALANCE_STEPS:
            found = _most_even(size, sites - ones, balance)
            padded_sizes = range(size + 1, int(padding * size) + 1) if not found else ()
            candidates = 0
            for padded in padded_sizes:
                more = _most_even(padded, sites - ones, balance)
                found += more
                candidates += bool(more)
                if candidates == _PADDED_CANDIDATES:
                    break
            if found:
                return [(1,) * ones + factors for factors in found]
    return [(1,) * sites]


def _most_even(size: int, parts: int, balance: float) -> list[tuple[int, ...]]:
    """The factorings of `size` with the smallest largest/smallest, if that is at most `balance`."""
    found = list(_factorings(size, parts, balance))
    best = min((factors[-1] / factors[0] for factors in found), default=0.0)
    return [factors for factors in found if factors[-1] / factors[0] == best]


def _factorings(
    size: int, parts: int, balance: float, least: int = 2, first: int | None = None
) -> Iterator[tuple[int, ...]]:
    """Non-decreasing factorings of `size` into `parts` factors ≥ 2 with largest/smallest ≤ balance."""
    if parts == 1:
        if size >= least and (first is None or size <= balance * first):
            yield (size,)
        return
    factor = least
    while factor**parts <= size:
        if size % factor == 0:
            smallest = factor if first is None else first
            # The geometric mean of what is left is a lower bound of the largest factor.
            if (size / factor) ** (1 / (parts - 1)) <= balance * smallest + 1e-9:
                for rest in _factorings(size // factor, parts - 1, balance, factor, smallest):
                    yield (factor, *rest)
        factor += 1


def _pairings(out_factors: tuple[int, ...], in_factors: tuple[int, ...]) -> Iterator[list[tuple[int, int]]]:
    """Every way to pair row factors with column factors, once."""
    left = Counter(in_factors)

    def extend(k: int, pairs: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        if k == len(out_factors):
            yield list(pairs)
            return
        repeated = k > 0 and out_factors[k] == out_factors[k - 1]
        for factor in sorted(left):
            # Equal row factors take their partners in ascending order, so that no pairing comes twice.
            if not left[factor] or (repeated and factor < pairs[-1][1]):
                continue
            left[factor] -= 1
            yield from extend(k + 1, [*pairs, (out_factors[k], factor)])
            left[factor] += 1

    yield from extend(0, [])


def _best_order(pairs: list[tuple[int, int]]) -> SiteShape:
    """The order of the sites with the fewest full-bond parameters, central site (n−1)//2.

    At full bond dimension a core left of the centre holds (Π_{m≤k} s_m)² elements and one on the right
    likewise, so that on each side the sizes must grow towards the centre; what is left to choose is the
    central pair and who stands left.
    """
    n, left_count = len(pairs), (len(pairs) - 1) // 2
    ranked = sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair))
    orders: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # by the sizes of their sites, on which all depends
    for centre in range(n):
        others = ranked[:centre] + ranked[centre + 1 :]
        sizes = [o * i for o, i in others]
        chosen_by_sizes: dict[tuple[int, ...], tuple[int, ...]] = {}
        for chosen in combinations(range(n - 1), left_count):
            chosen_by_sizes.setdefault(tuple([sizes[k] for k in chosen]), chosen)
        for chosen in chosen_by_sizes.values():
            right = [others[k] for k in range(n - 2, -1, -1) if k not in chosen]
            order = [*(others[k] for k in chosen), ranked[centre], *right]
            orders.setdefault(tuple([o * i for o, i in order]), order)
    order = orders[min(orders, key=_full_params)]
    return SiteShape(tuple(o for o, _ in order), tuple(i for _, i in order))


def _full_params(sizes: tuple[int, ...]) -> int:
    """Parameters at full bond dimension of sites of s_k = o_k i_k in this order: Σ d_{k−1} s_k d_k, the bond d_k the
    smaller of the products left and right of it.

    >>> _full_params((2, 6, 2))
    32
    """
    total, left, right, bond = 0, 1, math.prod(sizes), 1
    for size in sizes:
        left *= size
        right //= size
        before, bond = bond, min(left, right)
        total += before * size * bond
    return total
