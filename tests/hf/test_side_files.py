"""What the output's files name is there, or nobody names it and the output says so."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from mpocli.errors import InputError
from mpocli.hf.card import left_behind
from mpocli.hf.side_files import carry


def _write(place: Path, name: str, content: object = "") -> None:
    (place / name).parent.mkdir(parents=True, exist_ok=True)
    (place / name).write_text(content if isinstance(content, str) else json.dumps(content))


def _names(place: Path) -> set[str]:
    return {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = tmp_path / "source"
    for name in ("model.safetensors", "config.json", "mpo.json", "README.md", ".gitattributes", "pytorch_model.bin"):
        _write(made, name, "{}")
    return made


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_small_folders_of_text_travel_and_the_old_weights_do_not(source: Path, work: Path) -> None:
    kept = {"additional_chat_templates/tool_use.jinja", "code/layers.py", "tokenizer.json", "modeling_x.py"}
    for name in (*kept, "model.safetensors.index.json", "onnx/model.onnx", "openvino/openvino_model.xml"):
        _write(source, name)
    left = carry(source, work)
    assert _names(work) == kept
    assert [line.partition(":")[0] for line in left] == ["onnx", "openvino"]


def test_a_module_that_modules_json_names_travels_with_its_weights(source: Path, work: Path) -> None:
    _write(source, "modules.json", [{"path": "", "type": "T"}, {"path": "1_Pooling"}, {"path": "2_Dense"}])
    kept = {"modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}
    kept |= {"2_Dense/pytorch_model.bin"}
    for name in kept - {"modules.json"}:
        _write(source, name)
    _write(source, "2_Dense/model.safetensors", "x" * (2 << 20))
    assert carry(source, work) == [] and _names(work) == kept


def test_a_file_of_weights_that_a_configuration_names_travels(source: Path, work: Path) -> None:
    _write(
        source,
        "tokenizer_config.json",
        {"dictionary": "words.bin", "merges_file": "assets/deep/merges", "of": "pytorch_model.bin"},
    )
    for name in ("words.bin", "assets/deep/merges", "assets/deep/table.bin", "other.bin"):
        _write(source, name)
    assert carry(source, work) == []
    assert _names(work) == {"tokenizer_config.json", "words.bin", "assets/deep/merges", "assets/deep/table.bin"}


def test_where_a_checkpoint_came_from_is_no_name_of_a_folder(source: Path, work: Path) -> None:
    _write(source, "config.json", {"_name_or_path": "checkpoint-500"})
    _write(source, "checkpoint-500/model.safetensors")
    assert "no file of the model names" in carry(source, work)[0] and _names(work) == set()


@pytest.mark.parametrize(
    "names",
    [("adapter_config.json", "adapter_model.safetensors"), ("adapter_model.bin",), ("lora/adapter_config.json",)],
)
def test_an_adapter_stays_with_the_weights_it_was_trained_on_and_that_is_said(
    names: tuple[str, ...], source: Path, work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in names:
        _write(source, name, {"base_model_name_or_path": "someone/base"})
    with caplog.at_level(logging.WARNING):
        left = carry(source, work)
    assert _names(work) == set() and len(left) == len(names)
    assert "adapter" in caplog.text and "adapter" in left_behind(left)


def test_a_link_is_followed_inside_the_model_and_into_the_hubs_store_only(tmp_path: Path, work: Path) -> None:
    repository = tmp_path / "models--a--b"
    source = repository / "snapshots" / "0123"
    _write(repository, "blobs/abcd", "vocabulary")
    _write(tmp_path, "secret", "secret")
    _write(source, "real.txt", "inside")
    (source / "vocab.txt").symlink_to("../../blobs/abcd")
    (source / "same.txt").symlink_to("real.txt")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    (source / "folder").mkdir()
    (source / "folder" / "words.txt").symlink_to(tmp_path / "secret")
    left = carry(source, work)
    assert _names(work) == {"vocab.txt", "same.txt", "real.txt"}
    assert [line.partition(":")[0] for line in left] == ["folder/words.txt", "notes.txt"]


def test_what_is_named_and_cannot_be_carried_is_refused(source: Path, work: Path, tmp_path: Path) -> None:
    _write(tmp_path, "elsewhere/config.json")
    _write(source, "modules.json", [{"path": "2_Dense"}, {"path": "../elsewhere"}, {"path": "/etc"}])
    (source / "2_Dense").mkdir()
    (source / "2_Dense" / "config.json").symlink_to(tmp_path / "elsewhere" / "config.json")
    with pytest.raises(InputError, match=r"2_Dense/config\.json"):
        carry(source, work)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("what", "words"),
    [("pipe", "is a pipe"), ("circle", "symbolic links"), ("dangling", "a link to what does not exist")],
)
def test_what_is_no_file_is_refused_by_name_and_not_waited_for(what: str, words: str, source: Path, work: Path) -> None:
    path = source / "tokenizer.json"
    if what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name if what == "circle" else "nowhere")
    with pytest.raises(InputError, match=rf"tokenizer\.json: .*{words}"):
        carry(source, work)


@pytest.mark.timeout(20)
def test_a_pipe_that_would_name_others_is_not_waited_for_either(source: Path, work: Path) -> None:
    os.mkfifo(source / "tokenizer_config.json")
    with pytest.raises(InputError, match=r"tokenizer_config\.json: is a pipe"):
        carry(source, work)
