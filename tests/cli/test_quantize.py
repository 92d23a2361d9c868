"""`mpocli quantize`: what it writes, tells and refuses, and what every other command makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

from cli import tasks
from cli.shell import WEIGHTS, Cli, refused, rewrite, succeeded
from mpocli.config.decompose import DecomposeConfig
from mpocli.config.sparsify import SparsifyConfig
from mpocli.errors import InputError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.surroundings import write_trained
from mpocli.methods.decompose import run as decompose
from mpocli.methods.sparsify import run as sparsify
from mpocli.nn import MPOModule

Run = Callable[..., dict[str, Any]]
ALL = ("--layers", "embedding,attention,ffn,pooler,head")
PARTS = ("_codes", "_scales", "_offsets", "_kept", "_levels", "_steps", "_starts")


@pytest.fixture
def few(cli: Cli, work: Path) -> Run:
    """Quantize a model to `out` in the working directory; the report."""

    def run(source: Path, out: str, *more: object) -> dict[str, Any]:
        return succeeded(cli("quantize", source, "--json", "-o", out, *more)).json

    return run


@pytest.fixture(scope="module")
def sparse(gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sparse") / "sparse"
    sparsify.run(str(gpt2), SparsifyConfig(method="magnitude", sparsity=0.6), out)
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with a tokenizer and a text, an MPO of it whose gauge is not known, and one that is padded pairs."""
    home = tmp_path_factory.mktemp("text")
    tasks.save("gpt2", home / "gpt2")
    tasks.prose(home / "text.txt", 40, 1)
    decompose.run(str(home / "gpt2"), DecomposeConfig(trunc=8), home / "mpo")
    (home / "trained").mkdir()
    model = tf.GPT2LMHeadModel.from_pretrained(home / "mpo")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MPOModule):  # the same matrices in another gauge
                module.cores[0].mul_(8.0)
                module.cores[4].div_(8.0)
    source = Checkpoint.open(str(home / "mpo"))
    write_trained(home / "trained", model, source, "finetune", {}, seed=0, metrics={})
    return home


