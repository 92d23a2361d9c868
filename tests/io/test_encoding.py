"""Tensors kept as bitmask and values are read as the dense ones, or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpocli.errors import InputError
from mpocli.io.checkpoint import DTYPES, CheckpointReader
from mpocli.io.encodings import known
from mpocli.io.encodings.base import Encoding, Part, RoundedEncoding
from mpocli.io.encodings.bitmask import Bitmask
from mpocli.io.encodings.known import encoded, encoding_of, encodings_from
from mpocli.io.manifest import Manifest
from mpocli.io.mpo_spec import MPOSpec
from mpocli.io.read_manifest import read_manifest
from mpocli.io.stored import WEIGHTS
from mpocli.io.tensor_spec import TensorSpec
from mpocli.io.writer import CheckpointWriter

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
NAME = "layer.weight"
BITS, VALUES = f"{NAME}_bitmask", f"{NAME}_values"


def _same(found: Tensor, expected: Tensor) -> bool:
    """Bit for bit: NaN equals itself, and −0.0 is not 0.0."""
    word = WORDS[expected.element_size()]
    return found.dtype == expected.dtype and torch.equal(
        found.contiguous().view(word), expected.contiguous().view(word)
    )


def _by_numpy(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors that stand for one in the files, from its bytes alone."""
    size = tensor.element_size()
    words = np.frombuffer(tensor.contiguous().view(torch.uint8).numpy().tobytes(), dtype=f"<u{size}")
    kept = tensor.reshape(-1)[[place for place, word in enumerate(words) if word]]
    bits = torch.from_numpy(np.packbits(words != 0, bitorder="little"))
    parts = {f"{name}_bitmask": bits, f"{name}_values": kept}
    return {**parts, name: torch.zeros(1, dtype=tensor.dtype)} if name.endswith(".weight") else parts


def _sparse(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator).to(dtype)
    return tensor.masked_fill_(torch.rand(shape, generator=generator) < 0.7, 0.0)


def packed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return Bitmask(tuple(tensor.shape)).encode(name, tensor)


def _add(writer: CheckpointWriter, name: str, tensor: Tensor) -> None:
    for part, stored in packed(name, tensor).items():
        writer.add(part, stored)


def _directory(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    return path


# --- writing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (2, 3, 5, 7), (8,)])
def test_the_stored_parts_are_what_numpy_makes_of_the_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = _sparse(shape, dtype)
    found, expected = packed(NAME, tensor), _by_numpy(NAME, tensor)
    assert found.keys() == expected.keys() == {NAME, BITS, VALUES}
    assert all(_same(found[part], expected[part]) for part in expected)
    assert found[BITS].nbytes == math.ceil(tensor.numel() / 8)


SPECIAL = torch.tensor([[0.0, -0.0, math.nan], [math.inf, -math.inf, 0.0], [1e-45, 0.0, -1e-45]])


@pytest.mark.parametrize(
    ("tensor", "kept"),
    [
        (SPECIAL, 6),  # −0.0, NaN, both infinities and both subnormals
        (SPECIAL.double(), 6),
        (SPECIAL[:2].bfloat16(), 4),
        (SPECIAL[:2].half(), 4),
        (torch.zeros(5, 9), 0),
        (torch.full((5, 9), -0.0), 45),
        (torch.ones(5, 9), 45),
        (torch.zeros(1, 1), 0),
        (_sparse((6, 10)).T, int((_sparse((6, 10)) != 0).sum())),
        (_sparse((6, 10))[::2, 1::3], int((_sparse((6, 10))[::2, 1::3] != 0).sum())),
    ],
    ids=["float32", "float64", "bfloat16", "float16", "zero", "minus zero", "full", "1x1", "transposed", "strided"],
)
def test_a_written_tensor_is_read_bit_for_bit_and_keeps_only_what_is_not_zero(
    tensor: Tensor, kept: int, tmp_path: Path
) -> None:
    with CheckpointWriter(tmp_path, 1 << 40) as writer:
        _add(writer, NAME, tensor)
        writer.finish()
    stored = load_file(tmp_path / WEIGHTS)
    assert len(stored[VALUES]) == kept and stored[NAME].tolist() == [0.0]
    reader = CheckpointReader(tmp_path, {NAME: Bitmask(tuple(tensor.shape))})
    assert _same(reader.read(NAME), tensor)
    assert reader.zeros(NAME) == tensor.numel() - kept


def test_only_a_dense_weight_leaves_a_tombstone() -> None:
    """The module of a core has one already."""
    core = _sparse((1, 3, 3, 1))
    assert packed("layer.core_2", core).keys() == {"layer.core_2_bitmask", "layer.core_2_values"}
    assert packed("layer.weight", core)["layer.weight"].shape == (1,)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000)), min_size=1, max_size=4),
    st.integers(1, 400),
)
def test_parts_in_whatever_shards_are_read_as_the_dense_tensors(
    matrices: list[tuple[int, int, int]], most: int
) -> None:
    import tempfile

    tensors = {f"{k}.weight": _sparse((rows, columns), seed=seed) for k, (rows, columns, seed) in enumerate(matrices)}
    with tempfile.TemporaryDirectory() as folder:
        with CheckpointWriter(Path(folder), most) as writer:
            for name, tensor in tensors.items():
                _add(writer, name, tensor)
            writer.add("bias", torch.ones(3))
            files = writer.finish()
        reader = CheckpointReader(Path(folder), {name: Bitmask(tuple(t.shape)) for name, t in tensors.items()})
        assert set(reader) == {*tensors, "bias"}
        assert all(_same(reader.read(name), tensor) for name, tensor in tensors.items())
        for name in tensors:
            stored = {part: t for file in files for part, t in load_file(file).items() if part.startswith(name)}
            specs = reader.encoding(name).converted(name, reader.parts(name), torch.float32)
            assert {part: (t.dtype, tuple(t.shape)) for part, t in stored.items()} == {
                spec.name: (spec.dtype, spec.shape) for spec in specs
            }


