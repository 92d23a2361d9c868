"""`mpocli finetune --overparam`: what is expanded and when, who trains it, and what is left in the end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from strangers import run_stranger

from cli import tasks
from cli.processes import Moment, Server
from cli.shell import WEIGHTS, Cli, refused, succeeded, tree
from mpocli.methods.training import fit as fitting
from mpocli.train.loop.optimizer_state import take_moments

Train = Callable[..., dict[str, Any]]
KINDS = 6  # query, key, value, output, up, down


def sst2(lab: Path, *more: object) -> list[object]:
    files = ["--task", "sst2", "--train", lab / "train.tsv", "--eval", lab / "dev.tsv", "--max-length", 32]
    return [*files, "--batch-size", 8, "--lr", 3e-3, "--steps", 12, "--log-steps", 1, "--json", *more]


def chosen(method: str) -> list[object]:
    """Two matrices of each kind, in two portions where a method has such."""
    portions: list[object] = ["--splits", 2, "--every", 3] if method == "dynamic" else []
    return [*([] if method == "svd" else ["--top-n", 2]), *portions]


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of four layers without dropout."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return tasks.save("bert", tmp_path_factory.mktemp("body") / "body", initializer_range=0.1, layers=4, **still)


@pytest.fixture
def train(cli: Cli, lab: Path, body: Path, work: Path) -> Train:
    def run(out: str, *more: object, model: Path | None = None) -> dict[str, Any]:
        return succeeded(cli("finetune", model or body, *sst2(lab, *more), "-o", out)).json

    return run


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / WEIGHTS)


# --- what comes out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["static", "dynamic", "svd"])
def test_the_output_is_an_ordinary_checkpoint_of_the_original_size(
    method: str, train: Train, body: Path, work: Path
) -> None:
    report = train("out", "--overparam", method, *chosen(method))
    found = report["overparam"]
    plain = tf.AutoModelForSequenceClassification.from_pretrained(body)
    size = sum(parameter.numel() for parameter in plain.parameters())
    assert found["deployed_params"] == report["totals"]["params"] == report["totals"]["dense_params"] == size
    added = sum(one["params"] - one["dense_params"] for one in found["expanded"])
    assert found["training_params"] == size + added > size
    assert report["trainable_params"] == found["training_params"]
    assert found["fold_difference"] <= 1e-5 * max(1.0, found["largest_logit"])
    assert "quantization_config" not in json.loads((work / "out" / "config.json").read_text())
    stored = weights(work / "out")
    assert {name: t.shape for name, t in stored.items()} == {n: p.shape for n, p in plain.state_dict().items()}
    entry = json.loads((work / "out" / "mpo.json").read_text())["history"][-1]
    assert entry["options"]["overparam"] == method
    assert entry["overparam"]["expanded"] == found["expanded"]


def test_it_loads_without_mpocli_and_computes_what_was_measured(train: Train, lab: Path, work: Path) -> None:
    report = train("out", "--overparam", "svd")
    script = """
import sys, json, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained("out").eval()
tokenizer = AutoTokenizer.from_pretrained("out")
rows = [line.rsplit("\\t", 1) for line in open(sys.argv[1]).read().splitlines()[1:]]
with torch.no_grad():
    batch = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
    guesses = model(**batch).logits.argmax(-1).tolist()