def _stored(directory: Path) -> dict[str, Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def _looking(home: Path) -> list[object]:
    return ["--calibrate", home / "text.txt", "--seq-len", 16, "--samples", 8]


@torch.no_grad()
def _divergence(home: Path, directory: str | Path, from_: str = "gpt2") -> float:
    """Of the predictions on tokens that nobody was calibrated on, from those of another model."""
    ids = torch.randint(6, 50, (8, 24), generator=torch.Generator().manual_seed(3))
    wide, made = (
        tf.GPT2LMHeadModel.from_pretrained(place).eval()(ids).logits.log_softmax(-1)
        for place in (home / from_, directory)
    )
    return float((wide.exp() * (wide - made)).sum(-1).mean())


# --- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["bert", "bert_mpo", "sparse"])
def test_the_told_bytes_are_those_of_the_files_and_every_claim_holds(
    model: str, few: Run, cli: Cli, work: Path, request: pytest.FixtureRequest
) -> None:
    report = few(request.getfixturevalue(model), "out", "--bits", 3, *ALL, "--max-shard-size", "20KB")
    assert len(list((work / "out").glob("*.safetensors"))) > 1
    stored = _stored(work / "out")
    encodings = json.loads((work / "out" / "config.json").read_text())["quantization_config"]["encodings"]
    packed = 0
    for weight in report["weights"]:
        parts = [n for n in stored if n.startswith(f"{weight['name']}.") and stored[n].shape != (1,)]
        own = [n for n in parts if n.endswith(PARTS) or n.rpartition(".")[2].startswith("core_")]
        assert weight["bytes"] == sum(stored[n].nbytes for n in own) < weight["dense_bytes"]
        packed += sum(stored[n].nbytes for n in own if n.endswith(PARTS))
        assert 0 < weight["error"] < 0.5
    assert len(encodings) == sum(weight["tensors"] for weight in report["weights"])
    entries = sum(torch.Size(one["shape"]).numel() for one in encodings.values())
    assert report["bits_stored"] == pytest.approx(8 * packed / entries)
    size = sum(file.stat().st_size for file in (work / "out").glob("*.safetensors"))
    assert report["totals"]["bytes"] == size < report["before"]["bytes"]
    assert "no mismatch" in succeeded(cli("inspect", "out", "--verify")).out
    shown = succeeded(cli("inspect", "out", "--json")).json
    told = {weight["name"]: weight["bytes"] for weight in report["weights"]}
    assert {view["name"]: view["bytes"] for view in shown["modules"] if view["bits"] is not None} == told
    assert all(view["bits"] < 32 for view in shown["modules"] if view["bits"] is not None)


def test_a_table_tied_to_a_head_is_stored_once_and_stays_tied(masked_lm: Path, few: Run, work: Path) -> None:
    few(masked_lm, "out", *ALL)
    tables = [name for name, tensor in _stored(work / "out").items() if len(tensor) == 211]
    assert sorted(name.rpartition("_")[2] for name in tables if "word" in name) == ["codes", "offsets", "scales"]
    assert not any("decoder" in name for name in tables)
    model = tf.BertForMaskedLM.from_pretrained(work / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_table_says_what_was_rounded_and_why_the_rest_was_not(bert: Path, cli: Cli, work: Path) -> None:
    out = succeeded(cli("quantize", bert, "-o", "out", "--bits", 8, "--group", 1, *ALL)).out
    assert "kept dense" not in out and out.count("would be no smaller") == 0
    # At 8 bits with a scale an entry, float32 is still larger; bfloat16 is not.
    narrow = tf.BertForMaskedLM(
        tf.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    )
    narrow.to(torch.bfloat16).save_pretrained(work / "narrow")
    refused(cli("quantize", "narrow", "-o", "no", "--bits", 8, "--group", 1), 3, "nothing to round", "no smaller")
    again = refused(cli("quantize", "out", "-o", "no", *ALL), 3, "nothing to round", "packed codes already")
    assert again.count("\n") == 2


def test_inspect_has_a_column_of_bits_where_something_is_in_few(bert: Path, bert_mpo: Path, few: Run, cli: Cli) -> None:
    few(bert_mpo, "out", "--group", 0)
    for way in ([], ["--module", "*"]):
        assert "bits" in succeeded(cli("inspect", "out", *way)).out
    assert "bits" not in succeeded(cli("inspect", bert)).out
    plain = succeeded(cli("inspect", bert, "--json")).json["modules"]
    assert all(view["bits"] is None for view in plain)


def test_merge_and_the_card_call_the_encodings_by_their_names(sparse: Path, few: Run, cli: Cli, work: Path) -> None:
    few(sparse, "out", "--bits", 3)
    card = (work / "out" / "README.md").read_text()
    assert "sparse, in 3 bits" in card and "- 3-bit" in card and "- sparse" in card and "- quantized" in card
    out = succeeded(cli("merge", "out", "-o", "merged")).out
    assert "tensors as packed codes" in out and "tensors as bitmask and packed codes" in out
    few(work / "merged", "again")
    card = (work / "again" / "README.md").read_text()
    assert ", in 4 bits" in card and "sparse" not in card.partition("Made by")[0]
    assert "tensors as bitmask" not in succeeded(cli("merge", "again", "-o", "merged-again")).out


def test_rounding_pruning_and_rounding_again_is_one_chain(gpt2: Path, few: Run, cli: Cli, work: Path) -> None:
    few(gpt2, "few", "--bits", 8)
    made = succeeded(
        cli("sparsify", "few", "--method", "magnitude", "--sparsity", "0.7", "--json", "-o", "sparse")
    ).json
    assert made["widened"] == 8
    assert made["totals"]["bytes"] == pytest.approx(made["bytes_expected"], abs=3000)
    report = few(work / "sparse", "out", "--bits", 4)
    assert {weight["role"] for weight in report["weights"]} == {"attention", "ffn"}
    assert [one["name"] for one in report["kept"]] == ["transformer.wte"]  # which is in 8 bits
    before, after = (tf.GPT2LMHeadModel.from_pretrained(work / name).state_dict() for name in ("sparse", "out"))
    for name, tensor in before.items():
        assert not bool(after[name][tensor == 0].any()), name
        assert float((after[name] - tensor).norm() / tensor.norm().clamp_min(1e-9)) < 0.15, name


# --- by the inputs --------------------------------------------------------------------------------------------------


def test_gptq_changes_predictions_less_than_rounding_to_nearest(text: Path, few: Run) -> None:
    layers = ("--layers", "attention,ffn", "--bits", 3, "--group", 0)
    assert few(text / "gpt2", "nearest", *layers)["method"] == "rtn"
    assert few(text / "gpt2", "looked", *layers, *_looking(text))["method"] == "gptq"
    assert _divergence(text, Path("looked")) < 0.7 * _divergence(text, Path("nearest"))


@pytest.mark.parametrize(("model", "cores"), [("mpo", "all"), ("trained", "central")])
def test_cores_are_rounded_through_their_neighbours_whatever_their_gauge(
    model: str, cores: str, text: Path, few: Run
) -> None:
    options = ("--layers", "attention,ffn", "--bits", 4, "--group", 0, "--cores", cores)
    looked = few(text / model, "looked", *options, *_looking(text))
    few(text / model, "nearest", *options)
    assert all(weight["error"] < 0.2 for weight in looked["weights"])
    assert _divergence(text, Path("looked"), model) < _divergence(text, Path("nearest"), model)


def test_text_that_nothing_would_look_at_is_refused(text: Path, cli: Cli, work: Path) -> None:
    options = ("--layers", "embedding", *_looking(text), "-o", "out")
    refused(cli("quantize", text / "gpt2", *options), 2, "--calibrate", "nothing that is rounded has inputs")


def test_padded_pairs_and_dead_inputs_are_rounded_by_their_inputs(text: Path, few: Run, cli: Cli, work: Path) -> None:
    shape = ("--shape", "*c_fc=130,1x1,33", "--trunc", 20, "--target", "*c_fc")
    succeeded(cli("decompose", text / "gpt2", *shape, "-o", "pairs"))
    with torch.no_grad():
        model = tf.GPT2LMHeadModel.from_pretrained(work / "pairs")
        model.transformer.h[0].ln_2.weight[::2] = 0.0  # half of what goes in is always the same
        model.transformer.h[0].ln_2.bias[::2] = 0.0
        model.save_pretrained(work / "dead")
        tf.AutoTokenizer.from_pretrained(text / "gpt2").save_pretrained(work / "dead")
    for name in ("pairs", "dead"):
        report = few(work / name, f"{name}-few", "--target", "*c_fc", *_looking(text))
        assert [weight["tensors"] for weight in report["weights"]] == [2]
        assert name == "dead" or report["weights"][0]["error"] < 0.2


def test_a_sparse_core_beside_wide_ones_keeps_its_zeros(text: Path, few: Run, cli: Cli, work: Path) -> None:
    succeeded(
        cli("sparsify", text / "mpo", "--method", "magnitude", "--sparsity", "0.5", "--layers", "ffn", "-o", "sparse")
    )
    report = few(work / "sparse", "out", *_looking(text), "--layers", "attention,ffn")
    assert any("rounded for their own sake" in line for line in report["warnings"])
    before, after = (tf.GPT2LMHeadModel.from_pretrained(work / name) for name in ("sparse", "out"))
    for name, core in before.named_parameters():
        if name.endswith("core_2"):
            assert not bool(after.get_parameter(name)[core == 0].any())


# --- other commands -------------------------------------------------------------------------------------------------


def test_experts_around_a_core_in_few_bits_share_its_codes(bert_mpo: Path, few: Run, cli: Cli, work: Path) -> None:
    few(bert_mpo, "few")
    told = succeeded(cli("expand-moe", "few", "--experts", 2, "-o", "moe")).err
    assert f"{4 * 4} tensors in few bits were read for the values they stand for" in told  # all cores but the centres
    before, after = (_stored(work / name) for name in ("few", "moe"))
    shared = [n for n in after if "intermediate" in n and n.endswith("core_2_codes")]
    assert shared and all(torch.equal(before[name], after[name]) for name in shared)
    assert not any("intermediate" in name and name.endswith("core_0_codes") for name in after)
    report = few(work / "moe", "again", "--layers", "ffn")
    assert report["kept"] and all(weight["tensors"] == 4 for weight in report["weights"])
    succeeded(cli("inspect", "again", "--verify"))
    succeeded(cli("merge", "again", "-o", "dense-experts"))
    report = few(work / "dense-experts", "few-experts")
    shown = succeeded(cli("inspect", "few-experts", "--json", "--verify")).json["modules"]
    told = {weight["name"]: weight["bytes"] for weight in report["weights"]}
    networks = [view for view in shown if view["experts"]]
    assert networks and all(view["bits"] < 5 for view in networks)
    assert all(view["bytes"] - told[view["name"]] in (0, 4 * 2 * 49) for view in networks)  # and a router


def test_decompose_reads_the_values_and_says_so(gpt2: Path, few: Run, cli: Cli, work: Path) -> None:
    few(gpt2, "few")
    options = ("--trunc", 8, "--layers", "ffn", "--dtype", "bfloat16")
    dry = succeeded(cli("decompose", "few", *options, "--dry-run", "--json")).json
    made = succeeded(cli("decompose", "few", *options, "-o", "mpo", "--json")).json
    assert dry["totals"] == made["totals"] and made["widened"] == 4
    assert dry["totals"]["bytes"] == sum(file.stat().st_size for file in (work / "mpo").glob("*.safetensors"))
    told = succeeded(cli("decompose", "few", *options, "-o", "again")).err
    assert "4 tensors in few bits were read for the values they stand for" in told
    succeeded(cli("inspect", "mpo", "--verify"))
    stored = _stored(work / "mpo")
    (kept,) = [one for one in made["modules"] if one["name"] == "transformer.h.0.attn.c_attn"]
    parts = [tensor for name, tensor in stored.items() if name.startswith(kept["name"]) and name.endswith(PARTS)]
    assert kept["bytes"] == sum(part.nbytes for part in parts)
    codes = {name: tensor for name, tensor in _stored(work / "few").items() if name in stored and name.endswith(PARTS)}
    assert codes and all(torch.equal(stored[name], tensor) for name, tensor in codes.items())
    assert stored[f"{kept['name']}.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("squeeze few --task lm --train text.txt --eval text.txt --max-drop 1", ("stored in few bits", "mpocli merge")),
        ("finetune wide --overparam svd --task lm --train text.txt", ("stored in few bits", "over-parameterise first")),
    ],
)
def test_what_would_not_fit_the_grids_is_refused(
    command: str, words: tuple[str, ...], text: Path, few: Run, cli: Cli, work: Path
) -> None:
    few(text / "mpo", "few")
    few(text / "gpt2", "wide")
    (work / "text.txt").symlink_to(text / "text.txt")
    refused(cli(*command.split(), "-o", "out"), 3, *words)


# --- what is refused ------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[list[object], int, list[str]]] = {
    "bits": (["--bits", 5], 2, ["--bits 5", "8, 4, 3 and 2"]),
    "group": (["--group", -1], 2, ["--group -1"]),
    "method": (["--method", "awq"], 2, ["awq"]),
    "no inputs": (["--method", "gptq"], 2, ["--calibrate"]),
    "no cores": (["--cores", "central"], 2, ["--cores central"]),
    "nothing": (["--layers", "pooler", "--target", "*query"], 3, ["nothing to round"]),
    "no such matrix": (["--target", "*nowhere"], 3, ["matches no weight matrix"]),
}


