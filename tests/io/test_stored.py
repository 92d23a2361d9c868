"""Headers say the same, and are refused with the same words, with torch and without."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mpocli.errors import InputError
from mpocli.io.checkpoint import DTYPES, CheckpointReader
from mpocli.io.dtypes import STORED_DTYPES
from mpocli.io.encodings.bitmask import Bitmask
from mpocli.io.signpost import SIGNPOST, signpost
from mpocli.io.stored import WEIGHTS, WEIGHTS_INDEX, stored_tensors


def packed(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return Bitmask(tuple(tensor.shape)).encode(name, tensor)


def _tensors() -> dict[str, torch.Tensor]:
    """One of every dtype, a sparse one and a seal."""
    dense = {code: torch.zeros(2, 3, dtype=torch.uint8).to(dtype) for code, dtype in DTYPES.items()}
    return {**dense, **packed("s.weight", torch.eye(5)), SIGNPOST: signpost({"modules": {"a": {}}})}


ENCODINGS = {"s.weight": Bitmask((5, 5))}


def test_names_and_sizes_of_dtypes_are_those_of_torch() -> None:
    for code, dtype in DTYPES.items():
        assert (str(STORED_DTYPES[code]), STORED_DTYPES[code].itemsize) == (str(dtype), dtype.itemsize)


def test_both_readers_see_the_same_tensors(tmp_path: Path) -> None:
    save_file(_tensors(), tmp_path / WEIGHTS)
    with_torch, without = CheckpointReader(tmp_path, ENCODINGS), stored_tensors(tmp_path, ENCODINGS)
    assert list(with_torch) == list(without) and "s.weight" in without
    for name in with_torch:
        one, other = with_torch.specs[name], without.specs[name]
        assert (one.shape, str(one.dtype), one.nbytes) == (other.shape, str(other.dtype), other.nbytes)
    assert with_torch.encoded == without.encoded and with_torch.zeros("s.weight") == 20
    assert without.zeros("s.weight") == 20 and without.zeros("F32") is None
    assert with_torch.seal == without.seal and isinstance(without.seal, int)
    assert with_torch.nbytes == without.nbytes == (tmp_path / WEIGHTS).stat().st_size


def _header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "nothing": lambda file: file.write_bytes(b""),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "no header": lambda file: file.write_bytes(b"x" * 100),
    "a header beyond the file": lambda file: file.write_bytes(struct.pack("<Q", 1 << 40) + file.read_bytes()[8:]),
    "an unknown dtype": lambda file: _header(file, lambda h: h["F32"].update(dtype="F7")),
    "a dtype that is not read": lambda file: _header(file, lambda h: h["F32"].update(dtype="F4", shape=[6, 8])),
    "another shape": lambda file: _header(file, lambda h: h["F32"].update(shape=[2, 4])),
    "overlapping": lambda file: _header(file, lambda h: h["F32"].update(data_offsets=h["I32"]["data_offsets"])),
    "no values": lambda file: save_file({k: t for k, t in _tensors().items() if "values" not in k}, file),
    "a bitmask of floats": lambda file: save_file({**_tensors(), "s.weight_bitmask": torch.zeros(4)}, file),
    "a bitmask unknown": lambda file: save_file({**_tensors(), **packed("t.weight", torch.eye(2))}, file),
    "gone": lambda file: file.unlink(),
    "a pickle": lambda file: file.rename(file.with_name("pytorch_model.bin")),
    "an index of nothing": lambda file: file.rename(file.with_name(WEIGHTS_INDEX)),
    "a shard elsewhere": lambda file: (
        file.unlink(),
        file.with_name(WEIGHTS_INDEX).write_text('{"weight_map": {"a": "../b"}}'),
    ),
    "an index that is wrong": lambda file: (
        file.rename(file.with_name("a.safetensors")),
        file.with_name(WEIGHTS_INDEX).write_text('{"weight_map": {"none.weight": "a.safetensors"}}'),
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_both_readers_refuse_damage_with_the_same_words(what: str, tmp_path: Path) -> None:
    save_file(_tensors(), tmp_path / WEIGHTS)
    CheckpointReader(tmp_path, ENCODINGS), stored_tensors(tmp_path, ENCODINGS)
    DAMAGE[what](tmp_path / WEIGHTS)
    said = []
    for read in (CheckpointReader, stored_tensors):
        with pytest.raises(InputError) as refusal:
            read(tmp_path, ENCODINGS)
        said.append((refusal.value.message, refusal.value.hint))
    assert said[0] == said[1]
