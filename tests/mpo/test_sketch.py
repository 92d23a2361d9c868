"""The quick two-site start: near the best one, the same each time, and of the same shape."""

from __future__ import annotations

import pytest
import torch

from mpocli.mpo import SiteShape, Truncation, decompose, site_shape
from mpocli.mpo.sketch import sketched


def decaying(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, min(rows, columns), generator=generator)).Q for size in (rows, columns)
    )
    return (left * torch.arange(1, min(rows, columns) + 1) ** -1.0) @ right.T


@pytest.mark.parametrize("sites", [SiteShape((8, 8), (8, 8)), SiteShape((64, 1), (1, 64)), SiteShape((16, 4), (4, 16))])
@pytest.mark.parametrize("bond", [3, 12])
def test_it_loses_little_more_than_truncation_and_never_less(sites: SiteShape, bond: int) -> None:
    w = decaying(64, 64, 0)
    best, _ = decompose(w, sites, Truncation(bond))
    made = sketched(w, sites, bond)
    errors = [float((w.double() - mpo.to_matrix()).norm()) for mpo in (best, made)]
    assert made.bond_dims == best.bond_dims and made.site_shape == best.site_shape
    assert errors[0] * (1 - 1e-6) <= errors[1] <= 1.1 * errors[0]
    assert all(torch.equal(a, b) for a, b in zip(made.cores, sketched(w, sites, bond).cores, strict=True))


def test_structure_is_found_and_sizes_are_padded() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(4, 3, generator=generator) for _ in range(2))
    made = sketched(torch.kron(a, b), SiteShape((4, 4), (3, 3)), 1)
    torch.testing.assert_close(made.to_matrix().float(), torch.kron(a, b), rtol=1e-4, atol=1e-5)
    sites = site_shape(13, 11, 2)
    padded = sketched(decaying(13, 11, 2), sites, 2)
    assert padded.shape == (13, 11) and padded.to_matrix().shape == (13, 11)


@pytest.mark.parametrize("scale", [1e-25, 1e20])
def test_the_scale_of_a_matrix_changes_nothing(scale: float) -> None:
    w, sites = decaying(64, 64, 3).double(), SiteShape((8, 8), (8, 8))
    torch.testing.assert_close(sketched(w * scale, sites, 5).to_matrix() / scale, sketched(w, sites, 5).to_matrix())


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert not bool(sketched(torch.zeros(64, 64), SiteShape((8, 8), (8, 8)), 5).to_matrix().any())
