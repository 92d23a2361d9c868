"""The site shapes that the MPO papers and their released code use, by matrix size and number of sites.

Sources: MPOP (ACL 2021) code and appendix, MPOE (COLING 2022) code, MPOBERT's shape configuration.
"""

from __future__ import annotations

from mpocli.mpo.shape import SiteShape

_768 = (3, 4, 4, 4, 4)
_768_REVERSED = (4, 4, 4, 4, 3)
_1024 = (4, 4, 4, 4, 4)
_3072 = (4, 4, 8, 6, 4)
_4096 = (4, 4, 8, 8, 4)

# Five sites, the papers' choice: factors of the rows and of the columns belong together.
_FIVE_SITES: dict[tuple[int, int], tuple[tuple[int, ...], tuple[int, ...]]] = {
    (768, 768): (_768, _768_REVERSED),
    (3072, 768): (_3072, _768),
    (768, 3072): (_768, _3072),
    (1024, 1024): (_1024, _1024),
    (4096, 1024): (_4096, _1024),
    (1024, 4096): (_1024, _4096),
    (30000, 128): ((5, 10, 10, 10, 6), (2, 2, 4, 4, 2)),
    (30522, 768): ((6, 8, 10, 8, 8), _768_REVERSED),
    (30720, 768): ((6, 8, 10, 8, 8), _768_REVERSED),
    (32128, 768): ((8, 8, 8, 8, 8), _768),
    (32128, 1024): ((8, 8, 8, 8, 8), _1024),
    (50257, 768): ((5, 10, 14, 12, 6), _768_REVERSED),
}

# Other numbers of sites are given by width alone.
_BY_WIDTH: dict[int, dict[int, tuple[int, ...]]] = {
    3: {768: (8, 12, 8), 3072: (12, 16, 16), 1024: (8, 16, 8), 4096: (16, 16, 16)},
    7: {
        768: (2, 2, 4, 4, 3, 2, 2),
        3072: (2, 4, 4, 4, 4, 3, 2),
        1024: (2, 2, 4, 4, 4, 2, 2),
        4096: (2, 4, 4, 4, 4, 4, 2),
    },
    9: {
        768: (2, 2, 2, 2, 3, 2, 2, 2, 2),
        3072: (2, 2, 2, 4, 4, 3, 2, 2, 2),
        30522: (2, 3, 4, 4, 5, 4, 4, 2, 2),
        30720: (2, 3, 4, 4, 5, 4, 4, 2, 2),
    },
}


def published_shape(rows: int, columns: int, sites: int) -> SiteShape | None:
    """The papers' site shape of a rows×columns matrix, or None where they give none.

    >>> str(published_shape(3072, 768, 5))
    '4,4,8,6,4x3,4,4,4,4'
    """
    if sites == 5:
        pair = _FIVE_SITES.get((rows, columns))
        return SiteShape(*pair) if pair else None
    widths = _BY_WIDTH.get(sites, {})
    if rows in widths and columns in widths:
        return SiteShape(widths[rows], widths[columns])
    return None
