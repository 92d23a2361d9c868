"""The cubic schedule against PST's values and its refusals."""

from __future__ import annotations

import pytest

from mpocli.errors import UsageError
from mpocli.sparse import CubicSchedule


@pytest.mark.parametrize("total", [100, 1000, 4200])
def test_it_takes_the_published_values(total: int) -> None:
    """PST's defaults 0.9, 0, 0.1, 0.3."""
    schedule = CubicSchedule(total)
    expected = {0.10: 0.0, 0.11: 0.044, 0.25: 0.520, 0.40: 0.788, 0.55: 0.886, 0.69: 0.900, 0.70: 0.900, 1.0: 0.9}
    for share, sparsity in expected.items():
        assert schedule.at(round(share * total)) == pytest.approx(sparsity, abs=6e-4)


def test_the_first_step_has_the_initial_sparsity() -> None:
    """The published layers ran their first step dense whatever was asked for."""
    assert CubicSchedule(10, 0.8, 0.5, 0.1, 0.1).at(0) == 0.5


def test_it_never_falls_and_ends_exactly() -> None:
    for shares in ((0.1, 0.3), (0.0, 0.0), (0.5, 0.4)):
        schedule = CubicSchedule(37, 0.9, 0.2, *shares)
        values = [schedule.at(step) for step in range(38)]
        assert values == sorted(values) and values[-1] == 0.9


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"initial_warmup": 0.5, "final_warmup": 0.5}, "together 1"),
        ({"initial_warmup": -0.1}, "initial-warmup"),
        ({"final_warmup": 1.0}, "final-warmup"),
        ({"initial": 0.95}, "0.95"),
        ({"final": 1.0}, "1.0"),
    ],
)
def test_what_leaves_no_room_is_refused(options: dict[str, float], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        CubicSchedule(100, **options)
