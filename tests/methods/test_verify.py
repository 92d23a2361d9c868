"""Nothing in a manifest, and nothing in a quantization_config, can be false and pass."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import mpocli
from mpocli.config.decompose import DecomposeConfig
from mpocli.config.expand_moe import ExpandConfig
from mpocli.config.merge import MergeConfig
from mpocli.config.routing import RoutingConfig
from mpocli.config.sparsify import SparsifyConfig
from mpocli.errors import InputError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.surroundings import write_trained
from mpocli.io.signpost import SIGNPOST
from mpocli.methods import merge
from mpocli.methods.decompose import run as decompose
from mpocli.methods.expand_moe import run as expand_moe
from mpocli.methods.inspect import run as inspect
from mpocli.methods.inspect.verify import PROVENANCE
from mpocli.methods.sparsify import run as sparsify
from mpocli.nn import RouterOptions
from mpocli.sparse import Pattern

SMALL: dict[str, Any] = {"vocab_size": 37, "max_position_embeddings": 12}
BERT = {**SMALL, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
BART = {
    **SMALL,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "scale_embedding": True,
}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12, "bos_token_id": 0, "eos_token_id": 0}
# Claims of the history and of the base's name: nobody can tell them from the files.
FREE = re.compile(r"history\[\d+\](?!\.input_sha256)\..*|history\[[1-9]\d*\]\.input_sha256|base_model\.(name|revision)")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """{what: (checkpoint, the model that it is verified against)}: of every kind one, as small as can be."""
    home = tmp_path_factory.mktemp("claims")
    models.save(tf.BertForMaskedLM, tf.BertConfig(**BERT), home / "bert", torch.float32)
    models.save(tf.BartForConditionalGeneration, tf.BartConfig(**BART), home / "bart", torch.bfloat16)
    models.save(tf.GPT2LMHeadModel, tf.GPT2Config(vocab_size=37, **GPT2), home / "gpt2", torch.float32)

    def cut(name: str, *targets: str) -> Path:
        decompose.run(str(home / name), DecomposeConfig(trunc=3, targets=targets), home / f"{name}-mpo")
        return home / f"{name}-mpo"

    tied, scaled = cut("bert", "*word_embeddings", "*query", "*intermediate.dense"), cut("bart", "*shared", "*.q_proj")
    routing = RoutingConfig(RouterOptions(kind="topk", top_k=1, capacity_factor=2.0, balance_loss=0.1))
    expand_moe.run(str(tied), ExpandConfig(experts=2, trunc=3, routing=routing), home / "experts")
    pruning = SparsifyConfig(
        sparsity=0.5,
        method="magnitude",
        pattern=Pattern.parse("2:4"),
        targets=("*.key", "*query"),
        max_shard_bytes=6_000,
    )
    sparsify.run(str(home / "experts"), pruning, home / "sparse")
    expand_moe.run(str(home / "gpt2"), ExpandConfig(experts=2, share=None), home / "dense-experts")
    loaded = tf.BertForMaskedLM.from_pretrained(tied)
    (home / "trained").mkdir()
    write_trained(home / "trained", loaded, Checkpoint.open(str(tied)), "finetune", {"steps": 1}, seed=0, metrics={})
    assert len(list((home / "sparse").glob("*.safetensors"))) > 1
    return {
        "tied": (tied, home / "bert"),
        "scaled": (scaled, home / "bart"),
        "conv1d": (cut("gpt2", "*c_attn"), home / "gpt2"),
        "sparse": (home / "sparse", home / "bert"),
        "dense experts": (home / "dense-experts", home / "gpt2"),
        "trained": (home / "trained", home / "bert"),
    }


ALL = ("tied", "scaled", "conv1d", "sparse", "dense experts", "trained")


@pytest.mark.parametrize("what", ALL)
def test_what_is_written_is_verified_with_and_without_its_base(what: str, made: dict[str, tuple[Path, Path]]) -> None:
    directory, base = made[what]
    assert inspect.run(str(directory), verify=True).problems == ()
    assert inspect.run(str(directory), verify=True, base=str(base)).problems == ()


def _leaves(data: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    if not inside or not data:
        yield place
    for key, value in inside:
        yield from _leaves(value, (*place, key))


_OTHER = {
    "linear": "conv1d",
    "conv1d": "linear",
    "embedding": "linear",
    "in": "out",
    "out": "in",
    "central": "none",
    "dense": "bitmask",
    "bitmask": "dense",
    "none": "central",
    "float32": "float64",
    "bfloat16": "float32",
    "attention": "ffn",
    "ffn": "head",
    "2:4": "unstructured",
    "topk": "switch",
}


def _false(value: Any) -> Any:
    """Something else that could stand there."""
    if value is None:
        return 1
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return 1.25 * value + 0.125
    if isinstance(value, str):
        return _OTHER.get(value, value + "x")
    return [1] if isinstance(value, list) else {"x": 1}


def _at(data: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        data = data[key]
    return data


def _spelled(place: tuple[Any, ...]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place).removeprefix(".")


def _kind_of_leaf(data: Any, place: tuple[Any, ...]) -> tuple[Any, ...]:
    """Leaves that are verified alike: of one is enough for all."""
    key: list[Any] = ["#" if isinstance(part, int) else part for part in place]
    if place[0] == "modules" and len(place) > 1:
        entry = _at(data, place[:2])
        key[1] = bool(entry.get("tied_to")), entry.get("share"), entry.get("place"), entry["kind"]
        key += [entry.get("relative_error") is None]
    elif place[0] in ("encodings", "files") and len(place) > 1:
        key[1] = "#"
    return (*key, type(_at(data, place)).__name__)


def _one_of_each(data: Any, seen: set[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    found: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for place in _leaves(data):
        kind = _kind_of_leaf(data, place)
        if kind not in seen:
            found[kind] = place
    seen.update(found)
    return list(found.values())


def _noticed(directory: Path, base: Path) -> bool:
    """With the base only where it is needed: that takes longer."""
    try:
        return any(inspect.run(str(directory), verify=True, base=against).problems for against in (None, str(base)))
    except InputError:
        return True


def test_every_leaf_of_a_manifest_is_verified_or_declared_to_be_provenance(
    made: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    assert PROVENANCE == ("base_model", "history")
    seen: set[tuple[Any, ...]] = set()
    believed = []
    for what in ALL:
        directory, base = made[what]
        copy = Path(shutil.copytree(directory, tmp_path / what))
        text = (copy / "mpo.json").read_text()
        for place in _one_of_each(json.loads(text), seen):
            if FREE.fullmatch(_spelled(place)):
                continue
            data = json.loads(text)
            _at(data, place[:-1])[place[-1]] = _false(_at(data, place))
            (copy / "mpo.json").write_text(json.dumps(data))
            if not _noticed(copy, base):
                believed.append((what, _spelled(place)))
    assert len(seen) > 100
    assert believed == []


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(files={}),
        lambda data: data["files"].pop("config.json"),
        lambda data: data["modules"].append(data["modules"][0]),
        lambda data: data["modules"].reverse(),
        lambda data: data["modules"][0].update(news=1),
        lambda data: data.update(news=1),
        lambda data: data["totals"].update(news=1),
        lambda data: data["modules"][0]["tensors"].pop("core_0"),
        lambda data: data.update(totals=None),
    ],
)
def test_what_is_there_twice_missing_or_new_is_noticed(
    change: Callable[[Any], Any], made: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    directory, base = made["tied"]
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    data = json.loads((copy / "mpo.json").read_text())
    change(data)
    (copy / "mpo.json").write_text(json.dumps(data))
    assert _noticed(copy, base)


def test_a_file_that_is_listed_twice_is_refused(made: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made["tied"][0], tmp_path / "copy"))
    text = (copy / "mpo.json").read_text()
    twice = text.replace('"files": {', '"files": {"config.json": {"sha256": "", "bytes": 1},')
    assert twice != text
    (copy / "mpo.json").write_text(twice)
    with pytest.raises(InputError, match=r"mpo[.]json: .*'config[.]json' is there twice"):
        Checkpoint.open(str(copy))


def _refused(directory: Path) -> list[str]:
    """Who does not refuse it: opening it as every verb does, transformers' own loading."""
    believing = []
    try:
        Checkpoint.open(str(directory)).totals()
        believing.append("opening")
    except InputError:
        pass
    try:
        getattr(tf, json.loads((directory / "config.json").read_text())["architectures"][0]).from_pretrained(directory)
        believing.append("loading")
    except (InputError, RuntimeError):
        pass
    return believing


