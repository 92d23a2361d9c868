"""A signal in the middle of training costs no step: a resumed run ends with the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli import tasks
from cli.processes import Server
from cli.shell import tree

COMMON = ["--max-length", 32, "--steps", 12, "--batch-size", 8, "--lr", 1e-3, "--device", "cpu", "--log-steps", 5]
SST2 = ["--task", "sst2", "--train", "{lab}/train.tsv", "--eval", "{lab}/dev.tsv", *COMMON, "--json", "-o"]
LM = ["--task", "lm", "--train", "{lab}/train.txt", *COMMON, "--json", "-o"]

# The command, the step in which the signal comes, and where the checkpoint of that step is.
RUNS: dict[str, tuple[list[Any], str, int, str]] = {
    "auxiliary cores": (["finetune", "mpo", "--accumulation", 2, *SST2], "SIGINT", 14, "checkpoint-7"),
    "the best epoch": (["finetune", "mpo", "--select", "best", "--limit", 44, *SST2], "SIGTERM", 3, "checkpoint-3"),
    "masked tokens": (["finetune", "masked", *LM], "SIGHUP", 2, "checkpoint-2"),
    "over-parameterised, scoring": (
        ["finetune", "body", "--overparam", "dynamic", "--top-n", 2, "--every", 5, *SST2],
        "SIGINT",
        4,
        "segment-0/checkpoint-4",
    ),
    "sparse": (["sparsify", "body", "--sparsity", 0.5, *SST2], "SIGINT", 12, "checkpoint-12"),
}
CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


@pytest.mark.parametrize("name", RUNS)
def test_a_signal_costs_no_step(name: str, lab: Path, trainer: Server, work: Path, tmp_path: Path) -> None:
    """Between two logs too: what is logged afterwards is the mean over the same steps."""
    command, signal, step, checkpoint = RUNS[name]
    filled = [part.format(lab=lab) if isinstance(part, str) else part for part in command]
    arguments = [filled[0], lab / filled[1], *filled[2:]]
    whole = trainer.run(*arguments, "whole", cwd=work, log=tmp_path / "log")
    assert whole.code == 0, whole.err
    stopped = trainer.run(*arguments, "cut", cwd=work, log=tmp_path / "log", before=tasks.signalled(step, signal))
    assert stopped.code == CODES[signal] and not (work / "cut").exists(), stopped.err
    assert (work / "cut.training" / checkpoint / "trainer_state.json").is_file()
    ended = trainer.run(*arguments, "cut", "--resume", cwd=work, log=tmp_path / "log")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["metrics"] == json.loads(whole.out)["metrics"]
    assert tree(work / "cut") == tree(work / "whole")
    assert not list(work.glob("*.training"))


def test_a_second_signal_does_not_wait(lab: Path, trainer: Server, work: Path, tmp_path: Path) -> None:
    arguments = ["finetune", lab / "mpo", *(part.format(lab=lab) if isinstance(part, str) else part for part in SST2)]
    twice = tasks.signalled(3, "SIGINT", "SIGINT")
    stopped = trainer.run(*arguments, "cut", cwd=work, log=tmp_path / "log", before=twice)
    assert stopped.code == 130
    assert not list(work.iterdir())  # no checkpoint, so nothing to resume
