"""The bitmask against numpy's, and its round trip bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpocli.errors import InputError
from mpocli.io.encodings.bitmask import Bitmask
from mpocli.sparse import pack_bits, pack_sparse, unpack_bits, unpack_sparse


@given(st.lists(st.booleans(), min_size=0, max_size=70))
def test_bits_are_numpy_s_little_endian_ones(bits: list[bool]) -> None:
    packed = pack_bits(torch.tensor(bits, dtype=torch.bool))
    assert packed.tolist() == np.packbits(np.array(bits, bool), bitorder="little").tolist()
    assert unpack_bits(packed, (len(bits),)).tolist() == bits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 13), (1, 1), (3, 4, 5, 2)])
def test_a_sparse_tensor_comes_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(dtype)
    tensor[torch.rand(shape) < 0.6] = 0.0
    tensor.reshape(-1)[0] = -0.0
    packed, values = pack_sparse(tensor)
    assert packed.nbytes + values.nbytes == Bitmask(shape).nbytes(tensor.numel() - values.numel(), dtype.itemsize)
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(unpack_sparse(packed, values, shape).view(words), tensor.view(words))


def test_mask_and_values_of_different_tensors_are_an_error() -> None:
    packed, values = pack_sparse(torch.tensor([1.0, 0.0, 2.0]))
    with pytest.raises(InputError, match="keeps 2 entries, and 1 values"):
        unpack_sparse(packed, values[:1], (3,))
    with pytest.raises(InputError, match="2 bytes were expected"):
        unpack_sparse(packed, values, (9,))