# --- reading ------------------------------------------------------------------------------------------------------


def test_the_reader_shows_dense_specs_in_the_place_of_the_parts(tmp_path: Path) -> None:
    tensor = _sparse((6, 7), torch.bfloat16)
    reader = CheckpointReader(
        _directory(tmp_path / "a", {**_by_numpy(NAME, tensor), "bias": torch.ones(6)}), {NAME: Bitmask((6, 7))}
    )
    assert reader.specs == {
        NAME: TensorSpec(NAME, torch.bfloat16, (6, 7)),
        "bias": TensorSpec("bias", torch.float32, (6,)),
    }
    assert _same(reader.read(NAME), tensor)
    reader.read(NAME).zero_()
    assert _same(reader.read(NAME), tensor)


@pytest.mark.parametrize("entry", [NAME, f"base.{NAME}", "weight"])
def test_an_encoding_is_found_under_a_longer_or_shorter_path(entry: str, tmp_path: Path) -> None:
    """A base model's files lack the prefix that the config of a whole one has."""
    tensor = _sparse((6, 7))
    reader = CheckpointReader(_directory(tmp_path / "a", _by_numpy(NAME, tensor)), {entry: Bitmask((6, 7))})
    assert reader.encoded == {NAME: entry} and _same(reader.read(NAME), tensor)


def test_a_path_that_fits_two_encodings_is_neither_and_an_exact_one_is_itself() -> None:
    two = {"a.layer.weight": Bitmask((2, 2)), "b.layer.weight": Bitmask((3, 3))}
    assert encoding_of(two, "layer.weight") is None
    assert encoding_of({**two, "layer.weight": Bitmask((4, 4))}, "layer.weight") == "layer.weight"
    # A name ends at a dot.
    assert encoding_of(two, "slayer.weight") is None
    assert encoding_of({"a.slayer.weight": Bitmask((2, 2))}, "layer.weight") is None
    assert encoded([BITS, VALUES, "x_bitmask", "y_values", "bias"]) == {NAME: Bitmask}


def _without(part: str) -> Any:
    return lambda tensors: tensors.pop(part)


