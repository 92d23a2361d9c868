import math

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import LAW

from mpocli.mpo import TruncationError
from mpocli.mpo.truncation import choose_bond

weights_lists = st.lists(st.floats(0, 100).map(lambda w: round(w, 3)), min_size=1, max_size=12).map(
    lambda weights: sorted(weights, reverse=True)
)


@LAW
@given(weights_lists, st.integers(1, 15), st.floats(1e-3, 300))
@example([4.0, 1.0, 1.0], 3, 2.0)  # the allowance is met exactly
@example([1.0], 1, 5.0)  # everything could go; one stays
@example([0.0, 0.0, 0.0], 3, 1e-3)
def test_chosen_bond_is_the_smallest_that_meets_allowance_and_cap(weights, cap, allowance):
    kept, lost = choose_bond(torch.tensor(weights, dtype=torch.float64), cap, allowance)
    assert 1 <= kept <= cap
    assert math.isclose(lost, math.fsum(weights[kept:]), rel_tol=1e-12, abs_tol=1e-300)
    slack = 1e-9 * (1 + allowance)
    if kept < min(cap, len(weights)):  # the allowance decided: it is met …
        assert lost <= allowance + slack
    if kept > 1:  # … and one less would not do
        assert math.fsum(weights[kept - 1 :]) > allowance - slack


@LAW
@given(weights_lists, st.integers(1, 15))
def test_without_an_allowance_the_cap_alone_decides(weights, cap):
    kept, lost = choose_bond(torch.tensor(weights, dtype=torch.float64), cap, 0.0)
    assert lost == 0.0 or kept == cap
    assert kept <= cap


def test_relative_error_is_the_root_of_the_discarded_share():
    error = TruncationError((3.0, 0.0, 6.0), 36.0)
    assert (error.absolute, error.relative) == (3.0, 0.5)


def test_relative_error_of_the_zero_matrix_is_zero():
    assert TruncationError((0.0, 0.0), 0.0).relative == 0.0
