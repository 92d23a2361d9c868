"""Files that the writer lays out by hand are what the safetensors library would have written."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpocli.errors import InputError
from mpocli.io import writer as writer_module
from mpocli.io.checkpoint import DTYPES, CheckpointReader
from mpocli.io.stored import WEIGHTS, WEIGHTS_INDEX
from mpocli.io.tensor_spec import TensorSpec
from mpocli.io.writer import CheckpointWriter, SpecCounter, plan_shards

GENERATOR = torch.Generator().manual_seed(0)


def _tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Random bits: NaN payloads, negative zeros and subnormals must survive too."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=GENERATOR).bool()
    count = math.prod(shape) * dtype.itemsize
    return torch.randint(0, 256, (count,), generator=GENERATOR, dtype=torch.uint8).view(dtype).reshape(shape)


def _bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _write(directory: Path, tensors: dict[str, Tensor], most: int = 1 << 40) -> list[Path]:
    writer = CheckpointWriter(directory, most)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    return writer.finish()


def _same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert _bits(found[name]) == _bits(tensor), name


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_is_read_back_bit_for_bit_by_safetensors(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"matrix": _tensor(dtype, (3, 5)), "scalar": _tensor(dtype, ()), "none": _tensor(dtype, (0, 4))}
    assert _write(tmp_path, tensors) == [tmp_path / WEIGHTS]
    _same(load_file(tmp_path / WEIGHTS), tensors)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]  # no spool, no index


def test_bfloat16_float32_and_int64_mix_in_one_file(tmp_path: Path) -> None:
    tensors = {
        "odd": _tensor(torch.bool, (3,)),
        "half": _tensor(torch.bfloat16, (3, 3)),
        "single": _tensor(torch.float32, (5,)),
        "ids": torch.arange(7),
        "byte": _tensor(torch.uint8, (1,)),
        "double": _tensor(torch.float64, (1, 1)),
    }
    _write(tmp_path, tensors)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # or transformers refuses it
        _same({name: file.get_tensor(name) for name in file.keys()}, tensors)


def test_every_tensor_is_aligned_to_its_element_size(tmp_path: Path) -> None:
    """For those who map the file and cast in place."""
    _write(tmp_path, {f"{k}": _tensor(dtype, (3,)) for k, dtype in enumerate(DTYPES.values())})
    content = (tmp_path / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    assert start % 8 == 0
    for name, entry in header.items():
        if name != "__metadata__":
            assert (start + entry["data_offsets"][0]) % DTYPES[entry["dtype"]].itemsize == 0


def test_tensors_that_are_views_are_written_as_they_look(tmp_path: Path) -> None:
    base = _tensor(torch.float32, (6, 8))
    views = {"transposed": base.T, "strided": base[::2, 1::3], "broadcast": base[:1].expand(4, 8), "grad": base[2]}
    _write(tmp_path, {**views, "grad": base[2].clone().requires_grad_()})
    _same(load_file(tmp_path / WEIGHTS), views)


def test_names_that_json_must_escape_come_back(tmp_path: Path) -> None:
    tensors = {name: _tensor(torch.float32, (2,)) for name in ('a"b', "back\\slash", "ünï.cödé", "line\nbreak", "日本")}
    _write(tmp_path, tensors)
    _same(load_file(tmp_path / WEIGHTS), tensors)


def test_a_name_is_written_once(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 1000)
    writer.add("a", torch.zeros(1))
    with pytest.raises(ValueError, match="a is written twice"):
        writer.add("a", torch.zeros(1))
    writer.finish()


def test_a_writer_that_fails_leaves_no_spool_and_no_open_file(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path, 1000) as writer:
            writer.add("a", torch.zeros(1))
            assert list(tmp_path.iterdir()) == [tmp_path / ".spool"]
            raise KeyboardInterrupt
        spool = writer._spool
        assert spool.closed and list(tmp_path.iterdir()) == []
        with CheckpointWriter(tmp_path, 1000) as writer:
            writer.finish()
        assert writer._spool.closed and list(tmp_path.iterdir()) == [tmp_path / WEIGHTS]


@pytest.mark.parametrize("most", [1 << 40, 1000], ids=["one file", "shards"])
def test_spool_and_files_never_take_more_than_all_tensors_and_the_largest(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order of names and dtypes, and with empty tensors between."""
    tensors = {
        f"{7 * k % 20}": _tensor((torch.float32, torch.uint8, torch.int64)[k % 3], (31 * k % 50,)) for k in range(20)
    }
    sizes = [tensor.nbytes for tensor in tensors.values()]
    assert 0 in sizes
    copied, peak = 0, 0
    copy = writer_module._copy

    def measured(source: BinaryIO, target: BinaryIO, count: int) -> None:
        nonlocal copied, peak
        copied += count
        peak = max(peak, copied + os.fstat(source.fileno()).st_size)
        copy(source, target, count)

    monkeypatch.setattr(writer_module, "_copy", measured)
    files = _write(tmp_path, tensors, most)
    assert (len(files) > 1) == (most == 1000)
    assert copied == sum(sizes) < peak <= sum(sizes) + max(sizes)
    _same({name: tensor for file in files for name, tensor in load_file(file).items()}, tensors)


