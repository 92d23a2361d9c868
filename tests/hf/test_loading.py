"""Plain transformers loads what `decompose` writes, for every family, and never loads it wrong."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, logits, make
from safetensors.torch import load_file, save_file
from strangers import run_stranger

import mpocli
from mpocli.config.decompose import DecomposeConfig
from mpocli.config.merge import MergeConfig
from mpocli.methods import merge
from mpocli.methods.decompose import run as decompose
from mpocli.mpo import SiteShape
from mpocli.nn import MPOEmbedding, MPOLinear, MPOModule

LOSSLESS = DecomposeConfig(layers=("embedding", "attention", "ffn", "pooler", "head"))
TRUNCATED = DecomposeConfig(trunc=6, when_larger="decompose", layers=LOSSLESS.layers)


def bound(reference: torch.Tensor) -> float:
    return 1e-5 * max(1.0, float(reference.abs().max()))


Spoilt = tuple[type[transformers.PreTrainedModel], Path]
Checkpoints = Callable[[str, DecomposeConfig], tuple[transformers.PreTrainedModel, Path]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """A dense model and the directory of its MPOs, made once; nobody writes into it."""

    @functools.cache
    def made(family: str, config: DecomposeConfig) -> tuple[transformers.PreTrainedModel, Path]:
        path = tmp_path_factory.mktemp(family)
        dense = make(family, path / "dense")
        decompose.run(str(path / "dense"), config, path / "mpo")
        return dense, path / "mpo"

    return made


@pytest.fixture
def spoilt(checkpoint: Checkpoints, tmp_path: Path) -> Spoilt:
    """The class of a model and a copy of its MPOs to spoil."""
    dense, directory = checkpoint("bert-classifier", TRUNCATED)
    return type(dense), Path(shutil.copytree(directory, tmp_path / "mpo"))


@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_logits_equal_the_dense_ones(family: str, checkpoint: Checkpoints) -> None:
    dense, directory = checkpoint(family, LOSSLESS)
    loaded = type(dense).from_pretrained(directory).eval()
    expected = logits(dense)
    assert float((logits(loaded) - expected).abs().max()) <= bound(expected)
    replaced = [name for name, module in loaded.named_modules() if isinstance(module, MPOModule)]
    assert len(replaced) >= 9  # embedding, attention and feed-forward of two layers at the least
    # Every parameter is counted once, in the report and in the model.
    report = json.loads((directory / "mpo.json").read_text())["totals"]
    assert report["params"] == sum(parameter.numel() for parameter in loaded.parameters())
    assert report["dense_params"] == sum(parameter.numel() for parameter in dense.parameters())
    assert report["bytes"] == sum(file.stat().st_size for file in directory.glob("*.safetensors"))


@pytest.mark.parametrize("family", FAMILIES)
def test_save_pretrained_round_trips_bit_for_bit(family: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    dense, directory = checkpoint(family, TRUNCATED)
    loaded = type(dense).from_pretrained(directory).eval()
    loaded.save_pretrained(tmp_path / "again")
    again = type(dense).from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(loaded), logits(again))
    first, second = load_file(directory / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    cores = {name for name in first if ".core_" in name}
    assert cores == {name for name in second if ".core_" in name}
    assert all(torch.equal(first[name], second[name]) for name in cores)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_checkpoint_is_ordinary_and_equal(family: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    dense, directory = checkpoint(family, TRUNCATED)
    mpo = type(dense).from_pretrained(directory).eval()
    merge.run(str(directory), MergeConfig(), tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    merged = type(dense).from_pretrained(tmp_path / "merged").eval()
    assert not any(isinstance(module, MPOModule) for module in merged.modules())
    assert {n: p.shape for n, p in merged.named_parameters()} == {n: p.shape for n, p in dense.named_parameters()}
    expected = logits(mpo)
    assert float((logits(merged) - expected).abs().max()) <= bound(expected)


@pytest.mark.parametrize("family", ["bert-masked-lm", "gpt2", "t5", "qwen2", "bart", "albert"])
def test_tied_cores_are_one_parameter_stored_once(family: str, checkpoint: Checkpoints) -> None:
    dense, directory = checkpoint(family, TRUNCATED)
    loaded = type(dense).from_pretrained(directory).eval()
    table, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert isinstance(table, MPOEmbedding)
    assert isinstance(head, MPOLinear)
    assert all(a is b for a, b in zip(table.cores, head.cores, strict=True))
    stored = load_file(directory / "model.safetensors")
    assert (
        sum(
            name.endswith(".core_0") and tensor.shape == table.cores[0].shape and torch.equal(tensor, table.cores[0])
            for name, tensor in stored.items()
        )
        == 1
    )
    # tie_weights is what a user's resize or peft calls: it must neither untie nor shrink the head's bias.
    before = logits(loaded)
    loaded.tie_weights()
    assert torch.equal(logits(loaded), before)
    assert loaded.get_output_embeddings().cores[0] is loaded.get_input_embeddings().cores[0]


@pytest.mark.parametrize("family", ["bert-masked-lm", "gpt2", "t5", "bart", "gemma3"])
def test_dequantize_gives_back_the_dense_model(family: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    dense, directory = checkpoint(family, TRUNCATED)
    loaded = type(dense).from_pretrained(directory).eval()
    expected = logits(loaded)
    loaded.dequantize()
    assert not any(isinstance(module, MPOModule) for module in loaded.modules())
    assert float((logits(loaded) - expected).abs().max()) <= bound(expected)
    loaded.save_pretrained(tmp_path / "plain")
    again = type(dense).from_pretrained(tmp_path / "plain").eval()
    assert float((logits(again) - expected).abs().max()) <= bound(expected)
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in dense.named_parameters()}


def test_a_classifier_loads_as_encoder_and_an_encoder_under_a_new_head(checkpoint: Checkpoints, tmp_path: Path) -> None:
    dense, directory = checkpoint("bert-classifier", TRUNCATED)
    whole = type(dense).from_pretrained(directory).eval()
    encoder = transformers.AutoModel.from_pretrained(directory).eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.equal(encoder(ids)[0], whole.bert(ids)[0])
    encoder.save_pretrained(tmp_path / "encoder")
    headed = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder").eval()
    with torch.no_grad():
        assert torch.equal(headed.bert(ids)[0], whole.bert(ids)[0])


def test_t5_encoder_alone_loads_from_the_whole_model(checkpoint: Checkpoints) -> None:
    dense, directory = checkpoint("t5", TRUNCATED)
    whole = type(dense).from_pretrained(directory).eval()
    encoder = transformers.T5EncoderModel.from_pretrained(directory).eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.equal(encoder(ids)[0], whole.encoder(ids)[0])


def test_generate_runs_and_matches_the_merged_model(checkpoint: Checkpoints, tmp_path: Path) -> None:
    dense, directory = checkpoint("gpt2", TRUNCATED)
    merge.run(str(directory), MergeConfig(), tmp_path / "merged")
    ids = torch.arange(5, 12)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    mpo = type(dense).from_pretrained(directory).generate(ids, **options)
    assert torch.equal(mpo, type(dense).from_pretrained(tmp_path / "merged").generate(ids, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    make("llama", tmp_path / "dense", dtype=dtype)
    decompose.run(str(tmp_path / "dense"), TRUNCATED, tmp_path / "mpo")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mpo", dtype="auto").eval()
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    merge.run(str(tmp_path / "mpo"), MergeConfig(), tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    # Both compute in half precision, by different routes: a few units in the last place of the largest logit.
    expected = logits(merged).float()
    assert float((logits(loaded).float() - expected).abs().max()) <= 16 * torch.finfo(dtype).eps * expected.abs().max()


def test_sharded_output_loads(tmp_path: Path) -> None:
    dense = make("llama", tmp_path / "dense")
    config = DecomposeConfig(trunc=6, when_larger="decompose", max_shard_bytes=20_000)
    decompose.run(str(tmp_path / "dense"), config, tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    decompose.run(str(tmp_path / "dense"), DecomposeConfig(trunc=6, when_larger="decompose"), tmp_path / "whole")
    a = type(dense).from_pretrained(tmp_path / "sharded").eval()
    b = type(dense).from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(logits(a), logits(b))


# --- never a wrong model ------------------------------------------------------------------------------------------

_LOAD = """
import sys, torch
torch.set_num_threads({threads})
{first}
import transformers
{last}
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
with torch.no_grad():
    print(model.eval()(torch.arange(5, 15)[None])[0].numpy().tobytes().hex())
