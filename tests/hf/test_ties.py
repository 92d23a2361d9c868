"""Weights that two modules share, or only say so, survive every way through decompose and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from families import FAMILIES, VOCABULARY, logits, make
from safetensors.torch import load_file, save_file

from mpocli.config.decompose import DecomposeConfig
from mpocli.config.merge import MergeConfig
from mpocli.hf.artifact import Checkpoint
from mpocli.methods import merge
from mpocli.methods.decompose import run as decompose
from mpocli.methods.inspect import run as inspect
from mpocli.nn import MPOEmbedding, MPOLinear, MPOModule

LOSSLESS = DecomposeConfig(layers=("embedding", "attention", "ffn", "pooler", "head"))
BODY = DecomposeConfig(trunc=6, when_larger="decompose")
IDS = torch.arange(5, 15)[None]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


@pytest.fixture
def untied_by_files(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A GPT-2 whose configuration says tied and whose files hold two different matrices, and its logits."""
    make("gpt2", tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    table = tensors["transformer.wte.weight"]
    tensors["lm_head.weight"] = torch.randn(table.shape, generator=torch.Generator().manual_seed(3))
    save_file(tensors, file, metadata={"format": "pt"})
    model = tf.GPT2LMHeadModel.from_pretrained(tmp_path / "dense").eval()
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    return tmp_path / "dense", logits(model)


def test_declared_tied_and_stored_apart_stays_apart_everywhere(untied_by_files, tmp_path: Path) -> None:
    dense, expected = untied_by_files
    report = decompose.run(str(dense), LOSSLESS, tmp_path / "mpo")
    names = {module.name: module for module in report.modules}
    assert not names["transformer.wte"].tied
    assert names["lm_head"].action == "mpo"
    parameters = sum(tensor.numel() for name, tensor in load_file(dense / "model.safetensors").items())
    assert report.totals.dense_params == parameters
    loaded = tf.GPT2LMHeadModel.from_pretrained(tmp_path / "mpo").eval()
    assert close(logits(loaded), expected)
    merge.run(str(tmp_path / "mpo"), MergeConfig(), tmp_path / "merged")
    assert close(logits(tf.GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()), expected)
    loaded.dequantize()
    assert close(logits(loaded), expected)


def test_only_the_table_of_a_pair_stored_apart_can_be_decomposed(untied_by_files, tmp_path: Path) -> None:
    dense, expected = untied_by_files
    decompose.run(str(dense), DecomposeConfig(layers=("embedding",)), tmp_path / "mpo")
    loaded = tf.GPT2LMHeadModel.from_pretrained(tmp_path / "mpo").eval()
    assert isinstance(loaded.transformer.wte, MPOEmbedding)
    assert not isinstance(loaded.lm_head, MPOModule)
    assert close(logits(loaded), expected)


def test_a_body_decomposed_alone_gives_its_table_to_the_head_of_another_class(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = FAMILIES["gpt2"]().eval()
    whole.save_pretrained(tmp_path / "whole")
    whole.transformer.save_pretrained(tmp_path / "body")
    decompose.run(str(tmp_path / "body"), LOSSLESS, tmp_path / "mpo")
    loaded = tf.GPT2LMHeadModel.from_pretrained(tmp_path / "mpo").eval()
    assert isinstance(loaded.lm_head, MPOLinear)
    assert loaded.lm_head.cores[0] is loaded.transformer.wte.cores[0]
    assert close(logits(loaded), logits(whole))
    loaded.save_pretrained(tmp_path / "again")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(again), logits(loaded))


def test_a_whole_model_saved_as_its_body_comes_back_whole(tmp_path: Path) -> None:
    make("bert-masked-lm", tmp_path / "dense")
    decompose.run(str(tmp_path / "dense"), BODY, tmp_path / "mpo")
    whole = tf.BertForMaskedLM.from_pretrained(tmp_path / "mpo").eval()
    body = tf.AutoModel.from_pretrained(tmp_path / "mpo")
    body.save_pretrained(tmp_path / "body")
    back = tf.BertForMaskedLM.from_pretrained(tmp_path / "body").eval()
    head = back.get_output_embeddings()
    assert isinstance(head, MPOLinear)
    assert head.cores[0] is back.get_input_embeddings().cores[0]
    with torch.no_grad():
        assert torch.equal(back.bert(IDS)[0], whole.bert(IDS)[0])


@pytest.mark.parametrize("scale", [True, False])
def test_bart_s_own_embedding_class_is_decomposed_at_scale_one_too(scale: bool, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = FAMILIES["bart"]().config
        config.scale_embedding = scale
        dense = tf.BartForConditionalGeneration(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    report = decompose.run(str(tmp_path / "dense"), LOSSLESS, tmp_path / "mpo")
    assert {module.action for module in report.modules if module.role == "embedding"} == {"mpo"}
    loaded = tf.BartForConditionalGeneration.from_pretrained(tmp_path / "mpo").eval()
    assert close(logits(loaded), logits(dense))
    loaded.dequantize()
    assert type(loaded.model.encoder.embed_tokens) is type(dense.model.encoder.embed_tokens)
    assert close(logits(loaded), logits(dense))


def test_gemma_s_scale_is_rounded_as_its_own_class_rounds_it(tmp_path: Path) -> None:
    make("gemma3", tmp_path / "dense", dtype=torch.bfloat16)
    decompose.run(str(tmp_path / "dense"), DecomposeConfig(layers=("embedding",)), tmp_path / "mpo")
    merge.run(str(tmp_path / "mpo"), MergeConfig(), tmp_path / "merged")
    mpo, dense = (tf.AutoModelForCausalLM.from_pretrained(tmp_path / d, dtype="auto") for d in ("mpo", "merged"))
    factor = float(mpo.get_input_embeddings().scale)
    assert factor != float(torch.tensor(factor, dtype=torch.bfloat16))  # or rounding it would not show
    with torch.no_grad():
        ours, theirs = mpo.get_input_embeddings()(IDS), dense.get_input_embeddings()(IDS)
    assert float((ours - theirs).abs().max()) <= torch.finfo(torch.bfloat16).eps * float(theirs.abs().max())


# --- what is no matrix of ours, or is read past its module -----------------------------------------------------------


def test_a_weight_that_a_forward_pass_reads_directly_stays_dense_and_says_why(tmp_path: Path) -> None:
    config = tf.MobileBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        embedding_size=16,
        intra_bottleneck_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_feedforward_networks=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = tf.MobileBertForMaskedLM(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    report = decompose.run(str(tmp_path / "dense"), LOSSLESS, tmp_path / "mpo")
    kept = {module.name: module.reason for module in report.modules if module.action == "kept"}
    assert any("reads its weight directly" in reason for reason in kept.values())
    loaded = tf.MobileBertForMaskedLM.from_pretrained(tmp_path / "mpo").eval()
    assert any(isinstance(module, MPOModule) for module in loaded.modules())
    with torch.no_grad():
        assert close(loaded(IDS)[0], dense(IDS)[0])


def test_fused_experts_are_named_apart_and_counted_in_their_stored_dtype(tmp_path: Path) -> None:
    config = tf.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tf.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    survey = Checkpoint.open(str(tmp_path / "dense")).survey
    experts = [weight for weight in survey.weights if "experts" in weight.name]
    assert {weight.role for weight in experts} == {"ffn"}
    assert len({weight.name for weight in experts}) == len(experts) == 2
    assert all("fused" in weight.obstacle for weight in experts)
    assert survey.dense_bytes == 2 * survey.dense_params


def test_buffers_keep_their_bytes_and_may_be_infinite(tmp_path: Path) -> None:
    make("gpt2", tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    mask = torch.tensor(-float("inf"), dtype=torch.float16)
    save_file({**load_file(file), "transformer.h.0.attn.masked_bias": mask}, file, metadata={"format": "pt"})
    decompose.run(str(tmp_path / "dense"), DecomposeConfig(trunc=8, dtype="bfloat16"), tmp_path / "mpo")
    merge.run(str(tmp_path / "mpo"), MergeConfig(dtype="float32"), tmp_path / "merged")
    for step in ("mpo", "merged"):
        kept = load_file(tmp_path / step / "model.safetensors")["transformer.h.0.attn.masked_bias"]
        assert kept.dtype == torch.float16
        assert torch.equal(kept, mask)


# --- manifests that no longer hold -----------------------------------------------------------------------------------


def test_weights_that_a_user_saved_over_take_the_measured_errors_away(tmp_path: Path) -> None:
    make("bert", tmp_path / "dense")
    decompose.run(str(tmp_path / "dense"), BODY, tmp_path / "mpo")
    model = tf.BertModel.from_pretrained(tmp_path / "mpo")
    with torch.no_grad():
        model.pooler.dense.core_0.mul_(2)
    model.save_pretrained(tmp_path / "mpo")
    report = inspect.run(str(tmp_path / "mpo"), verify=True)
    assert {view.relative_error for view in report.modules if view.action == "mpo"} == {None}
    assert any("model.safetensors" in problem for problem in report.problems or ())


def test_a_copied_or_downloaded_directory_keeps_its_measurements(tmp_path: Path) -> None:
    make("bert", tmp_path / "dense")
    decompose.run(str(tmp_path / "dense"), BODY, tmp_path / "mpo")
    shutil.copytree(tmp_path / "mpo", tmp_path / "copy", copy_function=shutil.copyfile)
    (tmp_path / "copy" / "model.safetensors").touch()
    report = inspect.run(str(tmp_path / "copy"), verify=True, base=str(tmp_path / "dense"))
    assert report.problems == ()
    assert None not in {view.relative_error for view in report.modules}


def test_an_error_can_be_verified_against_any_input_of_the_chain(tmp_path: Path) -> None:
    make("bert", tmp_path / "dense")
    decompose.run(str(tmp_path / "dense"), DecomposeConfig(trunc=6, layers=("ffn",)), tmp_path / "one")
    decompose.run(str(tmp_path / "one"), DecomposeConfig(trunc=6, layers=("embedding",)), tmp_path / "two")
    assert inspect.run(str(tmp_path / "two"), verify=True, base=str(tmp_path / "dense")).problems == ()
    make("bert-classifier", tmp_path / "other")
    problems = inspect.run(str(tmp_path / "two"), verify=True, base=str(tmp_path / "other")).problems
    assert problems and "other weights" in problems[0]


def test_merge_to_another_dtype_counts_the_dense_bytes_in_it(tmp_path: Path) -> None:
    make("bert", tmp_path / "dense")
    decompose.run(str(tmp_path / "dense"), BODY, tmp_path / "mpo")
    report = merge.run(str(tmp_path / "mpo"), MergeConfig(dtype="float16"), tmp_path / "merged")
    assert report.totals.dense_bytes == 2 * report.totals.dense_params
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float16"


def test_folders_of_a_read_only_store_become_ordinary_ones(tmp_path: Path) -> None:
    make("bert", tmp_path / "dense")
    pooling = tmp_path / "dense" / "1_Pooling"
    pooling.mkdir()
    (pooling / "config.json").write_text("{}")
    pooling.chmod(0o555)
    try:
        decompose.run(str(tmp_path / "dense"), BODY, tmp_path / "mpo")
    finally:
        pooling.chmod(0o755)
    assert (tmp_path / "mpo" / "1_Pooling" / "config.json").stat().st_mode & 0o200
    assert (tmp_path / "mpo" / "1_Pooling").stat().st_mode & 0o200
