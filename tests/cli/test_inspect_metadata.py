"""`inspect` of what mpocli wrote imports neither torch nor transformers, and prints what it prints with them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from cli.shell import WEIGHTS, Cli, Outcome, edited, rewrite, succeeded
from mpocli.config.decompose import DecomposeConfig
from mpocli.config.expand_moe import ExpandConfig
from mpocli.config.merge import MergeConfig
from mpocli.config.quantize import QuantizeConfig
from mpocli.config.sparsify import SparsifyConfig
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.surroundings import write_trained
from mpocli.methods import merge
from mpocli.methods.decompose import run as decompose
from mpocli.methods.expand_moe import run as expand_moe
from mpocli.methods.inspect import run as inspect
from mpocli.methods.quantize import run as quantize
from mpocli.methods.sparsify import run as sparsify

# Runs commands one after another where importing torch or transformers is an error, and says what each gave.
_BLOCKED = """
import contextlib, io, json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
from mpocli.cli.app import main
outcomes = []
for arguments in json.load(sys.stdin):
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as stop:
            code = stop.code
    outcomes.append([code or 0, out.getvalue(), err.getvalue()])
assert not {"torch", "transformers"} & sys.modules.keys()
print(json.dumps(outcomes))
"""
WAYS = ([], ["--json"], ["--module", "*"])


def _without_torch(commands: list[list[str]]) -> list[Outcome]:
    done = subprocess.run(
        [sys.executable, "-c", _BLOCKED], input=json.dumps(commands), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [Outcome(*outcome) for outcome in json.loads(done.stdout)]


@pytest.fixture
def by_class(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`mpocli` that asks the model's class in every case."""

    def run(*arguments: object) -> Outcome:
        with monkeypatch.context() as patch:
            patch.setattr(inspect, "recorded", lambda metadata: None)
            return cli(*arguments)

    return run


def _same(one: Outcome, other: Outcome) -> bool:
    """But for the time it took."""
    return _untimed(one) == _untimed(other)


def _untimed(outcome: Outcome) -> Outcome:
    return Outcome(outcome.code, re.sub(r'"seconds": [^,]+', "", outcome.out), outcome.err)


@pytest.fixture(scope="module")
def made(bert: Path, bert_mpo: Path, gpt2: Path, t5: Path, masked_lm: Path, tmp_path_factory: Any) -> list[Path]:
    """Of every kind that mpocli writes one."""
    home: Path = tmp_path_factory.mktemp("made")
    some = DecomposeConfig(trunc=6, targets=("*c_attn",), dtype="bfloat16", max_shard_bytes=20_000)
    decompose.run(str(gpt2), some, home / "conv1d-shards")
    decompose.run(str(t5), DecomposeConfig(trunc=6), home / "tied-three-times")
    decompose.run(str(masked_lm), DecomposeConfig(trunc=6), home / "tied")
    decompose.run(str(home / "tied"), DecomposeConfig(trunc=3), home / "again")
    expand_moe.run(str(home / "tied"), ExpandConfig(experts=2), home / "experts")
    expand_moe.run(str(gpt2), ExpandConfig(experts=2, share=None), home / "dense-experts")
    pruning = SparsifyConfig(sparsity=0.5, method="magnitude", max_shard_bytes=30_000)
    sparsify.run(str(bert), pruning, home / "sparse")
    sparsify.run(str(home / "experts"), pruning, home / "sparse-experts")
    quantize.run(str(home / "tied"), QuantizeConfig(), home / "few-bits")
    quantize.run(str(home / "sparse"), QuantizeConfig(bits=3, group=0), home / "sparse-few-bits")
    merge.run(str(bert_mpo), MergeConfig(), home / "merged")
    (home / "trained").mkdir()
    loaded = tf.BertForMaskedLM.from_pretrained(home / "tied")
    source = Checkpoint.open(str(home / "tied"))
    write_trained(home / "trained", loaded, source, "finetune", {}, seed=0, metrics={})
    assert len(list((home / "sparse").glob("*.safetensors"))) > 1
    return [bert_mpo, *sorted(path for path in home.iterdir() if not path.name.startswith("."))]


def test_what_mpocli_wrote_is_shown_without_torch_as_it_is_with_it(made: list[Path], by_class: Cli) -> None:
    assert len(made) == 13
    commands = [["inspect", str(directory), *way] for directory in made for way in WAYS]
    for command, outcome in zip(commands, _without_torch(commands), strict=True):
        assert _same(succeeded(outcome), succeeded(by_class(*command))), command


def test_what_only_values_or_the_class_can_tell_does_import_torch(bert: Path, bert_mpo: Path, work: Path) -> None:
    """The test above can fail. A dense checkpoint's matrices are told by its class."""
    alone = Path(shutil.copytree(bert_mpo, work / "alone"))
    (alone / "mpo.json").unlink()
    old = Path(shutil.copytree(bert_mpo, work / "old"))
    with edited(old / "mpo.json") as manifest:
        del manifest["matrices"], manifest["matrices_sha256"]
    values = [["inspect", str(bert_mpo), option] for option in ("--verify", "--spectrum", "--count-zeros")]
    for outcome in _without_torch([*values, *(["inspect", str(model)] for model in (bert, alone, old))]):
        assert outcome.code == 1 and "is blocked" in outcome.err


