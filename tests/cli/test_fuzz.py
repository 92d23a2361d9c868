"""Whatever is wrong with a model, its data or the options: a documented exit code, one line, and nothing is touched.

Each test is one case, drawn from a fixed seed, and its name draws it again. `FUZZ_SEED=5 FUZZ_CASES=200` draws others
and more: 200 of each kind.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

from cli import mutations, tasks
from cli.processes import Ended, Server
from cli.shell import tree
from mpocli.cli.group import command as command_named

SEED = int(os.environ.get("FUZZ_SEED", "17"))
CASES = int(os.environ.get("FUZZ_CASES", "9"))

MODELS = ("classifier", "cores", "shards", "sparse", "experts", "few", "few-cores")
MPOS = ("cores", "shards", "experts", "few-cores")
# The kind of nonsense, what makes it of a model's directory, and the models that have such a thing.
SPOILS: dict[str, tuple[Callable[[Path, random.Random], str], tuple[str, ...]]] = {
    "config": (mutations.config, MODELS),
    "structure": (mutations.structure, MODELS[1:]),
    "manifest": (mutations.manifest, MODELS[1:]),
    "both": (mutations.both, MPOS),
    "text": (mutations.text, MODELS),
    "header": (mutations.header, MODELS),
    "weights": (mutations.weights, MODELS),
    "index": (mutations.index, ("shards",)),
    "tokenizer": (mutations.tokenizer, ("classifier", "shards")),
    "files": (mutations.files, MODELS),
}
KINDS = (*SPOILS, "data", "arguments")
# Kinds that leave the tensors: what is accepted then merges to the same ones, and scores the same if the second is set.
SAME = {"config": False, "text": False, "structure": True, "manifest": True, "both": True, "index": True}

READERS = [
    ["inspect", "model", "--json"],
    ["inspect", "model", "--verify"],
    ["inspect", "model", "--module", "*", "--spectrum"],
    ["plan", "model", "--ratio", "0.5"],
]
WRITERS = [
    ["merge", "model", "-o", "out"],
    ["decompose", "model", "--trunc", "4", "-o", "out"],
    ["sparsify", "model", "--method", "magnitude", "--sparsity", "0.5", "-o", "out"],
    ["expand-moe", "model", "--experts", "2", "-o", "out"],
    ["quantize", "model", "--bits", "4", "-o", "out"],
]
LENGTH = ["--max-length", "16"]
LM = ["eval", "model", "--task", "lm", "--eval", "dev.txt", *LENGTH, "--json"]
LABELS = ["eval", "model", "--task", "sst2", "--eval", "dev.tsv", *LENGTH, "--json"]
CALIBRATED = ["plan", "model", "--ratio", "0.5", "--calibrate", "dev.txt", "--seq-len", "16", "--samples", "4"]
TRAINERS = [
    ["finetune", "model", "--task", "lm", "--train", "dev.txt", "--steps", "1", *LENGTH, "-o", "out"],
    [
        "sparsify",
        "model",
        "--sparsity",
        "0.5",
        "--task",
        "lm",
        "--train",
        "dev.txt",
        "--steps",
        "1",
        *LENGTH,
        "-o",
        "out",
    ],
]
# They would fetch, wait for a program that is not installed, or say where the output goes.
NOT_DRAWN = {"--help", "--trust-remote-code", "--lm-eval", "--out", "--report-to", "--revision"}

# A pipe that is waited for, a loop or a huge allocation ends the run; none of them is near what any case takes.
LIMITS = """
import os, resource, signal, tempfile
os.environ["TMPDIR"] = {temporary!r}
tempfile.tempdir = None
signal.alarm(150)
resource.setrlimit(resource.RLIMIT_CPU, (100, 100))
resource.setrlimit(resource.RLIMIT_AS, (int(open("/proc/self/statm").read().split()[0]) * 4096 + 4 * 2**30,) * 2)
"""


@dataclass(frozen=True)
class Bases:
    """Models that nothing is wrong with, and what they merge to and score."""

    server: Server
    place: Path
    merged: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)


def _tensors(directory: Path) -> dict[str, Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def _evaluation(model: str) -> list[str]:
    return LABELS if model in ("classifier", "cores", "few-cores") else LM


@pytest.fixture(scope="module")
def bases(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Bases:
    place = tmp_path_factory.mktemp("bases")
    tasks.save("bert", place / "classifier", cls=tf.BertForSequenceClassification)
    tasks.save("gpt2", place / "dense")
    tasks.sentiment(place / "dev.tsv", 6, 1)
    tasks.prose(place / "dev.txt", 12, 1)
    made = Bases(server, place)

    def run(*command: str) -> Ended:
        ended = server.run(*command, cwd=place, log=place / "log")
        assert ended.code == 0, ended.err
        return ended

    run("decompose", "classifier", "--trunc", "6", "-o", "cores")
    run("decompose", "dense", "--trunc", "6", "--max-shard-size", "10KB", "-o", "shards")
    run("sparsify", "dense", "--method", "magnitude", "--sparsity", "0.7", "-o", "sparse")
    run("quantize", "sparse", "-o", "few")
    run("quantize", "cores", "--bits", "3", "--group", "0", "-o", "few-cores")
    run("expand-moe", "dense", "--experts", "2", "-o", "experts")
    for model in MODELS:
        score = run(*(model if part == "model" else part for part in _evaluation(model)))
        made.scores[model] = json.loads(score.out)["metrics"]
        if model not in ("classifier", "experts"):
            run("merge", model, "-o", f"merged-{model}")
            made.merged[model] = _tensors(place / f"merged-{model}")
    return made


def _options(command: str) -> list[tuple[str, bool]]:
    names = (
        (max(option.opts, key=len), bool(option.is_flag))
        for option in command_named(command).params
        if hasattr(option, "is_flag")
    )
    return [(name, flag) for name, flag in names if name not in NOT_DRAWN]


def _command(kind: str, model: str, draw: random.Random) -> list[str]:
    scored = _evaluation(model)
    if kind == "data":
        return draw.choice([LM, LABELS, CALIBRATED])
    if kind == "tokenizer":
        return draw.choice([scored, scored, ["inspect", "model"], WRITERS[1]])
    if kind != "arguments":
        return draw.choice([*READERS, *WRITERS, WRITERS[0], scored, scored])
    command = draw.choice([*READERS, *WRITERS, *TRAINERS, scored])
    return [*command, *mutations.arguments(_options(command[0]), draw)]


def _ids() -> list[str]:
    return [f"{kind}-{number}" for kind in KINDS for number in range(CASES)]


@pytest.mark.parametrize("case", _ids())
def test_nonsense_is_told_or_harmless(case: str, bases: Bases, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    kind = case.rpartition("-")[0]
    draw = random.Random(f"{SEED} {case}")
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    temporary.mkdir()
    if kind == "data":
        model = draw.choice(("cores", "shards"))
    elif kind == "arguments":
        model = draw.choice(MODELS)
    else:
        model = draw.choice(SPOILS[kind][1])
    shutil.copytree(bases.place / model, work / "model")
    shutil.copytree(bases.place / "dense", work / "beside")
    for name in ("dev.tsv", "dev.txt"):
        shutil.copyfile(bases.place / name, work / name)
    if kind in SPOILS:
        spoilt = SPOILS[kind][0](work / "model", draw)
    command = _command(kind, model, draw)
    if kind == "data":
        spoilt = mutations.data(work / next(part for part in command if part in ("dev.tsv", "dev.txt")), draw)
    elif kind == "arguments":
        spoilt = "the arguments"

    before = tree(work)
    limits = LIMITS.format(temporary=str(temporary))
    ended = bases.server.run(*command, cwd=work, log=tmp_path / "log", before=limits, watch=True)
    faults = [*_faults(ended, work, temporary, before, kind, command)]
    if ended.code == 0 and not faults:
        faults += _differences(ended, work, command, bases, model, kind)
    assert not faults, "\n".join(
        [
            *faults,
            f"spoilt: {model}, {spoilt}",
            f"command: mpocli {shlex.join(command)}",
            f"exit {ended.code}: {ended.err[-1500:]}",
            f"again: FUZZ_SEED={SEED} FUZZ_CASES={CASES} pytest -n 0 '{request.node.nodeid}'",
        ]
    )


def _faults(
    ended: Ended, work: Path, temporary: Path, before: dict[str, str], kind: str, command: list[str]
) -> list[str]:
    """What no input excuses."""
    faults = []
    if ended.code not in (0, 2, 3, 4, 5):
        faults.append(
            "a bug, or it did not end" if ended.code in (1, -14, -24) else "an exit code that is not documented"
        )
    faults += [f"{word!r} on stderr" for word in ("Traceback", "Exception ignored", "panicked") if word in ended.err]
    if ended.code not in (0, 5) and ended.code > 0 and "error: " not in ended.err:
        faults.append("no error is told")
    after = tree(work)
    faults += [f"{path} was changed" for path in before if after.get(path) != before[path]]
    new = {path for path in after if path not in before}
    mine = {path for path in new if Path(path).parts[0] == "out"} if ended.code in (0, 5) and "-o" in command else set()
    if kind != "arguments" or ended.code not in (0, 5):  # an option may name a file of its own
        faults += [f"{path} was left" for path in sorted(new - mine)]
    faults += [f"{path} was left in TMPDIR" for path in tree(temporary)]
    allowed = (str(temporary), str(work / "out"), str(work / ".out."), "/dev/null", "/proc/self/clear_refs")
    for event, path in ((event, path) for event, *paths in ended.writes for path in paths):
        inside = path.startswith(allowed) or (kind == "arguments" and Path(path).parent == work and path != str(work))
        if not inside and path not in map(str, (work, *work.parents)):
            faults.append(f"{event} outside of the output: {path}")
    if mine:
        try:
            json.loads((work / "out" / "config.json").read_text())
            assert _tensors(work / "out")
        except Exception as error:
            faults.append(f"an output that cannot be used: {error!r}")
    return faults


def _differences(ended: Ended, work: Path, command: list[str], bases: Bases, model: str, kind: str) -> list[str]:
    """What was accepted though its tensors are as before has to compute the same."""
    if kind == "weights" and "--verify" in command and model != "classifier":
        return ["--verify accepts other numbers"]
    if kind not in SAME:
        return []
    if command[0] == "merge" and model in bases.merged:
        made, right = _tensors(work / "out"), bases.merged[model]
        if made.keys() != right.keys():
            return [f"other tensors: {sorted(made.keys() ^ right.keys())[:3]}"]
        return [f"{name} differs" for name, value in right.items() if not torch.equal(made[name], value)]
    if command[0] == "eval" and SAME[kind]:
        found = json.loads(ended.out)["metrics"]
        return [] if found == bases.scores[model] else [f"{found} is not {bases.scores[model]}"]
    return []
