"""Tensors in few bits are read as what their parts stand for, or not at all."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpocli.errors import InputError
from mpocli.io.checkpoint import DTYPE_NAMES, CheckpointReader
from mpocli.io.encodings.base import Encoding
from mpocli.io.encodings.bitmask import Bitmask
from mpocli.io.encodings.corrected import Corrected
from mpocli.io.encodings.known import encoded, encodings_from
from mpocli.io.encodings.quantised import Quantised
from mpocli.io.encodings.quantised_bitmask import QuantisedBitmask
from mpocli.io.stored import WEIGHTS, stored_tensors

NAME = "layer.weight"
SHAPES = [(7, 13), (1, 1), (3, 2, 5, 4), (2, 3, 2, 3, 5), (3, 5, 6)]


def _tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, sparse: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    tensor = torch.randn(shape, generator=generator).to(dtype)
    return tensor.masked_fill_(torch.rand(shape, generator=generator) < 0.6, 0.0) if sparse else tensor


def _encoding(tensor: Tensor, *, sparse: bool, **more: Any) -> Encoding:
    shape, dtype = tuple(tensor.shape), DTYPE_NAMES[tensor.dtype]
    if not sparse:
        return Quantised(shape, dtype=dtype, **more)
    return QuantisedBitmask(shape, dtype=dtype, kept=int((tensor != 0).sum()), **more)


def _directory(path: Path, encoding: Encoding, tensor: Tensor, name: str = NAME) -> Path:
    path.mkdir()
    save_file(encoding.encode(name, tensor), path / WEIGHTS, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_have_the_told_shapes_and_bytes_and_stand_for_a_tensor_near_by(
    shape: tuple[int, ...], sparse: bool
) -> None:
    for number, (bits, group, transposed) in enumerate(product((8, 4, 3, 2), (0, 4), (False, True))):
        if transposed and len(shape) != 2:
            continue
        offsets, dtype = number % 3 == 0, (torch.float32, torch.bfloat16)[number % 5 == 0]
        tensor = _tensor(shape, dtype, sparse=sparse)
        encoding = _encoding(tensor, sparse=sparse, bits=bits, group=group, offsets=offsets, transposed=transposed)
        parts = encoding.encode(NAME, tensor)
        tombstone = parts.pop(NAME)
        assert tombstone.shape == (1,) and tombstone.dtype == dtype and not bool(tombstone.any())
        assert sum(part.nbytes for part in parts.values()) == encoding.nbytes(0, 0)
        assert encoded(parts) == {NAME: type(encoding)}
        made = encoding.unpack(*parts.values())
        assert made.shape == shape and made.dtype == dtype
        error = float((made.double() - tensor.double()).norm() / max(float(tensor.double().norm()), 1e-9))
        assert error < {8: 0.02, 4: 0.15, 3: 0.35, 2: 0.7}[bits]
        if sparse:
            assert not bool(made[tensor == 0].any())
        assert encodings_from({NAME: encoding.to_dict()}) == {NAME: encoding}


def test_groups_run_along_the_inputs_of_a_layer_that_stores_these_first() -> None:
    """Rows of the matrix that a Conv1D stands for, whichever way it is stored."""
    matrix = _tensor((6, 32))
    for sparse in (False, True):
        one, other = (
            _encoding(m, sparse=sparse, bits=4, group=0, transposed=m is not matrix) for m in (matrix, matrix.T)
        )
        assert torch.equal(other.unpack(*other.pack(matrix.T)), one.unpack(*one.pack(matrix)).T)
        assert other.pack(matrix.T)[2 if sparse else 1].shape[0] == 6


def test_a_core_s_rows_are_left_and_out_and_its_groups_run_along_in_and_right() -> None:
    assert Quantised((3, 2, 5, 4)).matrix_shape == (6, 20)
    assert Quantised((2, 3, 2, 3, 5)).matrix_shape == (12, 15)  # of two experts
    assert Quantised((3, 5, 6)).matrix_shape == (15, 6)  # dense experts


@pytest.mark.parametrize("sparse", [False, True])
def test_a_reader_shows_the_tensor_that_the_parts_stand_for(sparse: bool, tmp_path: Path) -> None:
    tensor = _tensor((12, 40), torch.float16, sparse=sparse)
    encoding = _encoding(tensor, sparse=sparse, bits=3, group=16, offsets=True)
    place = _directory(tmp_path / "model", encoding, tensor)
    reader = CheckpointReader(place, {NAME: encoding})
    assert list(reader) == [NAME] and reader.specs[NAME].shape == (12, 40)
    assert reader.specs[NAME].dtype == torch.float16 == reader.read(NAME).dtype
    assert torch.equal(reader.read(NAME), encoding.unpack(*encoding.pack(tensor)))
    parts = reader.read_parts(NAME)
    assert all(torch.equal(one, other) for one, other in zip(parts, encoding.pack(tensor), strict=True))
    light = stored_tensors(place, {NAME: encoding})
    assert sum(part.nbytes for part in light.parts(NAME)) == encoding.nbytes(0, 0)
    assert light.zeros(NAME) == (int((tensor == 0).sum()) if sparse else None)


def _change(directory: Path, suffix: str, change: Any) -> None:
    tensors = load_file(directory / WEIGHTS)
    tensors[NAME + suffix] = change(tensors[NAME + suffix]).contiguous()
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


DAMAGE = {
    "codes cut short": (False, "_codes", lambda part: part[:, :-1]),
    "rows cut off": (False, "_codes", lambda part: part[:-1]),
    "wide codes": (False, "_codes", lambda part: part.to(torch.int32)),
    "scales in float32": (False, "_scales", lambda part: part.float()),
    "a scale too few": (False, "_scales", lambda part: part[:, 1:]),
    "offsets": (False, "_offsets", lambda part: part.new_zeros(12, 3)),
    "levels cut short": (True, "_levels", lambda part: part[:-1]),
    "a mask cut short": (True, "_kept", lambda part: part[:-1]),
    "steps in bfloat16": (True, "_steps", lambda part: part.to(torch.bfloat16)),
    "starts": (True, "_starts", lambda part: part.new_zeros(1)),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_parts_of_another_shape_or_dtype_are_one_clear_line(how: str, tmp_path: Path) -> None:
    sparse, suffix, change = DAMAGE[how]
    tensor = _tensor((12, 40), sparse=sparse)
    encoding = _encoding(tensor, sparse=sparse, bits=3, group=16)
    place = _directory(tmp_path / "model", encoding, tensor)
    _change(place, suffix, change)
    with pytest.raises(InputError, match=rf"of {NAME} are .* need (U8|F16) of \(") as stop:
        CheckpointReader(place, {NAME: encoding})
    assert "\n" not in stop.value.message


def test_a_mask_of_another_number_is_refused_when_it_is_read(tmp_path: Path) -> None:
    tensor = _tensor((12, 40), sparse=True)
    encoding = _encoding(tensor, sparse=True)
    place = _directory(tmp_path / "model", encoding, tensor)
    _change(place, "_kept", lambda part: part ^ 1)
    with pytest.raises(InputError, match="a bitmask that keeps"):
        CheckpointReader(place, {NAME: encoding}).read(NAME)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 5},
        {"bits": None},
        {"group": -1},
        {"group": "x"},
        {"dtype": "I8"},
        {"dtype": None},
        {"offsets": 1},
        {"transposed": "no"},
        {"transposed": True, "shape": [2, 2, 2]},
        {"shape": [0, 4]},
        {"bits": float("inf")},
    ],
)
@pytest.mark.parametrize("sparse", [False, True])
def test_fields_that_cannot_be_are_refused(change: dict[str, Any], sparse: bool) -> None:
    data = _encoding(_tensor((12, 40), sparse=sparse), sparse=sparse).to_dict()
    with pytest.raises(InputError, match=f"tensor {NAME}: "):
        encodings_from({NAME: data | change})


@pytest.mark.parametrize("kept", [-1, 481, "x", None])
def test_a_number_of_kept_values_that_cannot_be_is_refused(kept: object) -> None:
    data = QuantisedBitmask((12, 40), kept=3).to_dict()
    with pytest.raises(InputError, match=f"tensor {NAME}: its encoding is malformed"):
        encodings_from({NAME: data | {"kept": kept}})


def test_a_scale_that_is_no_number_and_a_pattern_that_is_not_kept_are_problems() -> None:
    tensor = _tensor((12, 40), sparse=True)
    few = _encoding(tensor, sparse=True)
    assert few.problem(lambda: tensor) == "" == Quantised((12, 40)).problem(lambda: tensor)
    assert Quantised((12, 40)).problem(lambda: tensor * torch.inf) == "scales: not finite"
    ordered = QuantisedBitmask((12, 40), pattern="2:4")
    assert ordered.problem(lambda: tensor) == Bitmask((12, 40), "2:4").problem(lambda: tensor) != ""


def test_a_changed_tensor_is_stored_with_as_many_values_as_it_has() -> None:
    tensor = _tensor((12, 40), sparse=True)
    encoding = _encoding(tensor, sparse=True)
    fewer = tensor.clone()
    fewer[:4] = 0
    again = encoding.of(fewer)
    assert again.nbytes(0, 0) < encoding.nbytes(0, 0)
    assert not bool(again.unpack(*again.pack(fewer))[fewer == 0].any())
    assert not encoding.suits(torch.ones(12, 40))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_correction_stands_for_the_codes_and_a_low_rank_of_what_they_took(transposed: bool, tmp_path: Path) -> None:
    tensor = _tensor((24, 40))
    options: dict[str, Any] = {"bits": 2, "group": 8, "offsets": True, "transposed": transposed}
    plain, errors = Quantised((24, 40), **options), []
    base = float((plain.unpack(*plain.pack(tensor)) - tensor).norm())
    for rank in (1, 8, 24):
        encoding = Corrected((24, 40), rank=rank, **options)
        parts = encoding.encode(NAME, tensor)
        assert sum(part.nbytes for name, part in parts.items() if name != NAME) == encoding.nbytes(0, 0)
        assert encoded(parts) == {NAME: Corrected} and encodings_from({NAME: encoding.to_dict()}) == {NAME: encoding}
        directory = _directory(tmp_path / str(rank), encoding, tensor)
        read = CheckpointReader(directory, {NAME: encoding}).read(NAME)
        errors.append(float((read - tensor).norm()))
    left = torch.linalg.svdvals((plain.unpack(*plain.pack(tensor)) - tensor).double())
    for rank, error in zip((1, 8), errors, strict=False):  # as the truncated SVD, but for eight bits
        assert error == pytest.approx(float(left[rank:].norm()), rel=0.02)
    assert base > errors[0] > errors[1] > errors[2] and errors[2] < 0.02 * base
    with pytest.raises(InputError, match=r"the left factor of layer\.weight are"):
        CheckpointReader(directory, {NAME: Corrected((24, 40), rank=23, **options)})
    with pytest.raises(InputError, match="malformed"):
        encodings_from({NAME: encoding.to_dict() | {"rank": 0}})
