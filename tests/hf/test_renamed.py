"""Checkpoints whose tensors transformers renames on loading: what is written of them loads and computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from models import LLAMA, VOCABULARY, llama, logits, prepared
from safetensors import safe_open
from sparse_checkpoints import pruning
from torch import Tensor
from transformers import conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, Transpose, WeightConverter, WeightRenaming

import mpocli  # noqa: F401
from mpocli.config.decompose import DecomposeConfig
from mpocli.config.expand_moe import ExpandConfig
from mpocli.config.merge import MergeConfig
from mpocli.config.quantize import QuantizeConfig
from mpocli.hf.artifact import Checkpoint
from mpocli.methods import merge
from mpocli.methods.decompose import run as decompose
from mpocli.methods.expand_moe import run as expand_moe
from mpocli.methods.quantize import run as quantize
from mpocli.methods.sparsify import run as sparsify

LAYERS = ("embedding", "attention", "ffn", "head")
# Rules that hold for a weight and not for what is called after it, and a key that does not end in `.weight`.
RULES = {r"^head\.weight": "lm_head.weight", r"\.mlp\.up_weight": ".mlp.up_proj.weight"}


@pytest.fixture
def old_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama whose files call its head and some feed-forward matrices otherwise."""
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # so that there is a table to add to
    rules = [WeightRenaming(source, target) for source, target in RULES.items()]
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llama", rules)
    llama(tmp_path / "dense", num_hidden_layers=1)
    assert {"head.weight", "model.layers.0.mlp.up_weight"} <= keys(tmp_path / "dense")
    return tmp_path


@pytest.fixture
def multimodal(tmp_path: Path) -> Path:
    """Gemma 3 with its vision tower, whose files call every tensor otherwise."""
    config = tf.Gemma3Config(
        text_config={**LLAMA, "num_hidden_layers": 1, "head_dim": 12},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=1,
        image_token_index=VOCABULARY - 1,
    )
    prepared(lambda: tf.Gemma3ForConditionalGeneration(config), tmp_path / "dense", torch.float32)
    assert "language_model.model.embed_tokens.weight" in keys(tmp_path / "dense")
    return tmp_path


def keys(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def outputs(path: Path, name: str) -> Tensor:
    """Of a directory, and the same of what `save_pretrained` makes of it."""
    found = []
    for directory in (path / name, path / f"{name}-again"):
        checkpoint = Checkpoint.open(str(directory))  # every tensor in the files is understood
        model = getattr(tf, checkpoint.architecture).from_pretrained(directory).eval()
        found.append(logits(model))
        model.save_pretrained(path / f"{name}-again")
    assert torch.equal(*found)
    return found[0]


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm() / b.norm()) < 1e-5


def _sparse(path: Path, source: str = "dense") -> tuple[Tensor, Tensor]:
    sparsify.run(str(path / source), pruning(0.5, layers=LAYERS), path / "sparse")
    sparsify.run(str(path / source), pruning(0.5, layers=LAYERS, storage="dense"), path / "zeros")
    merge.run(str(path / "sparse"), MergeConfig(), path / "merged")
    found = outputs(path, "sparse")
    assert close(outputs(path, "merged"), found)
    return found, outputs(path, "zeros")


def _sparse_cores(path: Path) -> tuple[Tensor, Tensor]:
    decompose.run(str(path / "dense"), DecomposeConfig(layers=LAYERS), path / "mpo")
    return _sparse(path, "mpo")


def _few_bits(path: Path) -> tuple[Tensor, Tensor]:
    """Dense weights, cores, and what a pruned core keeps."""
    decompose.run(str(path / "dense"), DecomposeConfig(layers=("attention", "ffn")), path / "mpo")
    sparsify.run(str(path / "mpo"), pruning(0.5, layers=("ffn",)), path / "sparse")
    quantize.run(str(path / "sparse"), QuantizeConfig(bits=3, layers=LAYERS), path / "few")
    merge.run(str(path / "few"), MergeConfig(), path / "merged")
    return outputs(path, "few"), outputs(path, "merged")


def _mpo(path: Path) -> tuple[Tensor, Tensor]:
    decompose.run(str(path / "dense"), DecomposeConfig(layers=LAYERS), path / "mpo")
    merge.run(str(path / "mpo"), MergeConfig(), path / "merged")
    assert keys(path / "merged") == keys(path / "dense")
    found = outputs(path, "mpo")
    assert close(outputs(path, "merged"), found)
    return found, outputs(path, "dense")


def _experts(path: Path) -> tuple[Tensor, Tensor]:
    expand_moe.run(str(path / "dense"), ExpandConfig(experts=2), path / "experts")
    merge.run(str(path / "experts"), MergeConfig(), path / "merged")
    found = outputs(path, "experts")
    assert close(outputs(path, "merged"), found)
    return found, outputs(path, "dense")


@pytest.mark.parametrize("model", ["old_names", "multimodal"])
@pytest.mark.parametrize("verb", [_sparse, _sparse_cores, _few_bits, _mpo, _experts])
def test_a_checkpoint_whose_tensors_are_renamed_on_loading_loads_and_computes_the_same(
    model: str, verb: Callable[[Path], tuple[Tensor, Tensor]], request: pytest.FixtureRequest
) -> None:
    found, expected = verb(request.getfixturevalue(model))
    assert close(found, expected)


def test_a_weight_that_loading_makes_of_other_tensors_is_kept_for_a_reason_that_is_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    halves = ["o_a.weight", "o_b.weight"]
    rules = [
        WeightConverter("kv.weight", ["k_proj.weight", "v_proj.weight"], operations=[Chunk(dim=0)]),
        WeightConverter(halves, "o_proj.weight", operations=[Concatenate(dim=0)]),
        WeightConverter("q_turned.weight", "q_proj.weight", operations=[Transpose(0, 1)]),
    ]
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llama", rules)
    model = llama(tmp_path / "dense", num_hidden_layers=1)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    report = decompose.run(str(tmp_path / "dense"), DecomposeConfig(layers=LAYERS), tmp_path / "mpo")
    reasons = {module.name.rpartition(".")[2]: module.reason for module in report.modules}
    assert "one tensor with others" in reasons["k_proj"] and reasons["v_proj"] == reasons["k_proj"]
    assert "several tensors" in reasons["o_proj"] and "another form" in reasons["q_proj"]
    assert "does not store it" in reasons["score"] and reasons["up_proj"] == ""
    merge.run(str(tmp_path / "mpo"), MergeConfig(), tmp_path / "merged")
    assert keys(tmp_path / "merged") == keys(tmp_path / "dense")
    for name in ("mpo", "merged"):
        assert close(logits(tf.LlamaForCausalLM.from_pretrained(tmp_path / name).eval()), logits(model))