assert not any(name.startswith("mpocli") for name in sys.modules)
print(sum(guess == int(label) for guess, (_, label) in zip(guesses, rows)) / len(rows))
"""
    ended = run_stranger(script, lab / "dev.tsv", cwd=work)
    assert ended.code == 0, ended.err
    assert abs(float(ended.out) - report["metrics"]["accuracy"]) <= 1e-9


def test_expanded_matrices_move_and_otherwise_than_plain_ones(train: Train, body: Path, work: Path) -> None:
    """The published code trains none of them. All arms begin with the same function and the same batches."""
    before = tf.AutoModel.from_pretrained(body).state_dict()
    chosen = {one["module"] for one in train("svd", "--overparam", "svd")["overparam"]["expanded"]}
    train("deep", "--overparam", "static", "--top-n", 4, "--score-steps", 1)
    train("none", "--overparam", "none", "--mpo-lr", 3e-3)
    arms = {name: weights(work / name) for name in ("svd", "deep", "none")}
    assert len(chosen) == KINDS * 4
    for name in chosen:
        moved = {
            arm: found[f"{name}.weight"] - before[f"{name.removeprefix('bert.')}.weight"] for arm, found in arms.items()
        }
        norms = {arm: float(change.norm()) for arm, change in moved.items()}
        assert min(norms.values()) > 1e-3, (name, norms)
        for arm in ("svd", "deep"):
            apart = float((moved[arm] - moved["none"]).norm())
            assert apart > 0.1 * norms["none"], (name, arm)


# --- what is expanded, and when -----------------------------------------------------------------------------------


def test_dynamic_expands_its_portions_of_every_kind_when_it_should(train: Train, work: Path) -> None:
    report = train("out", "--overparam", "dynamic", "--top-n", 3, "--splits", 2, "--every", 4)
    found = report["overparam"]["expanded"]
    by_step: dict[int, dict[str, int]] = {}
    for one in found:
        kind = by_step.setdefault(one["step"], {})
        kind[one["group"]] = kind.get(one["group"], 0) + 1
    assert {step: set(kind.values()) for step, kind in by_step.items()} == {4: {1}, 8: {2}}
    assert all(len(kind) == KINDS for kind in by_step.values())
    assert len({one["module"] for one in found}) == len(found) == 3 * KINDS
    # Each time the best of its kind that were left, by the scores up to then.
    scores = report["overparam"]["scores"]
    for group in by_step[4]:
        first = [one for one in found if one["group"] == group and one["step"] == 4]
        others = [one for one in found if one["group"] == group and one["step"] == 8]
        rest = {name for name in scores if re.sub(r"\.\d+\.", ".*.", name) == group} - {o["module"] for o in found}
        assert len(rest) == 1 and all(one["score"] >= scores[name] for one in others for name in rest)
        assert len(first) == 1
    lines = tasks.logged(work / "out")
    assert [line["step"] for line in lines] == list(range(1, 13))
    # One schedule over all segments: a warm-up of one step, then down to zero without a jump.
    rates = [line["learning_rate"] for line in lines]
    falls = [rates[k] - rates[k + 1] for k in range(1, 11)]
    assert rates[1] == max(rates) and all(abs(fall - falls[0]) <= 1e-12 for fall in falls)


def test_static_spends_some_of_the_steps_on_its_scores(train: Train, work: Path) -> None:
    report = train("out", "--overparam", "static", "--top-n", 1, "--score-steps", 5)
    found = report["overparam"]
    assert found["score_steps"] == 5 and report["steps"] == 12
    assert [line["step"] for line in tasks.logged(work / "out")] == list(range(1, 8))
    assert len(found["expanded"]) == KINDS and {one["step"] for one in found["expanded"]} == {0}
    for one in found["expanded"]:
        rivals = [name for name in found["scores"] if re.sub(r"\.\d+\.", ".*.", name) == one["group"]]
        assert len(rivals) == 4 and one["score"] == max(found["scores"][name] for name in rivals)


def test_scores_from_a_fine_tuned_model_cost_no_steps(
    train: Train, cli: Cli, lab: Path, body: Path, work: Path
) -> None:
    train("tuned")
    report = train("out", "--overparam", "static", "--top-n", 1, "--score-from", work / "tuned")
    assert report["overparam"]["score_steps"] == 0 and len(tasks.logged(work / "out")) == 12
    untrained = cli("finetune", body, *sst2(lab, "--overparam", "static", "--score-from", body), "-o", "no")
    refused(untrained, 3, "--score-from", told="new for task sst2")


@pytest.mark.parametrize("method", ["static", "dynamic", "svd"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_optimiser_owns_exactly_the_live_tensors_of_every_segment(
    method: str, accumulation: int, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all that lived before goes on with the state that it had: nothing starts anew but nothing old either."""
    seen = []
    real = fitting.train_segment

    def watched(trainer: Any, resume: Any = None) -> None:
        given = {name: dict(state) for name, state in (trainer.moments or {}).items()}
        real(trainer, resume)
        model = trainer.model
        held = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
        live = list(model.parameters())
        assert len(held) == len(live) and {id(p) for p in held} == {id(p) for p in live}
        state = take_moments(model, trainer.optimizer)
        assert state.keys() == dict(model.named_parameters()).keys()
        assert given.keys() == (state.keys() if given else set())
        seen.append({float(found["step"]) for found in state.values()})

    monkeypatch.setattr(fitting, "train_segment", watched)
    train("out", "--overparam", method, *chosen(method), "--accumulation", accumulation)
    steps = {"static": [{3.0}, {9.0}], "dynamic": [{3.0}, {6.0}, {12.0}], "svd": [{12.0}]}[method]
    assert seen == steps