def _with(part: str, change: Any) -> Any:
    return lambda tensors: tensors.update({part: change(tensors[part]).contiguous()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without(BITS), "the files lack its bitmask or values"),
        (_without(VALUES), "the files lack its bitmask or values"),
        (_with(BITS, lambda bits: bits[:-1]), r"has 5 .*needs 6"),
        (_with(BITS, lambda bits: torch.cat([bits, bits[:1]])), r"has 7 .*needs 6"),
        (_with(BITS, lambda bits: bits.view(torch.int8)), "torch.int8"),
        (_with(VALUES, lambda values: values[None]), r"values of shape \(1, "),
    ],
    ids=["no bitmask", "no values", "short bitmask", "long bitmask", "signed bitmask", "values in two dimensions"],
)
def test_parts_that_are_absent_or_of_the_wrong_size_are_an_error_on_opening(
    change: Any, message: str, tmp_path: Path
) -> None:
    tensors = _by_numpy(NAME, _sparse((6, 7)))
    change(tensors)
    with pytest.raises(InputError, match=message) as error:
        CheckpointReader(_directory(tmp_path / "a", tensors), {NAME: Bitmask((6, 7))})
    assert NAME in str(error.value)


@pytest.mark.parametrize("change", [lambda values: values[:-1], lambda values: torch.cat([values, values[:1]])])
def test_fewer_or_more_values_than_set_bits_are_an_error_on_reading(change: Any, tmp_path: Path) -> None:
    tensor = _sparse((6, 7))
    kept = int((tensor != 0).sum())
    tensors = _by_numpy(NAME, tensor)
    tensors[VALUES] = change(tensors[VALUES])
    reader = CheckpointReader(_directory(tmp_path / "a", tensors), {NAME: Bitmask((6, 7))})
    with pytest.raises(InputError, match=rf"{NAME}.*keeps {kept} entries, and {len(tensors[VALUES])} values"):
        reader.read(NAME)


def test_a_bitmask_without_an_encoding_is_an_error_and_never_two_more_tensors(tmp_path: Path) -> None:
    directory = _directory(tmp_path / "a", _by_numpy(NAME, _sparse((6, 7))))
    for encodings in (None, {}, {"other.weight": Bitmask((6, 7))}):
        with pytest.raises(InputError, match=f"{NAME} is stored as a bitmask, and config.json has no encoding"):
            CheckpointReader(directory, encodings)


def test_an_encoding_without_any_tensor_is_an_error(tmp_path: Path) -> None:
    directory = _directory(tmp_path / "a", _by_numpy(NAME, _sparse((6, 7))))
    with pytest.raises(InputError, match=r"other\.weight is encoded"):
        CheckpointReader(directory, {NAME: Bitmask((6, 7)), "other.weight": Bitmask((2, 2))})