def test_an_empty_tensor_costs_its_neighbours_nothing(tmp_path: Path) -> None:
    """It stands at the same place of the spool as the next one, which must not be cut off with it."""
    for names in ("ab", "ba"):
        tensors = {names[0]: torch.zeros(0), names[1]: torch.ones(3)}
        _write(tmp_path, tensors)
        _same(load_file(tmp_path / WEIGHTS), tensors)


_SPECS = st.lists(
    st.tuples(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]), st.integers(0, 60)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(_SPECS, st.integers(1, 600))
def test_shards_hold_every_tensor_once_in_order_and_announce_their_exact_size(
    contents: list[tuple[torch.dtype, int]], most: int
) -> None:
    import tempfile

    tensors = {f"t{k}": _tensor(dtype, (size,)) for k, (dtype, size) in enumerate(contents)}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        counter = SpecCounter()
        for name, tensor in tensors.items():
            counter.add(name, tensor)
        foretold = plan_shards(counter.specs, most)
        files = _write(directory, tensors, most)
        assert [file.name for file in files] == [shard.name for shard in foretold]
        assert [file.stat().st_size for file in files] == [shard.nbytes for shard in foretold]
        found: dict[str, Tensor] = {}
        for file in files:
            part = load_file(file)
            assert part and not part.keys() & found.keys()
            assert len(part) == 1 or sum(t.numel() * t.itemsize for t in part.values()) <= most
            order = [int(name[1:]) for name in part]
            assert sorted(order) == list(range(len(found), len(found) + len(part)))
            found |= part
        _same(found, tensors)
        if len(files) > 1:
            index = json.loads((directory / WEIGHTS_INDEX).read_text())
            total = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
            assert index["metadata"]["total_size"] == total
            assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
        else:
            assert files[0].name == WEIGHTS and not (directory / WEIGHTS_INDEX).exists()
        reader = CheckpointReader(directory)
        _same({name: reader.read(name) for name in reader}, tensors)
        assert reader.nbytes == sum(shard.nbytes for shard in foretold)


def test_a_writer_without_tensors_writes_a_file_that_opens(tmp_path: Path) -> None:
    _write(tmp_path, {})
    assert load_file(tmp_path / WEIGHTS) == {}


# --- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_reader_returns_what_safetensors_wrote(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"matrix": _tensor(dtype, (3, 5)), "scalar": _tensor(dtype, ()), "none": _tensor(dtype, (0, 4))}
    save_file(tensors, tmp_path / WEIGHTS)
    reader = CheckpointReader(tmp_path)
    _same({name: reader.read(name) for name in reader}, tensors)
    assert reader.specs == {name: TensorSpec(name, dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert reader.specs["matrix"].nbytes == 15 * dtype.itemsize and reader.specs["scalar"].numel == 1
    assert "matrix" in reader and "absent" not in reader


def test_a_tensor_that_was_read_owns_its_memory(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / WEIGHTS)
    reader = CheckpointReader(tmp_path)
    reader.read("a").zero_()
    assert torch.equal(reader.read("a"), torch.ones(4))
    assert load_file(tmp_path / WEIGHTS)["a"].sum() == 4


def test_a_dtype_that_torch_lacks_is_refused_by_name(tmp_path: Path) -> None:
    header = json.dumps({"odd": {"dtype": "F6_E2M3", "shape": [8], "data_offsets": [0, 6]}}).encode()
    (tmp_path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(6))
    with pytest.raises(InputError, match=r"odd has dtype F6_E2M3"):
        CheckpointReader(tmp_path)


def test_the_digest_is_of_the_file_or_of_the_sorted_digests_of_the_shards(tmp_path: Path) -> None:
    """As `sha256sum model.safetensors`, or `sha256sum *.safetensors | sha256sum`."""
    import hashlib

    tensors = {f"{k}": _tensor(torch.float32, (50,)) for k in range(3)}
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    (file,) = _write(tmp_path / "one", tensors)
    assert CheckpointReader(tmp_path / "one").sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    shards = _write(tmp_path / "many", tensors, 200)
    assert len(shards) == 3
    lines = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(shards))
    assert CheckpointReader(tmp_path / "many").sha256 == hashlib.sha256(lines.encode()).hexdigest()


def test_one_file_beats_an_index_beside_it_as_in_transformers(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / WEIGHTS)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / WEIGHTS_INDEX).write_text(json.dumps({"weight_map": {"a": "other.safetensors"}}))
    assert CheckpointReader(tmp_path).read("a") == 1