@pytest.mark.parametrize("kind", ["gpt2", "t5", "masked"])
def test_language_models_and_text_to_text_train_so_too(kind: str, cli: Cli, lab: Path, work: Path) -> None:
    lm = ["--task", "lm", "--train", lab / "train.txt", "--eval", lab / "dev.txt"]
    e2e = ["--task", "e2e", "--train", lab / "e2e-train.csv", "--eval", lab / "e2e-dev.csv", "--max-new-tokens", 4]
    options = [*(e2e if kind == "t5" else lm), "--max-length", 24, "--batch-size", 8, "--steps", 6, "--lr", 1e-3]
    options += ["--overparam", "dynamic", "--top-n", 1, "--splits", 1, "--every", 2, "--json"]
    report = succeeded(cli("finetune", lab / kind, *options, "-o", "out")).json
    groups = {one["group"] for one in report["overparam"]["expanded"]}
    if kind == "t5":
        assert any("EncDecAttention" in group for group in groups)
    assert report["overparam"]["fold_difference"] <= 1e-5 * max(1.0, report["overparam"]["largest_logit"])
    chosen = ["--task", "e2e", "--max-new-tokens", 4] if kind == "t5" else ["--task", "lm"]
    dev = lab / ("e2e-dev.csv" if kind == "t5" else "dev.txt")
    found = succeeded(cli("eval", "out", *chosen, "--eval", dev, "--max-length", 24, "--json"))
    for name, value in found.json["metrics"].items():
        assert abs(value - report["metrics"][name]) <= 1e-6 * max(1.0, abs(value))


def test_shapes_can_be_named_and_layers_chosen(train: Train) -> None:
    shape = ["--shape", "*query=4,1,8x8,1,4", "--sites", 2, "--layers", "attention"]
    found = train("out", "--overparam", "static", "--top-n", 1, "--score-steps", 1, *shape)["overparam"]["expanded"]
    assert len(found) == 4
    for one in found:
        wanted = ([4, 1, 8], [8, 1, 4]) if one["module"].endswith("query") else None
        assert (one["out_dims"], one["in_dims"]) == wanted if wanted else len(one["out_dims"]) == 2


def test_the_sceptic_s_arm_raises_the_rate_of_the_same_matrices_alone(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, rates = fitting.train_segment, {}

    def watched(trainer: Any, resume: Any = None) -> None:
        real(trainer, resume)
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        for group in trainer.optimizer.param_groups:
            rates.update({names[id(parameter)]: group["initial_lr"] for parameter in group["params"]})

    monkeypatch.setattr(fitting, "train_segment", watched)
    report = train("out", "--overparam", "none", "--mpo-lr", 0.02, "--layers", "ffn")
    raised = {name for name, rate in rates.items() if rate == 0.02}
    assert raised == {
        f"bert.encoder.layer.{k}.{part}.dense.weight" for k in range(4) for part in ("intermediate", "output")
    }
    assert {rate for name, rate in rates.items() if name not in raised} == {3e-3}
    assert report["overparam"] is None


# --- killed, in two processes, on bad input -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "moments"),
    [
        (
            "dynamic",
            [
                Moment("open", r"state-2\.partial/record\.json"),
                Moment("open", r"metrics\.jsonl", number=14),
                Moment("open", r"segment-2/checkpoint-6/trainer_state\.json"),
            ],
        ),
        (
            "static",
            [Moment("open", r"scoring/checkpoint-3/trainer_state\.json"), Moment("open", r"metrics\.jsonl", number=8)],
        ),
    ],
    ids=["dynamic", "static"],
)
def test_killed_and_resumed_gives_the_bytes_of_the_uninterrupted_run(
    method: str, moments: list[Moment], lab: Path, body: Path, trainer: Server, work: Path, tmp_path: Path
) -> None:
    """Between expansions, before one is written, and within a segment."""
    options = ["--overparam", method, *chosen(method), "--save-steps", 2, "-o"]
    arguments = ["finetune", body, *sst2(lab, *options)]
    whole = trainer.run(*arguments, "whole", cwd=work, log=tmp_path / "log")
    assert whole.code == 0, whole.err
    wanted = json.loads(whole.out)
    for number, moment in enumerate(moments):
        killed = trainer.run(*arguments, f"cut{number}", cwd=work, log=tmp_path / "log", moment=moment)
        assert killed.code == -9 and not (work / f"cut{number}").exists()
        ended = trainer.run(*arguments, f"cut{number}", "--resume", cwd=work, log=tmp_path / "log")
        assert ended.code == 0, ended.err
        found = json.loads(ended.out)
        for key in ("metrics", "metrics_before", "overparam", "trainable_params"):
            assert found[key] == wanted[key], key
        assert tree(work / f"cut{number}") == tree(work / "whole")


