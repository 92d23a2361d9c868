"""`keep_packed`: a rounded checkpoint stays packed in memory, computes the same, and is saved as the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

import mpocli
from mpocli.config.decompose import DecomposeConfig
from mpocli.config.quantize import QuantizeConfig
from mpocli.io.encodings.quantised import Quantised
from mpocli.methods.decompose import run as decompose
from mpocli.methods.quantize import run as quantize
from mpocli.nn.packed import PackedTensor, packed_names, resident_bytes

IDS = torch.arange(2, 26).view(2, 12)
FEW = DecomposeConfig(sites=3, trunc=12, when_larger="decompose")
# How each is made: its family, the class it loads as, whether as cores, and how it is rounded.
CASES: dict[str, tuple[Callable[[Path], Any], Any, bool, QuantizeConfig]] = {
    "GPT-2, tied table": (
        lambda place: models.gpt2(place, n_layer=1),
        tf.AutoModelForCausalLM,
        False,
        QuantizeConfig(bits=4, group=16),
    ),
    "T5, cores of 3 bits": (
        lambda place: models.t5(place, num_layers=1, num_decoder_layers=1),
        tf.AutoModelForSeq2SeqLM,
        True,
        QuantizeConfig(bits=3, group=8),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The class and the directory of a rounded checkpoint."""
    make, cls, as_cores, config = CASES[request.param]
    home = tmp_path_factory.mktemp("packed")
    make(home / "dense")
    source = home / "dense"
    if as_cores:
        source = home / "cores"
        decompose.run(str(home / "dense"), FEW, source)
    quantize.run(str(source), config, home / "rounded")
    return cls, home / "rounded"


def both(case: tuple[Any, Path], **options: Any) -> tuple[Any, Any]:
    """The model unpacked once, and packed."""
    cls, directory = case
    fast = cls.from_pretrained(directory, **options).eval()
    with mpocli.keep_packed():
        return fast, cls.from_pretrained(directory, **options).eval()


def logits(model: Any) -> Tensor:
    more = {"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {}
    found: Tensor = model(input_ids=IDS, **more).logits
    return found


def test_logits_and_gradients_are_those_of_the_unpacked_model(case: tuple[Any, Path]) -> None:
    fast, lean = both(case)
    assert not packed_names(fast) and packed_names(lean)
    assert all(type(p) is not PackedTensor for name, p in lean.named_parameters() if name not in packed_names(lean))
    assert fast.num_parameters() == lean.num_parameters()
    results = [logits(model) for model in (fast, lean)]
    assert torch.equal(*results)
    for result in results:
        result.square().sum().backward()
    pairs = [(p.grad, q.grad) for p, q in zip(fast.parameters(), lean.parameters(), strict=True)]
    assert sum(a is not None for a, _ in pairs) >= 5
    for a, b in pairs:
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


def test_memory_holds_the_codes_alone(case: tuple[Any, Path]) -> None:
    fast, lean = both(case)
    packed = [lean.get_parameter(name) for name in packed_names(lean)]
    saved = resident_bytes(fast) - resident_bytes(lean)
    assert saved == sum(4 * p.numel() - p.packed_bytes for p in packed)
    assert sum(p.packed_bytes for p in packed) <= 0.25 * sum(4 * p.numel() for p in packed)


def test_saving_gives_the_same_bytes_back(case: tuple[Any, Path], tmp_path: Path) -> None:
    fast, lean = both(case)
    for name, model in (("fast", fast), ("lean", lean)):
        model.save_pretrained(tmp_path / name)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("fast", "lean")]
    assert files[0] == files[1]
    before, after = (load_file(place / "model.safetensors") for place in (case[1], tmp_path / "lean"))
    codes = [name for name in before if name.endswith(("_codes", "_scales", "_offsets"))]
    assert before.keys() == after.keys() and codes
    assert all(torch.equal(before[name], after[name]) for name in codes)


def test_bfloat16_rounds_the_same_values(case: tuple[Any, Path], tmp_path: Path) -> None:
    fast, lean = both(case, dtype=torch.bfloat16)
    assert lean.get_parameter(packed_names(lean)[0]).dtype == torch.bfloat16
    assert torch.equal(logits(fast), logits(lean))
    for name, model in (("fast", fast), ("lean", lean)):
        model.save_pretrained(tmp_path / name)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("fast", "lean")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0] | files[1])
    encodings = json.loads((tmp_path / "lean" / "config.json").read_text())["quantization_config"]["encodings"]
    assert {entry["dtype"] for entry in encodings.values()} == {"BF16"}


def test_it_can_be_made_an_ordinary_model(case: tuple[Any, Path]) -> None:
    for model in both(case):
        before = logits(model)
        model.dequantize()
        assert not packed_names(model) and all(p.requires_grad for p in model.parameters())
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_a_vocabulary_grows_and_the_rest_stays_packed(case: tuple[Any, Path], tmp_path: Path) -> None:
    for model in both(case):
        model.resize_token_embeddings(models.VOCABULARY + 9, mean_resizing=False)
        assert logits(model).shape[-1] == models.VOCABULARY + 9
        model.save_pretrained(tmp_path)
        assert case[0].from_pretrained(tmp_path).get_input_embeddings().weight.shape[0] == models.VOCABULARY + 9
    assert packed_names(model)


def test_states_are_loaded_into_it(case: tuple[Any, Path]) -> None:
    fast, lean = both(case)
    lean.load_state_dict(lean.state_dict())
    lean.load_state_dict(fast.state_dict())  # the same values
    files = load_file(case[1] / "model.safetensors")
    name = packed_names(lean)[0]
    parts = Quantised.part_names(name)
    before = lean.get_parameter(name).unpacked()
    state = {part: files[part] for part in parts}
    state |= {part: state[part] * 2 for part in parts[1:]}  # other scales and offsets: other values
    lean.load_state_dict(state, strict=False)
    assert torch.equal(lean.get_parameter(name).unpacked(), 2 * before)
    assert packed_names(lean)[0] == name
