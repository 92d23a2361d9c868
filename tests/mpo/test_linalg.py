import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import LAW, distance, gaussian

from mpocli.errors import InputError, NumericsError
from mpocli.mpo.linalg import check_finite, left_split

SQRT_EPS = 2.0**-26  # of float64


@st.composite
def rank_limited(draw):
    rows, columns = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    rank = draw(st.integers(0, min(rows, columns)))
    seed = draw(st.integers(0, 999))
    return (
        gaussian(rows, rank, seed=seed)
        @ gaussian(rank, columns, seed=seed + 1)
        * draw(st.sampled_from([1.0, 1e-150, 1e150, 1e-30]))
    )


def assert_is_split(matrix, basis, rest, weights):
    size = min(matrix.shape)
    scale = float(np.abs(matrix).max()) or 1.0
    assert basis.shape == (matrix.shape[0], size) and rest.shape == (size, matrix.shape[1])
    assert weights.shape == (size,)
    assert np.abs(basis.T @ basis - np.eye(size)).max() < 1e-13
    assert distance(basis @ rest, matrix) < 1e-13
    # R = Uᵀ A and its squared row norms are the weights.
    assert np.abs(basis.T @ (matrix / scale) - rest / scale).max() < 1e-12
    assert np.allclose(np.square(rest / scale).sum(1), weights / scale / scale, rtol=1e-12, atol=1e-20)


@LAW
@given(rank_limited())
@example(np.zeros((3, 5)))
@example(np.zeros((5, 3)))
@example(np.zeros((1, 1)))
@example(np.vstack([gaussian(3, 9), np.zeros((3, 9))]))
@example(gaussian(40, 3))
@example(gaussian(3, 40))
def test_split_is_orthonormal_exact_and_measures_its_own_rows(matrix):
    assert_is_split(matrix, *(part.numpy() for part in left_split(torch.from_numpy(matrix))))


@LAW
@given(rank_limited())
def test_weights_are_squared_singular_values_largest_first(matrix):
    weights = left_split(torch.from_numpy(matrix))[2].numpy()
    singular = np.linalg.svd(matrix, compute_uv=False)
    top = singular[0]
    if top:
        assert np.abs(np.sqrt(weights) - singular).max() < 4 * SQRT_EPS * top
        assert (np.diff(np.sqrt(weights)) < 4 * SQRT_EPS * top).all()


@LAW
@given(rank_limited(), st.integers(1, 20))
def test_cutting_a_split_is_the_best_approximation_of_its_rank(matrix, rank):
    basis, rest, _ = (part.numpy() for part in left_split(torch.from_numpy(matrix)))
    error = np.linalg.norm(basis[:, :rank] @ rest[:rank] - matrix)
    singular = np.linalg.svd(matrix, compute_uv=False)
    assert error <= np.linalg.norm(singular[rank:]) + 1e-12 * np.linalg.norm(matrix)


@pytest.mark.parametrize(("rows", "columns"), [(20, 30), (30, 20)])
def test_singular_values_far_below_the_largest_are_known_to_half_the_digits(rows, columns):
    left, _ = np.linalg.qr(gaussian(rows, 20, seed=1))
    right, _ = np.linalg.qr(gaussian(columns, 20, seed=2))
    singular = 10.0 ** -np.arange(20)
    matrix = left * singular @ right.T
    basis, rest, weights = (part.numpy() for part in left_split(torch.from_numpy(matrix)))
    assert_is_split(matrix, basis, rest, weights)
    assert np.abs(np.sqrt(weights) - singular).max() < 4 * SQRT_EPS
    for rank in range(1, 20):  # the cut itself is as good, too
        tail = np.linalg.norm(singular[rank:])
        assert np.linalg.norm(basis[:, :rank] @ rest[:rank] - matrix) < tail + 4 * SQRT_EPS


@pytest.mark.parametrize("scale", [1e-250, 1e-200, 1e200, 1e250])
@pytest.mark.parametrize(("rows", "columns"), [(5, 8), (8, 5)])
def test_elements_whose_squares_leave_the_range_still_split_exactly(rows, columns, scale):
    matrix = gaussian(rows, columns) * scale
    basis, rest, _ = (part.numpy() for part in left_split(torch.from_numpy(matrix)))
    assert np.abs(basis.T @ basis - np.eye(5)).max() < 1e-13
    assert distance(basis @ rest, matrix) < 1e-13


def test_equal_singular_values_split_without_loss():
    for matrix in (np.eye(7), -np.eye(7), np.ones((6, 8)), np.kron(np.eye(3), np.ones((2, 2)))):
        assert_is_split(matrix, *(part.numpy() for part in left_split(torch.from_numpy(matrix))))


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_split_leaves_its_input_and_the_number_of_threads_alone(two_threads):
    matrix = torch.from_numpy(gaussian(4, 6))
    before = matrix.clone()
    left_split(matrix)
    assert torch.equal(matrix, before) and torch.get_num_threads() == 2


@pytest.mark.parametrize(("rows", "columns", "routine"), [(4, 6, "eigh"), (6, 4, "svd")])
def test_a_factorisation_that_does_not_converge_is_a_numerics_error(two_threads, monkeypatch, rows, columns, routine):
    def fail(*args, **kwargs):
        assert torch.get_num_threads() == 1
        raise torch.linalg.LinAlgError("the algorithm failed")

    monkeypatch.setattr(torch.linalg, routine, fail)
    with pytest.raises(NumericsError, match=f"{rows}x{columns} factorisation did not converge"):
        left_split(torch.ones(rows, columns, dtype=torch.float64))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_check_finite_names_the_tensor_and_counts_what_is_not(dtype):
    tensor = torch.ones(3, 4, dtype=dtype)
    check_finite(tensor, "fine")
    tensor[0, 0], tensor[1, 1], tensor[2, 2] = float("nan"), float("inf"), -float("inf")
    with pytest.raises(InputError, match=r"layer\.0\.weight: 3 of 12 elements are NaN or infinite"):
        check_finite(tensor, "layer.0.weight")


@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 6e4), (torch.float32, 3e38), (torch.float64, 1e308)])
def test_finite_elements_whose_sum_overflows_pass(dtype, large):
    tensor = torch.full((100,), large, dtype=dtype)
    assert torch.isinf(tensor.sum())
    check_finite(tensor, "large")
    tensor[7] = float("inf")
    with pytest.raises(InputError, match="1 of 100"):
        check_finite(tensor, "large")