def test_every_leaf_of_a_quantization_config_alone_is_held_against_the_files(
    made: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    seen: set[tuple[Any, ...]] = set()
    believed = []
    for what in ("sparse", "scaled"):
        copy = Path(shutil.copytree(made[what][0], tmp_path / what))
        (copy / "mpo.json").unlink()
        text = (copy / "config.json").read_text()
        for place in _one_of_each(json.loads(text)["quantization_config"], seen):
            if place == ("quant_method",):
                continue
            config = json.loads(text)
            quantization = config["quantization_config"]
            _at(quantization, place[:-1])[place[-1]] = _false(_at(quantization, place))
            (copy / "config.json").write_text(json.dumps(config))
            believed += [(what, _spelled(place), who) for who in _refused(copy)]
        (copy / "config.json").write_text(text)
        assert _refused(copy) == ["opening", "loading"]
    assert len(seen) > 20
    assert believed == []


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("scaled", {"scale": 5.0}),
        ("scaled", {"scale": 1.0}),
        ("conv1d", {"kind": "linear"}),
        ("tied", {"kind": "embedding"}),
        ("sparse", {"place": "out"}),
        ("sparse", {"router": None}),
        ("tied", {"tied_to": "bert.embeddings.word_embeddings"}),
    ],
)
def test_the_class_says_what_a_module_is_even_where_the_files_have_no_seal(
    what: str, changes: dict[str, Any], made: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(made[what][0], tmp_path / "copy"))
    (copy / "mpo.json").unlink()
    for file in copy.glob("*.safetensors"):
        tensors = load_file(file)
        if SIGNPOST in tensors:
            save_file({**tensors, SIGNPOST: torch.zeros(1)}, file, metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    (name, *_) = [
        name
        for name, entry in modules.items()
        if all((entry.get(key) or None) != value for key, value in changes.items())
        and ("scale" not in changes or "scale" in entry)
        and ("router" not in changes or "router" in entry)
        and ("place" not in changes or "experts" in entry)
        and ("tied_to" not in changes or "query" in name)
        and ("kind" not in changes or entry["kind"] != "embedding")
    ]
    (copy / "config.json").write_text(json.dumps({**config, "use_cache": False}))  # nothing of ours
    assert _refused(copy) == ["opening", "loading"]
    modules[name].update(changes)
    (copy / "config.json").write_text(json.dumps(config))
    assert _refused(copy) == []


@pytest.mark.parametrize("what", ["tied", "scaled", "conv1d"])
def test_what_merge_writes_is_what_loading_computes(
    what: str, made: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    directory, base = made[what]
    merge.run(str(directory), MergeConfig(), tmp_path / "merged")
    config = json.loads((base / "config.json").read_text())
    cls = getattr(tf, config["architectures"][0])
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        loaded, merged = (
            cls.from_pretrained(place).eval()(input_ids=ids)[0] for place in (directory, tmp_path / "merged")
        )
    assert mpocli and torch.allclose(loaded.float(), merged.float(), rtol=0, atol=2e-2 if what == "scaled" else 1e-4)