def test_two_processes_expand_the_same_and_train_as_one_with_twice_the_batch(
    cli: Cli, lab: Path, body: Path, trainer: Server, work: Path, tmp_path: Path
) -> None:
    options = ["--task", "sst2", "--train", lab / "train.tsv", "--max-length", 32, "--lr", 1e-3, "--steps", 9]
    options += ["--overparam", "dynamic", "--top-n", 2, "--splits", 2, "--every", 3, "--device", "cpu", "--json"]
    command = ["finetune", body, *options, "--batch-size", 4, "-o", "two"]
    done = trainer.run(*command, cwd=work, log=tmp_path / "log", ranks=2)
    assert done.code == 0, done.err
    two = json.loads(done.out)
    one = succeeded(cli("finetune", body, *options, "--batch-size", 8, "-o", "one")).json
    chosen = [[(found["module"], found["step"]) for found in report["overparam"]["expanded"]] for report in (one, two)]
    assert chosen[0] == chosen[1]
    first, second = weights(work / "one"), weights(work / "two")
    # A key's bias has no gradient but rounding, of which Adam makes a step.
    names = [name for name in first if not name.endswith("key.bias")]
    assert max(float((first[name] - second[name]).abs().max()) for name in names) <= 1e-4


BAD: dict[str, tuple[list[object], int, str]] = {
    "unknown method": (["--overparam", "magic"], 2, "'magic'"),
    "shapes of nothing": (["--shape", "*query=4,8x8,4"], 2, "--shape without --overparam"),
    "no roles": (["--overparam", "svd", "--layers", "nonsense"], 2, "'nonsense'"),
    "roles without matrices": (["--overparam", "svd", "--layers", "pooler", "--shape", "*x=4,8x8,4"], 2, "'*x'"),
    "shape of another size": (["--overparam", "svd", "--shape", "*query=4,4x8,4"], 3, "query"),
    "more splits than matrices": (["--overparam", "dynamic", "--top-n", 1, "--splits", 2], 2, "--splits"),
    "a portion too late": (["--overparam", "dynamic", "--every", 6], 2, "--every 6 with --splits 2: the last portion"),
    "more portions than steps": (["--overparam", "dynamic", "--splits", 3, "--steps", 3], 2, "--splits 3"),
    "only scores": (["--overparam", "static", "--score-steps", 12], 2, "--score-steps 12 of 12 steps"),
    "one site": (["--overparam", "static", "--sites", 1], 2, "--sites"),
    "frozen cores": (["--overparam", "svd", "--update", "all", "--select", "best"], 2, "--select"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused_before_any_work(name: str, cli: Cli, lab: Path, body: Path, work: Path) -> None:
    options, code, word = BAD[name]
    refused(cli("finetune", body, *sst2(lab, *options), "-o", "out"), code, word)
    assert not list(work.iterdir())


def test_a_decomposed_model_is_refused(cli: Cli, lab: Path, work: Path) -> None:
    refused(cli("finetune", lab / "mpo", *sst2(lab, "--overparam", "svd"), "-o", "out"), 3, "MPOs already", "merge")
