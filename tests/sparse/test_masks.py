"""Masks against a sort in numpy, and what the published code of PST got wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpocli.errors import InputError, NumericsError
from mpocli.sparse import Pattern, global_masks, n_of_m_mask, rowwise_mask, smallest_mask, zeros_in


def sorted_mask(scores: np.ndarray, zeros: int) -> np.ndarray:
    """By a stable sort of the values in row-major order."""
    flat = np.ascontiguousarray(scores).reshape(-1)
    mask = np.ones(flat.size, bool)
    mask[np.argsort(flat, kind="stable")[:zeros]] = False
    return mask.reshape(scores.shape)


@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    share=st.floats(0, 1),
)
def test_the_mask_is_that_of_a_stable_sort_ties_included(values: list[int], share: float) -> None:
    scores = np.array(values, np.float32)
    zeros = int(len(values) * share)
    assert smallest_mask(torch.tensor(scores), zeros).numpy().tolist() == sorted_mask(scores, zeros).tolist()


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_a_transposed_matrix_is_pruned_too(sparsity: float) -> None:
    """Fault H1: written through a copy, the zeros of a non-contiguous score never reached the mask."""
    scores = torch.randn(30, 50).T
    assert not scores.is_contiguous()
    mask = smallest_mask(scores, zeros_in(1500, sparsity))
    assert int((~mask).sum()) == math.floor(1500 * sparsity)
    assert np.array_equal(mask.numpy(), sorted_mask(scores.numpy(), math.floor(1500 * sparsity)))


def test_equal_scores_lose_exactly_as_many_as_were_asked_for() -> None:
    """A bare comparison with the threshold prunes all of them."""
    mask = smallest_mask(torch.zeros(4, 4), 9)
    assert mask.reshape(-1).tolist() == [False] * 9 + [True] * 7


@pytest.mark.parametrize("where", [0, 7, 15])
def test_nan_is_an_error(where: int) -> None:
    scores = torch.arange(16.0)
    scores[where] = math.nan
    with pytest.raises(NumericsError):
        smallest_mask(scores, 8)


@pytest.mark.parametrize(("numel", "sparsity", "zeros"), [(100, 0.29, 29), (10, 0.3, 3), (147456, 0.9, 132710)])
def test_zeros_are_the_floor_of_the_exact_product(numel: int, sparsity: float, zeros: int) -> None:
    assert zeros_in(numel, sparsity) == zeros


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
def test_rows_share_the_zeros_evenly_and_exactly(rows: int, columns: int, sparsity: float) -> None:
    scores = torch.randn(rows, columns)
    mask = rowwise_mask(scores, sparsity)
    counts = (~mask).sum(1).tolist()
    assert sum(counts) == zeros_in(rows * columns, sparsity)
    assert max(counts) - min(counts) <= 1
    for row, count in zip(range(rows), counts, strict=True):
        assert np.array_equal(mask[row].numpy(), sorted_mask(scores[row].numpy(), count))


@pytest.mark.parametrize(("text", "keep", "group"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:3", 1, 3)])
def test_every_group_keeps_its_largest(text: str, keep: int, group: int) -> None:
    pattern = Pattern.parse(text)
    scores = torch.randn(6, group * 5)
    mask = n_of_m_mask(scores, keep, group)
    assert pattern == Pattern(keep, group) and pattern.sparsity == pytest.approx(1 - keep / group)
    for row in range(6):
        for first in range(0, group * 5, group):
            part, kept = scores[row, first : first + group], mask[row, first : first + group]
            assert int(kept.sum()) == keep and part[kept].min() > part[~kept].max()


def test_groups_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(InputError, match="30 input columns are no multiple of 4"):
        n_of_m_mask(torch.randn(3, 30), 2, 4)


@pytest.mark.parametrize("text", ["2", "4:2", "0:4", "2:2", "two:four", "structured"])
def test_other_patterns_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="pattern"):
        Pattern.parse(text)


def test_a_global_threshold_is_one_sort_over_all_matrices() -> None:
    parts = [torch.randn(4, 6), 10 * torch.randn(5, 3)]
    masks = global_masks(parts, 17)
    flat = np.concatenate([part.reshape(-1).numpy() for part in parts])
    assert np.array_equal(np.concatenate([m.reshape(-1).numpy() for m in masks]), sorted_mask(flat, 17))
    assert [mask.shape for mask in masks] == [part.shape for part in parts]
