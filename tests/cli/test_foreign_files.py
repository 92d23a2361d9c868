"""Files of a model that nobody vouches for: each kind of nonsense in them is one line and exit 3, never a bug."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cli import tasks
from cli.shell import Cli, edited, refused, rewrite
from mpocli.cli import streams
from mpocli.hf import survey
from mpocli.methods.inspect import run as inspect


@pytest.fixture
def model(lab: Path, tmp_path: Path) -> Path:
    """A copy of a decoder to spoil."""
    return Path(shutil.copytree(lab / "gpt2", tmp_path / "model"))


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a class that is a number": ({"architectures": 5}, "architectures is 5, a list of class names was expected"),
    "classes that are none": ({"architectures": [None]}, "architectures is [None]"),
    "a type that is a list": ({"model_type": ["gpt2"]}, "model_type is ['gpt2']"),
    "labels that are a list": ({"id2label": ["a"]}, "id2label is ['a']"),
    "billions of layers": ({"n_layer": 2_000_000_000}, "n_layer is 2,000,000,000"),
    "billions of labels": ({"num_labels": 2_000_000_000}, "num_labels is 2,000,000,000"),
    "more layers than files could hold": ({"n_layer": 900}, "more than 2,000 parameter tensors"),
    "a depth below": ({"more": {"num_hidden_layers": 10**30}}, "num_hidden_layers is 1,000,"),
    "a head size of nothing": ({"n_head": 0}, "config.json"),
    "a name for a size": ({"n_embd": "[/x]"}, "config.json"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_no_model_can_have_is_refused_before_it_is_built(
    case: str, model: Path, cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "_LEAST_BOUND", 2_000)
    change, word = CONFIGS[case]
    with edited(model / "config.json") as config:
        config |= change
    said = refused(cli("inspect", model), 3)
    assert word in said or "no model can be built" in said, said


SIDE = {
    "generation_config.json": "5",
    "tokenizer_config.json": "[" * 2_000 + "]" * 2_000,
    "special_tokens_map.json": '{"pad_token": "\\ud800"}',
    "added_tokens.json": '["a"]',
    "tokenizer.json": "null",
    "adapter_config.json": '{"r": 1e999}',
}


@pytest.mark.parametrize("name", SIDE)
def test_a_file_beside_the_model_that_is_no_object_is_named(name: str, model: Path, cli: Cli, lab: Path) -> None:
    (model / name).write_text(SIDE[name])
    refused(cli("eval", model, "--task", "lm", "--eval", lab / "dev.txt", "--max-length", 16), 3, str(model / name))


def test_a_tokenizer_that_panics_over_a_text_is_named(lab: Path, cli: Cli, tmp_path: Path) -> None:
    """Its template has a token that its table of special tokens lacks."""
    model = Path(shutil.copytree(lab / "masked", tmp_path / "masked"))
    with edited(model / "tokenizer.json") as data:
        del data["post_processor"]["special_tokens"]["[CLS]"]
    command = ["eval", model, "--task", "lm", "--eval", lab / "dev.txt", "--max-length", 16]
    refused(cli(*command), 3, "the tokenizer (", "cannot read the text")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("what", ["pipe", "directory", "loop"])
def test_what_stands_in_a_files_place_is_told(name: str, what: str, model: Path, cli: Cli) -> None:
    path = model / name
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    else:
        path.symlink_to(name)
    words = {"pipe": "is a pipe", "directory": "is a directory", "loop": "symbolic links"}[what]
    refused(cli("inspect", model), 3, str(path), words)


def test_a_name_too_long_for_the_system_is_a_name_of_nothing(model: Path, cli: Cli, lab: Path) -> None:
    refused(cli("inspect", "a" * 5000), 3, "File name too long")
    refused(cli("eval", model, "--task", "lm", "--eval", "/" + "a" * 5000), 3)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{"n" * 5000}"}}}}')
    assert len(refused(cli("inspect", model), 3, "no file name in this directory")) < 600


@pytest.mark.parametrize("fault", [ImportError("needs flash_attn"), AttributeError("no such"), RuntimeError("")])
def test_whatever_transformers_raises_while_it_loads_is_one_line(
    fault: Exception, model: Path, cli: Cli, lab: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "_load_pretrained_model", fail)
    word = str(fault) or type(fault).__name__
    text = ["--calibrate", lab / "dev.txt", "--seq-len", 16, "--samples", 4]
    refused(cli("eval", model, "--task", "lm", "--eval", lab / "dev.txt", "--max-length", 16), 3, word, str(model))
    refused(cli("plan", model, "--ratio", "0.5", *text), 3, word, str(model))
    refused(cli("sparsify", model, "--method", "wanda", "--sparsity", "0.5", *text), 3, word, str(model))
    train = ["--train", lab / "train.txt", "--max-length", 16]
    refused(cli("finetune", model, "--task", "lm", *train), 3, word, str(model))


HEARS: dict[str, Callable[[Path], object]] = {
    "whisper": lambda place: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            **{"vocab_size": 64, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 4},
            **{"encoder_attention_heads": 1, "decoder_attention_heads": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8},
            **{"max_source_positions": 8, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1},
            **{"eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None},
        )
    ).save_pretrained(place),
}


@pytest.mark.parametrize("kind", HEARS)
def test_a_model_that_takes_no_text_cannot_be_calibrated_on_some(
    kind: str, cli: Cli, lab: Path, work: Path, tmp_path: Path
) -> None:
    HEARS[kind](tmp_path / "m")
    tasks.tokenizer("gpt2").save_pretrained(tmp_path / "m")
    text = ["--calibrate", lab / "dev.txt", "--seq-len", 16, "--samples", 4]
    for command in (["decompose", "--ratio", "0.5"], ["sparsify", "--method", "wanda", "--sparsity", "0.5"]):
        refused(cli(command[0], tmp_path / "m", *command[1:], *text), 3, "input_features", "no text")
    assert not list(work.iterdir())


STORED_AS = {"float8": torch.float8_e4m3fn, "int8": torch.int8, "packed": torch.uint8}
VERBS: dict[str, list[object]] = {
    "inspect": [],
    "decompose": ["--trunc", 4],
    "plan": ["--ratio", "0.5"],
    "sparsify": ["--method", "magnitude", "--sparsity", "0.5"],
    "expand-moe": ["--experts", 2],
    "eval": ["--task", "lm", "--max-length", 16, "--eval", "dev.txt"],
    "finetune": ["--task", "lm", "--max-length", 16, "--train", "dev.txt"],
}


@pytest.mark.parametrize("dtype", STORED_AS)
def test_numbers_that_stand_for_others_are_no_weights_in_any_command(
    dtype: str, model: Path, cli: Cli, lab: Path, work: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = "transformer.h.0.mlp.c_fc.weight"
        tensors[name] = tensors[name].to(STORED_AS[dtype])

    rewrite(model, change)
    stored = str(STORED_AS[dtype]).removeprefix("torch.")
    for verb in VERBS if dtype == "float8" else ("decompose", "eval"):
        options = [lab / option if option == "dev.txt" else option for option in VERBS[verb]]
        refused(cli(verb, model, *options), 3, "mlp.c_fc.weight", stored, "quantization_config")
    assert not list(work.iterdir())


def test_the_cores_of_an_mpo_are_plain_numbers_too(mpo: Path, cli: Cli) -> None:
    name = "bert.encoder.layer.0.attention.self.query.core_1"
    rewrite(mpo, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e5m2)}))
    refused(cli("inspect", mpo), 3, name, "float8_e5m2")


def test_the_system_s_refusal_of_a_named_file_is_no_bug(model: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    fault: OSError = PermissionError(13, "Permission denied", "model/[/x]")
    monkeypatch.setattr(inspect, "run", lambda *_, **__: (_ for _ in ()).throw(fault))
    refused(cli("inspect", model), 3, "model/[/x]: Permission denied")
    fault = FileNotFoundError(2, "No such file", "ours")
    assert cli("inspect", model).code == 1


def test_streams_that_were_closed_lead_nowhere_and_no_file_gets_their_descriptors(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os.close(1)
        os.close(2)
        sys.stdout = sys.stderr = None  # type: ignore[assignment]  # as Python starts with them closed
        streams.reopen()
        sys.stdout.write("lost")
        sys.stdout.flush()
        with (tmp_path / "file").open("w") as file:
            os._exit(0 if file.fileno() > 2 and os.fstat(1).st_rdev == Path(os.devnull).stat().st_rdev else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
