"""The matrix that cores stand for, by numpy."""

from __future__ import annotations

import numpy as np


def dense_by_loops(cores: list[np.ndarray], shape: list[int]) -> np.ndarray:
    """The matrix of an MPO, element by element: W[o, i] = product of one slice of each core."""
    out_dims, in_dims = ([core.shape[leg] for core in cores] for leg in (1, 2))
    matrix = np.zeros(shape)
    for row in range(shape[0]):
        row_digits = np.unravel_index(row, out_dims)
        for column in range(shape[1]):
            state = np.ones((1, 1))
            for core, o, i in zip(cores, row_digits, np.unravel_index(column, in_dims), strict=True):
                state = state @ core[:, o, i, :]
            matrix[row, column] = state[0, 0]
    return matrix