@pytest.mark.parametrize("which", BAD)
def test_options_that_cannot_be_are_one_line(which: str, bert: Path, cli: Cli, work: Path) -> None:
    options, code, words = BAD[which]
    refused(cli("quantize", bert, *options, "-o", "out"), code, *words)
    assert not (work / "out").exists()


VALUES: dict[str, tuple[float, int, str]] = {
    "too large": (1e9, 4, "needs a scale of"),
    "not finite": (float("nan"), 3, "NaN or infinite"),
}


@pytest.mark.parametrize(("which", "looks"), [("too large", False), ("too large", True), ("not finite", True)])
def test_a_value_that_no_grid_reaches_is_one_line(which: str, looks: bool, text: Path, cli: Cli, work: Path) -> None:
    value, code, word = VALUES[which]
    model = tf.GPT2LMHeadModel.from_pretrained(text / "gpt2")
    model.save_pretrained(work / "model")
    tf.AutoTokenizer.from_pretrained(text / "gpt2").save_pretrained(work / "model")
    name = "transformer.h.0.mlp.c_fc.weight"
    rewrite(work / "model", lambda tensors: tensors[name].view(-1)[5:6].fill_(value))
    told = refused(cli("quantize", "model", *(_looking(text) if looks else ()), "-o", "out"), code, "c_fc", word)
    assert code == 3 or "--ignore" in told
    assert not (work / "out").exists()


