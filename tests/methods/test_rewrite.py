"""A verb is what it makes of a weight, and an encoding its own file: both are tried here with ones of these tests."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import models
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

from mpocli.config.decompose import DecomposeConfig
from mpocli.config.merge import MergeConfig
from mpocli.errors import InputError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.weight import Weight
from mpocli.io.encodings import known
from mpocli.io.encodings.base import D, Encoding, Part
from mpocli.io.manifest import Manifest
from mpocli.io.tensor_spec import TensorSpec
from mpocli.io.totals import Totals
from mpocli.methods import merge
from mpocli.methods.decompose import run as decompose
from mpocli.methods.inspect import run as inspect
from mpocli.methods.rewrite import Rewriting, Stored, as_stored

MOST = 5 * 10**9
FEW = DecomposeConfig(trunc=6, when_larger="decompose", layers=("embedding", "attention"))


@dataclass(frozen=True)
class Int8(Encoding):
    """Row r is scales[r]·codes[r], codes within ±127."""

    name = "int8"
    phrase = "eight bits"
    account = "eight bits an entry and one scale a row"
    adjective = "eight-bit"
    parts = (Part("_whole", "whole numbers", "I8"), Part("_factors", "factors"))
    code_bits = 8

    def pack(self, tensor: Tensor) -> tuple[Tensor, ...]:
        rows = tensor.reshape(len(tensor), -1)
        scales = rows.abs().amax(1) / 127
        return (rows / scales[:, None]).round().reshape(tensor.shape).to(torch.int8), scales

    def unpack(self, *parts: Tensor) -> Tensor:
        codes, scales = parts
        return codes.to(scales.dtype) * scales.reshape(-1, *(1 for _ in self.shape[1:]))

    def nbytes(self, zeros: int, itemsize: int) -> int:
        return math.prod(self.shape) + self.shape[0] * itemsize

    def misfit(self, name: str, parts: Sequence[TensorSpec[D]], dtypes: Mapping[str, D]) -> str:
        return "" if [part.shape for part in parts] == [self.shape, self.shape[:1]] else f"{name}: wrong parts"


def _write(rewriting: Rewriting, out: Path, most: int = MOST) -> tuple[Manifest, Totals]:
    out.mkdir()
    return rewriting.write(out, "test", {}, 0, most)


def _stored(directory: Path) -> dict[str, Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def _quantised(checkpoint: Checkpoint, **options: bool) -> Rewriting:
    def quantised(weight: Weight) -> Stored:
        before = as_stored(checkpoint.reader, weight)
        encodings: dict[str, Encoding] = {leaf: Int8(tuple(t.shape)) for leaf, t in before.tensors.items()}
        return Stored(before.tensors, weight.entry.unmeasured() if weight.entry else None, encodings)

    weights = [weight for weight in checkpoint.survey.weights if weight.role and not weight.obstacle]
    return Rewriting(checkpoint, weights, quantised, **options)


# --- a verb -------------------------------------------------------------------------------------------------------


def test_what_no_verb_touches_comes_out_bit_for_bit_and_each_weight_is_asked_about_once(tmp_path: Path) -> None:
    models.t5(tmp_path / "dense")
    decompose.run(str(tmp_path / "dense"), FEW, tmp_path / "mpo")
    checkpoint = Checkpoint.open(str(tmp_path / "mpo"))
    asked: list[str] = []

    def left(weight: Weight) -> None:
        asked.append(weight.name)

    weights = checkpoint.survey.weights
    _write(Rewriting(checkpoint, weights, left), tmp_path / "again")
    assert sorted(asked) == sorted(weight.name for weight in weights) and len(set(asked)) == len(asked) > 10
    before, after = _stored(tmp_path / "mpo"), _stored(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert inspect.run(str(tmp_path / "again"), verify=True).problems == ()


@pytest.mark.parametrize("most", [MOST, 20_000])
def test_a_dry_run_says_the_exact_bytes_without_reading_a_value(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.gpt2(tmp_path / "dense")
    checkpoint = Checkpoint.open(str(tmp_path / "dense"))

    def halved(weight: Weight) -> Stored:
        if foretold:
            return Stored({"weight": torch.empty(weight.shape[::-1], dtype=torch.float16, device="meta")})
        return Stored({leaf: t.half() for leaf, t in as_stored(checkpoint.reader, weight).tensors.items()})

    weights = [weight for weight in checkpoint.survey.weights if weight.kind == "conv1d"]
    foretold = True
    with monkeypatch.context() as patch:
        patch.setattr(type(checkpoint.reader), "read", lambda *_: pytest.fail("a value was read"))
        structure, totals = Rewriting(checkpoint, weights, halved, reads=False).dry_run(most)
    foretold = False
    written, found = _write(Rewriting(checkpoint, weights, halved), tmp_path / "half", most)
    files = list((tmp_path / "half").glob("*.safetensors"))
    assert totals == found and totals.bytes == sum(file.stat().st_size for file in files)
    assert (len(files) > 1) == (most < MOST) and structure.quantization_config() == written.quantization_config()
    assert sum(t.dtype == torch.float16 for t in _stored(tmp_path / "half").values()) == len(weights) == 8


def test_what_stays_is_checked_and_converted_where_that_is_asked_and_a_mask_is_not(tmp_path: Path) -> None:
    model = models.gpt2(tmp_path / "dense")
    norm = model.transformer.ln_f.weight
    with torch.no_grad():
        norm[3] = math.inf
    model.save_pretrained(tmp_path / "broken")
    checkpoint = Checkpoint.open(str(tmp_path / "broken"))
    _write(Rewriting(checkpoint, (), lambda weight: None), tmp_path / "as it was")
    for number, options in enumerate(({"checks": True}, {"dtype": "bfloat16"})):
        with pytest.raises(InputError, match=r"transformer\.ln_f\.weight: 1 of 48 elements are NaN or infinite"):
            _write(Rewriting(checkpoint, (), lambda weight: None, **options), tmp_path / str(number))
    sound = Checkpoint.open(str(tmp_path / "dense"))
    _write(Rewriting(sound, (), lambda weight: None, dtype="bfloat16"), tmp_path / "bf16")
    assert {t.dtype for t in _stored(tmp_path / "bf16").values()} == {torch.bfloat16}


# --- an encoding --------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(known.KINDS, Int8.name, Int8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "cls"), [(models.gpt2, tf.GPT2LMHeadModel), (models.bert_classifier, tf.BertForSequenceClassification)]
)
def test_another_encoding_is_loaded_saved_inspected_and_merged(
    make: Callable[[Path], tf.PreTrainedModel], cls: type[tf.PreTrainedModel], tmp_path: Path
) -> None:
    dense = make(tmp_path / "dense")
    checkpoint = Checkpoint.open(str(tmp_path / "dense"))
    rewriting = _quantised(checkpoint)
    _write(rewriting, tmp_path / "int8")
    tensors, expected = _stored(tmp_path / "int8"), dense.state_dict()
    names = [f"{weight.name}.weight" for weight in rewriting.weights]
    for name in names:
        codes, scales = tensors[f"{name}_whole"], tensors[f"{name}_factors"]
        assert codes.dtype == torch.int8 and scales.shape == (len(codes),) and tensors[name].tolist() == [0.0]
        assert (codes * scales[:, None] - expected[name]).abs().max() <= scales.max() / 2 * 1.001
    assert f"{len(names)} tensors are stored as {Int8.account}." in (tmp_path / "int8" / "README.md").read_text()

    found = inspect.run(str(tmp_path / "int8"), verify=True)
    assert found.problems == () and found.sparsity is None
    views = {view.name: view for view in found.modules}
    for weight in rewriting.weights:
        stored_rows = expected[f"{weight.name}.weight"].shape[0]
        assert views[weight.name].bytes == weight.dense_params + 4 * stored_rows

    model = cls.from_pretrained(tmp_path / "int8").eval()
    model.save_pretrained(tmp_path / "saved")
    merge.run(str(tmp_path / "saved"), MergeConfig(), tmp_path / "merged")
    logits = models.logits(model)
    assert 0 < (logits - models.logits(dense)).norm() / logits.norm() < 0.05
    assert torch.equal(models.logits(cls.from_pretrained(tmp_path / "merged").eval()), logits)
    assert not any("_whole" in name for name in _stored(tmp_path / "merged"))
    encodings = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]["encodings"]
    assert {entry["encoding"] for entry in encodings.values()} == {"int8"} and len(encodings) == len(names)


def test_another_encoding_stands_beside_cores_and_its_bytes_are_foretold(tmp_path: Path) -> None:
    models.t5(tmp_path / "dense")
    decompose.run(str(tmp_path / "dense"), FEW, tmp_path / "mpo")
    checkpoint = Checkpoint.open(str(tmp_path / "mpo"))
    _, foretold = _quantised(checkpoint).dry_run(MOST)
    manifest, totals = _write(_quantised(checkpoint), tmp_path / "int8")
    assert foretold == totals and {name.rpartition(".")[2] for name in manifest.encodings} >= {"weight", "core_2"}
    assert inspect.run(str(tmp_path / "int8"), verify=True).problems == ()
    config = DecomposeConfig(trunc=4, when_larger="decompose", layers=("attention", "ffn"))
    report = decompose.run(str(tmp_path / "int8"), config, tmp_path / "again")  # both: what is and what is no MPO
    assert report.filled == 0 and {module.action for module in report.modules if module.role == "ffn"} == {"mpo"}
    foretold_again = decompose.run(str(tmp_path / "int8"), config, tmp_path / "none", dry_run=True)
    assert foretold_again.totals == report.totals
    assert inspect.run(str(tmp_path / "again"), verify=True).problems == ()


def test_files_of_another_encoding_than_config_json_says_are_refused(tmp_path: Path) -> None:
    models.bert_classifier(tmp_path / "dense")
    _write(_quantised(Checkpoint.open(str(tmp_path / "dense"))), tmp_path / "int8")
    for file in ("config.json", "mpo.json"):
        text = (tmp_path / "int8" / file).read_text()
        (tmp_path / "int8" / file).write_text(text.replace('"encoding": "int8"', '"encoding": "bitmask"'))
    with pytest.raises(InputError, match=r"is stored as eight bits, and config\.json has no encoding for it"):
        Checkpoint.open(str(tmp_path / "int8"))
