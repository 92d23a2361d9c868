"""`eval --lm-eval` honours what every other evaluation does; the harness itself is stood in for by its one function."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cli.shell import Cli, refused, succeeded

Calls = list[dict[str, Any]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What `lm_eval.simple_evaluate` is called with; its results have the form of lm_eval 0.4's."""
    made: Calls = []

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        made.append(options)
        sys.stdout.write("the harness talks on stdout\n")
        if "nowhere" in options["tasks"]:
            raise KeyError("nowhere")
        small = "mpo" in str(options["model_args"]["pretrained"])
        results = {"alias": "x", "acc,none": 0.25 if small else 0.5, "acc_stderr,none": 0.01, "ppl,none": 9.0}
        return {
            "results": dict.fromkeys(options["tasks"], results),
            "n-samples": {task: {"original": 9, "effective": options["limit"] or 9} for task in options["tasks"]},
            "higher_is_better": {task: {"acc": True, "ppl": False} for task in options["tasks"]},
        }

    module = ModuleType("lm_eval")
    module.__spec__ = ModuleSpec("lm_eval", None)
    vars(module)["simple_evaluate"] = simple_evaluate
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    return made


def test_json_baseline_and_the_harness_s_own_options_are_honoured(
    cli: Cli, calls: Calls, bert: Path, bert_mpo: Path
) -> None:
    options = ["--batch-size", 4, "--limit", 3, "--num-fewshot", 2, "--max-length", 24, "--precision", "fp32"]
    done = succeeded(cli("eval", bert_mpo, "--lm-eval", "a,b", "--baseline", bert, *options, "--json"))
    report = done.json
    assert report["schema"] == "mpocli.eval/1" and report["samples"] == 6
    assert report["metrics"] == {"a/acc": 0.25, "a/ppl": 9.0, "b/acc": 0.25, "b/ppl": 9.0}
    assert report["baseline"]["metrics"]["a/acc"] == 0.5
    assert report["totals"]["params"] < report["baseline"]["totals"]["params"]
    assert "the harness talks" in done.err
    assert [call["model_args"]["pretrained"] for call in calls] == [str(bert_mpo), str(bert)]
    for call in calls:
        assert call["device"] == ("cuda" if torch.cuda.is_available() else "cpu")  # lm_eval takes none for cuda
        assert (call["batch_size"], call["limit"], call["num_fewshot"], call["tasks"]) == (4, 3, 2, ["a", "b"])
        assert (call["model_args"]["max_length"], call["model_args"]["dtype"]) == (24, "float32")


@pytest.mark.parametrize(
    ("gate", "missed"),
    [
        (["--fail-below", "acc=2"], "acc is 0.2500, at least 2"),
        (["--fail-below", "acc=20%"], ""),
        (["--fail-below", "ppl=8"], "ppl is 9.0000, at most 8"),
        (["--fail-below", "ppl=10"], ""),
        (["--max-drop", "acc=0.1"], "acc went from 0.5000 to 0.2500"),
        (["--max-drop", "acc=0.3"], ""),
    ],
)
def test_gates_decide_on_the_harness_s_metrics(
    gate: list[str], missed: str, cli: Cli, calls: Calls, bert: Path, bert_mpo: Path
) -> None:
    done = cli("eval", bert_mpo, "--lm-eval", "a", "--baseline", bert, *gate)
    assert done.code == (5 if missed else 0) and missed in done.err
    assert "0.2500" in done.out


def test_what_the_harness_does_not_know_is_one_line(cli: Cli, calls: Calls, bert: Path) -> None:
    done = cli("eval", bert, "--lm-eval", "nowhere")
    assert done.code == 3 and "error: lm_eval on" in done.err and "KeyError" in done.err and "Traceback" not in done.err
    none = cli("eval", bert, "--lm-eval", "a", "--fail-below", "f1=0.5")
    assert none.code == 3 and "no metric 'f1'" in none.err and "acc" in none.err
    for options in (["--limit", 0], ["--num-fewshot", -1], ["--batch-size", 0]):
        refused(cli("eval", bert, "--lm-eval", "a", *options), 2, str(options[0]))