def test_a_manifest_from_before_matrices_were_listed_is_shown_and_verified_alike(
    mpo: Path, bert_mpo: Path, cli: Cli
) -> None:
    with edited(mpo / "mpo.json") as manifest:
        del manifest["matrices"], manifest["matrices_sha256"]
    old, new = (succeeded(cli("inspect", model, "--verify", "--json")).json for model in (mpo, bert_mpo))
    assert old["modules"] == new["modules"] and old["totals"] == new["totals"] and old["problems"] == []


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return _json("config.json", change)


def _manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return _json("mpo.json", change)


def _json(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        with edited(directory / name) as data:
            change(data)

    return edit


QUERY = "bert.encoder.layer.0.attention.self.query"


def _flipped(directory: Path, place: int) -> None:
    content = bytearray((directory / WEIGHTS).read_bytes())
    content[place] ^= 1
    (directory / WEIGHTS).write_bytes(content)


def _seal(directory: Path) -> int:
    return 8 + int.from_bytes((directory / WEIGHTS).read_bytes()[:8], "little")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no weights": lambda model: (model / WEIGHTS).unlink(),
    "cut off": lambda model: (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:-4]),
    "a header flipped": lambda model: _flipped(model, 12),
    "a seal flipped": lambda model: _flipped(model, _seal(model)),
    "data flipped": lambda model: _flipped(model, -1),
    "a core gone": lambda model: rewrite(model, lambda tensors: tensors.pop(f"{QUERY}.core_1")),
    "a core more": lambda model: rewrite(model, lambda t: t.update({f"{QUERY}.core_5": torch.zeros(1)})),
    "a core of another shape": lambda model: rewrite(model, lambda t: t.update({f"{QUERY}.core_0": torch.zeros(3)})),
    "a tombstone gone": lambda model: rewrite(model, lambda tensors: tensors.pop(f"{QUERY}.weight")),
    "a dense matrix of another shape": lambda model: rewrite(
        model, lambda tensors: tensors.update({"classifier.weight": torch.zeros(2, 48)})
    ),
    "no config": lambda model: (model / "config.json").unlink(),
    "a config that is none": lambda model: (model / "config.json").write_text("{"),
    "another class": _config(lambda config: config.update(architectures=["BertForMaskedLM"])),
    "no class": _config(lambda config: config.update(architectures=["NoSuchModel"])),
    "other sizes": _config(lambda config: config.update(hidden_size=44)),
    "fewer layers": _config(lambda config: config.update(num_hidden_layers=1)),
    "an unknown type": _config(lambda config: config.update(model_type="nothing")),
    "another scale": _config(lambda config: config["quantization_config"]["modules"][QUERY].update(scale=2.0)),
    "a manifest that is none": lambda model: (model / "mpo.json").write_text("[]"),
    "a manifest of the future": _manifest(lambda data: data.update(schema_version=2)),
    "totals that are false": _manifest(lambda data: data["totals"].update(params=7)),
    "no totals": _manifest(lambda data: data.update(totals=None)),
    "a module gone": _manifest(lambda data: data["modules"].pop()),
    "a role that is false": _manifest(lambda data: data["modules"][1].update(role="head")),
    "matrices that are none": _manifest(lambda data: data.update(matrices=5)),
    "a matrix that is none": _manifest(lambda data: data["matrices"].append({"name": "x"})),
    "a matrix too few": _manifest(lambda data: data["matrices"].pop(2)),
    "a reason that is false": _manifest(lambda data: data["matrices"][2].update(reason="none")),
    "a digest alone": _manifest(lambda data: data.pop("matrices")),
    "false bytes": _manifest(lambda data: data["totals"].update(dense_bytes=data["totals"]["dense_bytes"] + 1)),
    "a matrix twice": _manifest(lambda data: data["matrices"].append(data["matrices"][0])),
    "a matrix of another shape": _manifest(lambda data: data["matrices"][-1].update(shape=[4, 48])),
    "a matrix of another dtype": _manifest(lambda data: data["matrices"][-1].update(dtype="float16")),
    "a matrix that is not in the files": _manifest(lambda data: data["matrices"][-1].update(key="x.weight")),
    "a matrix of more": _manifest(lambda data: data["matrices"][-1].update(news=1)),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_told_with_the_same_words_with_and_without_a_list_of_matrices(
    what: str, mpo: Path, cli: Cli, by_class: Cli
) -> None:
    DAMAGE[what](mpo)
    for way in WAYS:
        assert _same(cli("inspect", mpo, *way), by_class("inspect", mpo, *way))


def test_a_glob_that_matches_nothing_is_told_with_the_same_words(mpo: Path, by_class: Cli) -> None:
    (outcome,) = _without_torch([["inspect", str(mpo), "--module", "*querry"]])
    assert outcome.code == 3 and _same(outcome, by_class("inspect", mpo, "--module", "*querry"))