def test_a_cut_codes_tensor_is_one_line_whoever_reads_it(bert: Path, few: Run, cli: Cli, work: Path) -> None:
    few(bert, "few")
    rewrite(
        work / "few",
        lambda tensors: tensors.update({n: t[:, :-1].contiguous() for n, t in tensors.items() if n.endswith("_codes")}),
    )
    for command in ("inspect few", "merge few -o out", "quantize few -o out", "decompose few -o out --trunc 8"):
        refused(cli(*command.split()), 3, "codes of", "need U8")
    with pytest.raises(InputError, match="for 48 codes of 4 bits: 24 bytes were expected"):
        tf.BertForSequenceClassification.from_pretrained(work / "few")
    assert WEIGHTS in {path.name for path in (work / "few").iterdir()}


def test_verify_finds_a_scale_that_is_no_number_without_a_manifest_too(
    bert: Path, few: Run, cli: Cli, work: Path
) -> None:
    few(bert, "few", "--layers", "pooler")
    (work / "few" / "mpo.json").unlink()
    assert "no mismatch" in succeeded(cli("inspect", "few", "--verify")).out
    rewrite(work / "few", lambda tensors: tensors["bert.pooler.dense.weight_scales"].view(-1)[:1].fill_(float("inf")))
    assert "pooler.dense.weight.scales: not finite" in cli("inspect", "few", "--verify").err