# --- what config.json and mpo.json say ----------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", [Bitmask((3, 4)), Bitmask((1, 2, 3, 4), "2:4")])
def test_an_encoding_comes_back_from_json(encoding: Encoding) -> None:
    assert encodings_from(json.loads(json.dumps({NAME: encoding.to_dict()}))) == {NAME: encoding}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"encoding": "zipped", "shape": [3, 4]}, r"stored as 'zipped' of shape \[3, 4\]"),
        ({"encoding": "bitmask", "shape": []}, "which this mpocli does not read"),
        ({"encoding": "bitmask", "shape": [3, 0]}, r"of shape \[3, 0\]"),
        ({"encoding": "bitmask", "shape": [3, -4]}, r"of shape \[3, -4\]"),
        ({"encoding": "bitmask", "shape": ["a", 4]}, "malformed"),
        ({"encoding": "bitmask", "shape": [float("inf"), 4]}, "malformed"),
        ({"encoding": "bitmask", "shape": 12}, "malformed"),
        ({"encoding": "bitmask"}, "malformed"),
        ({"shape": [3, 4]}, "malformed"),
        ("bitmask", "malformed"),
        (None, "malformed"),
    ],
    ids=str,
)
def test_an_encoding_that_cannot_be_read_is_an_error_that_names_the_tensor(entry: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        encodings_from({NAME: entry})
    assert NAME in str(error.value)


def test_encodings_that_are_no_object_are_an_error() -> None:
    with pytest.raises(InputError, match="are a list, a JSON object was expected"):
        encodings_from([NAME])


def _config(encodings: dict[str, Encoding]) -> dict[str, Any]:
    return {"quantization_config": Manifest(encodings=encodings).quantization_config()}


def test_encodings_are_read_from_the_config_alone_and_must_be_those_of_the_manifest(tmp_path: Path) -> None:
    here, other = {NAME: Bitmask((3, 4))}, {NAME: Bitmask((4, 3))}
    alone = read_manifest(tmp_path, _config(here))
    assert alone is not None and alone.encodings == here and alone.needs_plugin
    (tmp_path / "mpo.json").write_text(Manifest(encodings=here).dumps())
    both = read_manifest(tmp_path, _config(here))
    assert both is not None and both.encodings == here
    for config in ({}, _config({}), _config(other), _config({NAME: Bitmask((3, 4), "2:4")})):
        with pytest.raises(InputError, match=rf"disagree about how {NAME} is stored"):
            read_manifest(tmp_path, config)
    (tmp_path / "mpo.json").write_text(Manifest().dumps())
    with pytest.raises(InputError, match=rf"disagree about how {NAME} is stored"):
        read_manifest(tmp_path, _config(here))


def test_the_manifest_says_of_every_core_how_it_is_stored() -> None:
    from mpocli.io.module_entry import ModuleEntry

    spec = MPOSpec("linear", (4, 4), (2, 2), (2, 2), (1, 4, 1))
    manifest = Manifest(
        modules=(ModuleEntry("layer", "ffn", spec, "float32"),), encodings={"layer.core_0": Bitmask((1, 2, 2, 4))}
    )
    tensors = json.loads(manifest.dumps())["modules"][0]["tensors"]
    assert {name: tensor["encoding"] for name, tensor in tensors.items()} == {"core_0": "bitmask", "core_1": "dense"}


# --- what another encoding must not be ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows(RoundedEncoding):
    """Of all its parts the dtype is fixed."""

    dtype: str = "F32"
    beta: int = 1

    name = "rows"
    phrase = account = adjective = "rows"
    parts = (Part("_rows", "rows", "I8"), Part("_heights", "heights", "F16"))
    code_bits = 8

    def pack(self, tensor: Tensor) -> tuple[Tensor, ...]:
        heights = tensor.abs().amax(1) / 127
        return (tensor / heights[:, None]).round().to(torch.int8), heights.half()

    def unpack(self, *parts: Tensor) -> Tensor:
        return parts[0] * parts[1].float()[:, None]

    def nbytes(self, zeros: int, itemsize: int) -> int:
        return self.shape[0] * (self.shape[1] + 2)

    @property
    def layout(self) -> str:
        return "rows"

    def part_shapes(self) -> tuple[tuple[tuple[int, ...], str], ...]:
        return (self.shape, "I8"), (self.shape[:1], "F16")


class Read(Rows):
    """With what it takes to be read."""

    @classmethod
    def own_fields(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        return {"dtype": str(data["dtype"]), "beta": int(data["beta"])}


def test_an_encoding_whose_parts_have_all_their_dtype_says_the_tensors_in_a_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(known.KINDS, Read.name, Read)  # type: ignore[arg-type]
    tensor, encoding = _sparse((6, 7)), Read((6, 7), "BF16")
    reader = CheckpointReader(_directory(tmp_path / "a", encoding.encode(NAME, tensor)), {NAME: encoding})
    assert reader.specs[NAME] == TensorSpec(NAME, torch.bfloat16, (6, 7))
    assert encoding.in_dtype("F16") == replace(encoding, dtype="F16")
    assert encodings_from({NAME: replace(encoding, beta=3).to_dict()}) == {NAME: replace(encoding, beta=3)}
    without = type("Without", (Encoding,), {**vars(Rows), "misfit": RoundedEncoding.misfit})
    with pytest.raises(TypeError, match="Without: no part tells the tensor's dtype; make it a RoundedEncoding"):
        without.dense_dtype(without((6, 7)), reader.parts(NAME), DTYPES)


def test_a_field_that_nothing_would_read_is_an_error_before_it_is_lost() -> None:
    with pytest.raises(TypeError, match=r"Rows\.own_fields does not read beta, dtype, which would be lost"):
        Rows((6, 7)).to_dict()


def test_encodings_are_told_apart_by_their_words_and_by_what_parts_end_in() -> None:
    assert list(known.by_name([*known.ENCODINGS, Rows])) == [*known.KINDS, "rows"]
    with pytest.raises(TypeError, match="Read and Rows are both called 'rows'"):
        known.by_name([Rows, Read])
    for suffix in ("_values", "_more_values"):
        other = type("Other", (Rows,), {"name": "other", "parts": (Part(suffix, "values", "I8"),)})
        with pytest.raises(TypeError, match=f"'{suffix}' of Other ends like '_values' of Bitmask: choose another"):
            known.by_name([*known.ENCODINGS, other])
