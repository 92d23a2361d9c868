"""Whatever ends a command and whenever: its output is absent or whole, and the same command then makes it to the byte.

Each test ends one run right before one of its changes of the file system. A fixed seed draws which, one from each of as
many equal parts of the run as it is ended; the test's name draws it again. `KILLS_SEED=5 KILLS_TIMES=5` draws others,
and five times as many.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cli import tasks
from cli.processes import WRITE, Ended, Moment, Server
from cli.shell import tree

SEED = int(os.environ.get("KILLS_SEED", "17"))
TIMES = int(os.environ.get("KILLS_TIMES", "1"))


@dataclass(frozen=True)
class Command:
    """What is run on `model`. It is killed so many `times`, and asked to end half as often; training `resumes`."""

    model: str
    words: str
    times: int
    resumes: bool = False


_DATA = "--task lm --train train.txt --max-length 16 --batch-size 8"
_STEPS = "--steps 6 --save-steps 2"
_ROUNDS = "--rounds 2 --max-drop 1000000 --order cumulative --per-param --finetune-steps 3 --save-steps 2"
_CALIBRATED = "--calibrate train.txt --seq-len 16 --samples 8"
COMMANDS = {
    "decompose": Command("dense", "decompose model --trunc 6", 4),
    "decompose-calibrated": Command("dense", f"decompose model --ratio 0.6 {_CALIBRATED}", 2),
    "merge": Command("cores", "merge model", 2),
    "sparsify": Command("dense", "sparsify model --method magnitude --sparsity 0.5", 2),
    "sparsify-calibrated": Command("dense", f"sparsify model --method wanda --sparsity 0.5 {_CALIBRATED}", 2),
    "sparsify-trained": Command("dense", f"sparsify model --sparsity 0.5 {_DATA} {_STEPS}", 2, resumes=True),
    "quantize": Command("cores", "quantize model --bits 3", 1),
    "quantize-calibrated": Command("dense", f"quantize model {_CALIBRATED}", 1),
    "expand-moe": Command("dense", "expand-moe model --experts 2", 2),
    "finetune": Command("cores", f"finetune model {_DATA} {_STEPS} --eval train.txt", 3, resumes=True),
    "squeeze": Command("cores", f"squeeze model {_DATA} {_ROUNDS} --eval train.txt", 4, resumes=True),
}
SIGNALS = {"kill": (signal.SIGKILL, -9), "interrupt": (signal.SIGINT, 130), "terminate": (signal.SIGTERM, 143)}
# What a run that was killed may leave, and where: the next one with this output sweeps it up.
REMAINS = {".out.lock", ".out.partial", "out.training"}
GIVEN = {"model", "train.txt"}
# In a report, and not the same from one run to the next.
PASSING = {"seconds", "step_seconds", "resumed_from"}


def _times(name: str, how: str) -> int:
    return TIMES * (COMMANDS[name].times if how == "kill" else max(1, COMMANDS[name].times // 4))


@dataclass(frozen=True)
class Whole:
    """What an undisturbed run made and told, and the changes of the file system that it did so by."""

    output: dict[str, str]
    report: dict[str, Any]
    changes: tuple[tuple[str, ...], ...]


class Stage:
    """The models, and what each command makes of its one undisturbed."""

    def __init__(self, server: Server, place: Path) -> None:
        self._server, self.place = server, place
        tasks.save("gpt2", place / "dense")
        tasks.prose(place / "train.txt", 16, 1)
        ended = server.run("decompose", "dense", "--trunc", 6, "-o", "cores", cwd=place, log=place / "log")
        assert ended.code == 0, ended.err
        self.whole = cache(self._whole)

    def furnish(self, directory: Path, model: str, *, old: bool) -> Path:
        """A directory to run in: the model, a text, and at the output an old one where there is to be one."""
        work = directory / "work"
        shutil.copytree(self.place / model, work / "model")
        shutil.copyfile(self.place / "train.txt", work / "train.txt")
        if old:
            shutil.copytree(self.place / model, work / "out")
        (directory / "temporary").mkdir()
        return work

    def run(self, work: Path, *words: str, moment: Moment | None = None, watch: bool = False) -> Ended:
        """In `work`, with a TMPDIR beside it, and with an end to whatever would wait for ever."""
        before = f"import os, signal; os.environ['TMPDIR'] = {str(work.parent / 'temporary')!r}; signal.alarm(200)"
        before += "; import tempfile; tempfile.tempdir = None"
        options = ["-o", "out", "--json"]
        log = work.parent / "log"
        return self._server.run(*words, *options, cwd=work, log=log, moment=moment, before=before, watch=watch)

    def _whole(self, name: str, old: bool) -> Whole:
        command = COMMANDS[name]
        work = self.furnish(self.place / f"{name}-{old}", command.model, old=old)
        ended = self.run(work, *command.words.split(), *_overwrite(old), watch=True)
        assert ended.code == 0, ended.err
        assert {path.name for path in work.iterdir()} == {*GIVEN, "out"}
        return Whole(tree(work / "out"), _report(ended), ended.writes)


def _overwrite(wanted: object) -> list[str]:
    return ["--overwrite"] if wanted else []


def _report(ended: Ended) -> dict[str, Any]:
    return {key: value for key, value in json.loads(ended.out).items() if key not in PASSING}


@pytest.fixture(scope="module")
def stage(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(server, tmp_path_factory.mktemp("kills"))


CASES = [f"{name}-{how}-{number}" for name in COMMANDS for how in SIGNALS for number in range(_times(name, how))]


@pytest.mark.parametrize("case", CASES)
def test_an_end_before_any_change_leaves_no_half_and_costs_nothing(
    case: str, stage: Stage, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Over an old output or none; a run that is killed the second time is killed once more as it is made good."""
    name, how, number = case.rsplit("-", 2)
    command, (sent, code) = COMMANDS[name], SIGNALS[how]
    draw = random.Random(f"{SEED} {case}")
    old = draw.random() < 0.5
    whole = stage.whole(name, old)
    place = int((int(number) + draw.random()) / _times(name, how) * len(whole.changes))
    work = stage.furnish(tmp_path, command.model, old=old)
    model, before = tree(work / "model"), tree(work / "out")
    words = command.words.split()
    faults: list[str] = []

    def check(claim: bool, fault: str) -> None:
        if not claim:
            faults.append(fault)

    def looked_at(ended: Ended, code: int, remains: set[str]) -> list[str]:
        """Checks what a run that was ended has left; the options that make it good."""
        found, left = tree(work / "out"), {path.name for path in work.iterdir()} - {*GIVEN, "out"}
        check(ended.code in (code, 0), f"exit {ended.code}, not {code}")
        check("Traceback" not in ended.err, "a traceback")
        check(tree(work / "model") == model, "the input was changed")
        check(found in (before, whole.output), f"a half output: {sorted(found)}")
        check(left <= remains, f"left: {sorted(left)}")
        return ["--resume"] if "out.training" in left else _overwrite(found)

    moment = Moment(WRITE, "", place + 1, sent)
    ended = stage.run(work, *words, *_overwrite(old), moment=moment)
    if how == "kill":
        more = looked_at(ended, code, REMAINS)
    else:
        more = looked_at(ended, code, {"out.training"} if command.resumes else set())
        temporary = sorted(path.name for path in (tmp_path / "temporary").iterdir())
        check(not temporary, f"left in TMPDIR: {temporary}")
    told = [f"{how} before change {place + 1} of {len(whole.changes)}: {' '.join(whole.changes[place])}"]
    told += [f"exit {ended.code}: {ended.err[-800:]}"]
    if how == "kill" and int(number) % 2:
        place = draw.randrange(len(whole.changes))
        ended = stage.run(work, *words, *more, moment=Moment(WRITE, "", place + 1))
        told += [f"with {more} killed before change {place + 1}, exit {ended.code}: {ended.err[-800:]}"]
        more = looked_at(ended, 3 if _holds_nothing(ended) else code, REMAINS)

    again = stage.run(work, *words, *more)
    if _holds_nothing(again):
        again = stage.run(work, *words, "--overwrite")
    told += [f"at last exit {again.code}: {again.err[-800:]}"]
    check(again.code == 0, f"the same command again ends with {again.code}")
    differ = sorted({path for path, _ in tree(work / "out").items() ^ whole.output.items()})
    check(not differ, f"the same command again makes other files: {differ}")
    if again.code == 0:
        found = _report(again)
        differ = [key for key in whole.report if found.get(key) != whole.report[key]]
        check(not differ, f"the same command again reports another {differ}")
    check(tree(work / "model") == model, "the input was changed at last")
    rest = {path.name for path in work.iterdir()} - {*GIVEN, "out"}
    check(not rest, f"left at last: {sorted(rest)}")
    call = f"mpocli {shlex.join(words)} -o out" + (", over an old output" if old else "")
    replay = f"again: KILLS_SEED={SEED} KILLS_TIMES={TIMES} pytest -n 0 '{request.node.nodeid}'"
    assert not faults, "\n".join([*faults, call, *told, replay])


def _holds_nothing(ended: Ended) -> bool:
    """There is a directory of checkpoints, and it ended before anything in it was worth going on from."""
    return ended.code == 3 and "no interrupted run" in ended.err