"""


def test_a_new_process_computes_the_same_bits_whichever_import_comes_first(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    dense, directory = checkpoint("bert-classifier", TRUNCATED)
    here = type(dense).from_pretrained(directory).eval()
    with torch.no_grad():
        expected = here(torch.arange(5, 15)[None])[0].numpy().tobytes().hex()
    threads = torch.get_num_threads()
    code = _LOAD.format(threads=threads, first="import mpocli", last="")
    first = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=False)
    assert first.stdout.strip() == expected, first.stderr
    last = run_stranger(_LOAD.format(threads=threads, first="", last="import mpocli"), directory, cwd=tmp_path)
    assert last.out.strip() == expected, last.err


def test_loading_without_the_import_is_an_error_that_says_what_to_do(checkpoint: Checkpoints, tmp_path: Path) -> None:
    _, directory = checkpoint("bert-classifier", TRUNCATED)
    ended = run_stranger(_LOAD.format(threads=1, first="", last=""), directory, cwd=tmp_path)
    assert ended.code != 0
    assert "import_mpocli_before_from_pretrained" in ended.err
    assert not ended.out


def edit_weights(directory: Path, change) -> None:  # type: ignore[no-untyped-def]
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_core_is_an_error_and_never_nan(spoilt: Spoilt) -> None:
    cls, directory = spoilt
    name = "bert.encoder.layer.1.output.dense.core_2"
    edit_weights(directory, lambda tensors: tensors.pop(name))
    with pytest.raises(mpocli.InputError, match=name.replace(".", r"\.")):
        cls.from_pretrained(directory)


def test_an_extra_core_is_an_error(spoilt: Spoilt) -> None:
    cls, directory = spoilt
    name = "bert.encoder.layer.1.output.dense.core_5"
    edit_weights(directory, lambda tensors: tensors.update({name: torch.zeros(1, 2, 2, 1)}))
    with pytest.raises(mpocli.InputError, match="core_5 is in the files"):
        cls.from_pretrained(directory)


@pytest.mark.parametrize("ignore_mismatched_sizes", [False, True])
def test_a_core_of_the_wrong_shape_is_an_error(spoilt: Spoilt, ignore_mismatched_sizes: bool) -> None:
    cls, directory = spoilt
    name = "bert.encoder.layer.1.output.dense.core_1"
    edit_weights(directory, lambda tensors: tensors.update({name: tensors[name][:, :, :, :-1].contiguous()}))
    with pytest.raises((mpocli.InputError, RuntimeError)):
        cls.from_pretrained(directory, ignore_mismatched_sizes=ignore_mismatched_sizes)


@pytest.mark.parametrize("damage", ["cut", "length", "lost", "pipe"])
def test_a_weight_file_that_is_none_is_named(damage: str, spoilt: Spoilt) -> None:
    cls, directory = spoilt
    cls.from_pretrained(directory).save_pretrained(directory, max_shard_size="20KB")
    (directory / "model.safetensors").unlink()
    path = min(directory.glob("*.safetensors"))
    content = path.read_bytes()
    if damage in ("lost", "pipe"):
        path.unlink()
        if damage == "pipe":
            os.mkfifo(path)
    else:
        path.write_bytes(content[:-9] if damage == "cut" else bytes(8) + content[8:])
    with pytest.raises(mpocli.InputError, match=path.name):
        cls.from_pretrained(directory)


def test_a_dense_checkpoint_cannot_be_read_as_an_mpo(tmp_path: Path) -> None:
    make("bert", tmp_path / "dense")
    with pytest.raises(ValueError, match="pre-quantized"):
        transformers.BertModel.from_pretrained(tmp_path / "dense", quantization_config=mpocli.MPOConfig())


def test_modules_of_a_newer_schema_are_refused(spoilt: Spoilt) -> None:
    cls, directory = spoilt
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["schema_version"] = 99
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(mpocli.InputError, match="schema_version 99"):
        cls.from_pretrained(directory)


def test_awkward_shapes_by_hand_survive_the_round_trip(tmp_path: Path) -> None:
    dense = make("bert", tmp_path / "dense")
    shapes = (
        ("*query", SiteShape((48, 1), (1, 48))),
        ("*key", SiteShape((7, 7), (5, 10))),
        ("*value", SiteShape((1, 48, 1), (4, 4, 3))),
    )
    config = DecomposeConfig(shapes=shapes, layers=("attention",))
    decompose.run(str(tmp_path / "dense"), config, tmp_path / "mpo")
    loaded = type(dense).from_pretrained(tmp_path / "mpo").eval()
    expected = logits(dense)
    assert float((logits(loaded) - expected).abs().max()) <= bound(expected)
