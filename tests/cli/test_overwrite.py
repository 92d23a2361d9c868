"""The output directory appears whole or not at all, whatever ends the run."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import models
import pytest
import transformers as tf

from cli.processes import Ended, Moment, Server
from cli.shell import WEIGHTS, Cli, refused, succeeded, tree
from mpocli.hf import side_files, surroundings
from mpocli.io.output import output_directory
from mpocli.io.writer import CheckpointWriter


@dataclass(frozen=True)
class Stage:
    """A model, the directory that stands at `out`, what is in it, and what a run that overwrites it makes."""

    server: Server
    model: Path
    before: Path
    old: dict[str, str]
    new: dict[str, str]
    cpu: float  # seconds of processor time of that run

    def overwrite(self, work: Path, moment: Moment | None = None, limit: int | None = None) -> Ended:
        command = ("decompose", self.model, "--trunc", 24, "-o", "out", "--overwrite")
        return self.server.run(*command, cwd=work, log=work.parent / "log", moment=moment, limit=limit)

    def finishes_and_sweeps(self, work: Path) -> None:
        ended = self.overwrite(work)
        assert ended.code == 0, ended.err
        assert tree(work / "out") == self.new
        assert [path.name for path in work.iterdir()] == ["out"]


def _stage(server: Server, model: Path, work: Path) -> Stage:
    options = ("--layers", "pooler", "-o", "before")
    ended = server.run("decompose", model, *options, cwd=work, log=work / "log")
    assert ended.code == 0, ended.err
    stage = Stage(server, model, work / "before", tree(work / "before"), {}, 0.0)
    (work / "new").mkdir()
    ended = stage.overwrite(work / "new")
    assert ended.code == 0, ended.err
    new = tree(work / "new" / "out")
    assert new.keys() == stage.old.keys() and new[WEIGHTS] != stage.old[WEIGHTS]
    return replace(stage, new=new, cpu=ended.cpu)


@pytest.fixture(scope="module")
def stage(server: Server, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return _stage(server, bert, tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def slow(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A model whose decomposition takes long enough to be hit in the middle."""
    work = tmp_path_factory.mktemp("slow")
    models.bert_classifier(work / "model", hidden_size=192, intermediate_size=384, num_hidden_layers=16)
    return _stage(server, work / "model", work)


@pytest.fixture
def out(work: Path, stage: Stage) -> Path:
    """The old directory, where it is to be overwritten."""
    return Path(shutil.copytree(stage.before, work / "out"))


FIRST_BYTE = ("open", r"\.partial/new/\.spool$")


def test_a_kill_while_it_writes_leaves_the_old_directory_and_the_next_run_sweeps_up(slow: Stage, work: Path) -> None:
    shutil.copytree(slow.before, work / "out")
    killed = 0
    for part in (0.01, 0.2, 0.4, 0.6, 0.8, 1.0):
        ended = slow.overwrite(work, Moment(*FIRST_BYTE, delay=part * slow.cpu))
        if ended.code == 0:
            break  # it was done before the kill
        assert ended.code == -signal.SIGKILL
        found, left = tree(work / "out"), [path.name for path in work.iterdir() if path.name != "out"]
        if found != slow.new:
            assert found == slow.old
            assert sorted(left) == [".out.lock", ".out.partial"]  # what the kill before this one left is swept up
            killed += 1
    assert killed >= 3
    slow.finishes_and_sweeps(work)


# (audit event, pattern in its arguments, the how-manieth)
MOMENTS: dict[str, tuple[str, str, int]] = {
    "before the first byte": (*FIRST_BYTE, 1),
    "before the weight file": ("open", r"\.partial/new/model\.safetensors$", 1),
    "before the config": ("open", r"\.partial/new/config\.json$", 1),
    "before the manifest": ("open", r"\.partial/new/mpo\.json$", 1),
    "before the flush": ("open", r"\.partial/new/mpo\.json$", 2),
    "before the first renaming": ("os.rename", r"\.partial/(new|replaced)$", 1),
    "before the second renaming": ("os.rename", r"\.partial/(new|replaced)$", 2),
    "before the deletion": ("shutil.rmtree", r"\.partial/(new|replaced)$", 1),
}


def _must_come(moment: str) -> bool:
    """How the directories are exchanged is the package's business: a moment of it may not exist."""
    return "renaming" not in moment


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_this_moment_leaves_old_or_new(moment: str, stage: Stage, out: Path, work: Path) -> None:
    ended = stage.overwrite(work, Moment(*MOMENTS[moment]))
    assert ended.code == -signal.SIGKILL or (ended.code == 0 and not _must_come(moment)), ended.err
    left = [path.name for path in work.iterdir() if path != out]
    assert left or ended.code == 0, "nothing was under way"
    found = tree(out) if out.exists() else None
    stage.finishes_and_sweeps(work)
    assert found in (stage.old, stage.new), f"beside {left} stands {found or 'nothing'}"


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupt_at_this_moment_leaves_old_or_new_and_nothing_else(
    moment: str, stage: Stage, out: Path, work: Path
) -> None:
    ended = stage.overwrite(work, Moment(*MOMENTS[moment], signal=signal.SIGINT))
    assert ended.code == 130 or (ended.code == 0 and not _must_come(moment)), ended.err
    assert "Traceback" not in ended.err
    assert [path.name for path in work.iterdir()] == ["out"]
    assert tree(out) in (stage.old, stage.new)


def test_an_interrupt_in_the_middle_of_the_arithmetic_leaves_nothing(slow: Stage, work: Path) -> None:
    ended = slow.overwrite(work, Moment(*FIRST_BYTE, signal=signal.SIGINT, delay=0.4 * slow.cpu))
    assert ended.code == 130
    assert "Traceback" not in ended.err and ended.out == ""
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "ended by SIGTERM"),
        (signal.SIGHUP, 129, "ended by SIGHUP"),
    ],
    ids=str,
)
def test_whatever_asks_for_the_end_gets_one_line_its_own_exit_code_and_leaves_the_old_directory(
    number: int, code: int, words: str, stage: Stage, out: Path, work: Path
) -> None:
    ended = stage.overwrite(work, Moment(*FIRST_BYTE, signal=number))
    assert ended.code == code
    assert [line for line in ended.err.splitlines() if line] == [f"error: {words}; nothing half-written was left"]
    assert [path.name for path in work.iterdir()] == ["out"] and tree(out) == stage.old


def test_a_file_that_cannot_grow_is_exit_3_and_leaves_the_old_directory(stage: Stage, out: Path, work: Path) -> None:
    """A real failing write, in the middle of the weights."""
    ended = stage.overwrite(work, limit=50_000)
    assert ended.code == 3
    assert "Traceback" not in ended.err and ended.err.count("error: ") == 1
    assert os.strerror(errno.EFBIG) in ended.err
    assert [path.name for path in work.iterdir()] == ["out"]
    assert tree(out) == stage.old


# --- failures in this process -----------------------------------------------------------------------------------


def _full(*_arguments: object, **_options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _fail_at_add(monkeypatch: pytest.MonkeyPatch) -> None:
    add = CheckpointWriter.add

    def limited(self: CheckpointWriter, name: str, tensor: object) -> None:
        if len(self.specs) == 20:
            _full()
        add(self, name, tensor)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointWriter, "add", limited)


def _fail_at_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckpointWriter, "finish", _full)


def _fail_at_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "_write_json", _full)


def _fail_at_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_files.shutil, "copyfile", _full)


FAILURES = {
    "a tensor": _fail_at_add,
    "the weight file": _fail_at_finish,
    "the config": _fail_at_config,
    "the vocabulary": _fail_at_copy,
}


@pytest.mark.parametrize("verb", ["decompose", "merge"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_full_disk_is_one_line_and_leaves_the_old_directory(
    failure: str, verb: str, cli: Cli, mpo: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeeded(cli("merge", mpo, "--dtype", "float64", "-o", "out"))
    before = tree(work)
    assert before
    command = [verb, mpo, "-o", "out", "--overwrite"]
    with monkeypatch.context() as patch:
        FAILURES[failure](patch)
        refused(cli(*command), 3, "out", os.strerror(errno.ENOSPC))
    assert tree(work) == before
    succeeded(cli(*command))
    assert tree(work) != before


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=repr)
def test_a_renaming_that_fails_puts_the_old_directory_back(
    error: BaseException, cli: Cli, mpo: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a system cannot exchange two directories in one step, the old one has been moved aside by then."""
    succeeded(cli("merge", mpo, "--dtype", "float64", "-o", "out"))
    before = tree(work)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr(ctypes, "CDLL", _full)  # no renameat2
    outcome = cli("merge", mpo, "-o", "out", "--overwrite")
    if isinstance(error, OSError):
        refused(outcome, 3, "out", os.strerror(errno.ENOSPC))
    else:
        assert outcome.code == 130
    assert tree(work) == before


def test_directories_are_replaced_where_the_system_cannot_exchange_them(
    cli: Cli, mpo: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", _full)
    succeeded(cli("merge", mpo, "--dtype", "float64", "-o", "out"))
    before = tree(work)
    succeeded(cli("merge", mpo, "-o", "out", "--overwrite"))
    assert tree(work).keys() == before.keys() and tree(work) != before


def test_an_output_that_is_new_is_not_there_after_a_failure(
    cli: Cli, mpo: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_at_finish(monkeypatch)
    refused(cli("merge", mpo, "-o", "below/out"), 3)
    assert not [path for path in work.rglob("*") if path.is_file()]


def test_overwrite_leaves_no_file_of_the_old_directory(cli: Cli, bert: Path, work: Path) -> None:
    succeeded(cli("decompose", bert, "-o", "out", "--max-shard-size", "20KB"))
    tf.AutoTokenizer.from_pretrained(bert).save_pretrained(work / "out")  # as a user may have done
    succeeded(cli("decompose", bert, "--trunc", 8, "-o", "out", "--overwrite"))
    assert set(tree(work / "out")) == {*tree(bert), "README.md", "mpo.json"}
    assert [path.name for path in work.iterdir()] == ["out"]
    tf.BertForSequenceClassification.from_pretrained(work / "out")


@pytest.mark.parametrize("name", ["notes.txt", "results.json", "checkpoint-500/optimizer.pt", ".git/HEAD"])
def test_overwrite_does_not_delete_what_is_no_models_and_says_what_that_is(
    name: str, cli: Cli, mpo: Path, work: Path
) -> None:
    """A manifest or none: a model directory that a user works in has other files than the model's."""
    succeeded(cli("merge", mpo, "-o", "out"))
    shutil.copytree(work / "out", work / "dense")
    (work / "dense" / "mpo.json").unlink()
    for out in ("out", "dense"):
        (work / out / name).parent.mkdir(exist_ok=True)
        (work / out / name).write_text("mine")
        before = tree(work)
        refused(cli("merge", mpo, "-o", out, "--overwrite"), 3, name, "--overwrite")
        assert tree(work) == before


def test_a_pipe_in_the_manifests_place_is_not_waited_for(cli: Cli, mpo: Path, work: Path) -> None:
    succeeded(cli("merge", mpo, "-o", "out"))
    (work / "out" / "mpo.json").unlink()
    os.mkfifo(work / "out" / "mpo.json")
    succeeded(cli("merge", mpo, "-o", "out", "--overwrite"))
    assert (work / "out" / "mpo.json").is_file()


def test_an_empty_directory_needs_no_overwrite_and_a_missing_parent_is_made(cli: Cli, bert: Path, work: Path) -> None:
    (work / "empty").mkdir()
    succeeded(cli("decompose", bert, "--trunc", 8, "-o", "empty"))
    succeeded(cli("decompose", bert, "--trunc", 8, "-o", "a/b/c"))
    assert (work / "empty" / WEIGHTS).is_file() and (work / "a" / "b" / "c" / WEIGHTS).is_file()


def test_the_working_directory_is_never_deleted_from_under_the_shell(cli: Cli, bert: Path, work: Path) -> None:
    """`mkdir out; cd out; mpocli decompose … -o .` fills it or refuses, and the shell still stands in `out`."""
    outcome = cli("decompose", bert, "--trunc", 8, "-o", ".")
    if outcome.code:
        refused(outcome, 3, "working directory")
    assert Path(WEIGHTS).exists() == (outcome.code == 0)
    assert Path().samefile(work)


def test_a_directory_above_the_working_directory_is_not_replaced_either(cli: Cli, mpo: Path, work: Path) -> None:
    succeeded(cli("merge", mpo, "-o", "out"))
    (work / "out" / "below").mkdir()
    os.chdir(work / "out" / "below")
    before = tree(work)
    refused(cli("merge", mpo, "-o", "..", "--overwrite"), 3, "working directory")
    assert tree(work) == before and Path().samefile(work / "out" / "below")


def _moved_aside(work: Path) -> None:
    """As by a kill between the two renamings of a system that cannot exchange directories."""
    (work / ".out.partial").mkdir()
    (work / "out").rename(work / ".out.partial" / "replaced")
    (work / ".out.lock").touch()


def test_what_a_kill_moved_aside_is_not_overwritten_unasked(cli: Cli, mpo: Path, work: Path) -> None:
    """It is put back before the output is looked at, and then stands in the way like any other."""
    succeeded(cli("merge", mpo, "-o", "out"))
    before = tree(work)
    _moved_aside(work)
    refused(cli("merge", mpo, "-o", "out"), 3, "not empty", "--overwrite")
    assert tree(work) == before


def test_what_a_kill_moved_aside_is_put_back_by_the_next_run_even_if_that_fails(
    cli: Cli, mpo: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeeded(cli("merge", mpo, "-o", "out"))
    before = tree(work / "out")
    _moved_aside(work)
    _fail_at_finish(monkeypatch)
    refused(cli("merge", mpo, "-o", "out", "--overwrite"), 3)
    assert tree(work / "out") == before
    assert [path.name for path in work.iterdir()] == ["out"]


# --- others ------------------------------------------------------------------------------------------------------


def test_of_two_writers_the_second_ends_at_once_and_loses_nothing(cli: Cli, mpo: Path, work: Path) -> None:
    """The first is alive as long as it holds the lock, whatever its process id means here."""
    with output_directory(work / "out") as building:
        (building / "half").write_text("in the making")
        before = tree(work)
        for overwrite in ([], ["--overwrite"]):
            refused(cli("merge", mpo, "-o", "out", *overwrite), 3, "another process")
        assert tree(work) == before
    assert tree(work).keys() == {"out", "out/half"}


@pytest.mark.parametrize("verb", ["decompose", "merge"])
def test_what_appears_at_the_output_meanwhile_is_not_deleted(
    verb: str, cli: Cli, mpo: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = CheckpointWriter.finish

    def meanwhile(self: CheckpointWriter) -> list[Path]:
        (work / "out").mkdir()
        (work / "out" / "thesis.tex").write_text("mine")
        return finish(self)

    monkeypatch.setattr(CheckpointWriter, "finish", meanwhile)
    refused(cli(verb, mpo, "-o", "out"), 3, "since this run began")
    assert tree(work).keys() == {"out", "out/thesis.tex"}


def test_two_processes_with_one_output_end_with_0_and_3(
    stage: Stage, server: Server, bert: Path, work: Path, tmp_path: Path
) -> None:
    """Really at once: the second is started by the first, when that is about to write its weights."""
    command = ["decompose", str(bert), "--trunc", "24", "-o", "out"]
    before = f"""
import os
from mpocli.cli.app import main
from mpocli.io.writer import CheckpointWriter
finish = CheckpointWriter.finish
def second(self):
    CheckpointWriter.finish = finish
    pid = os.fork()
    if pid == 0:
        try: main({command})
        except SystemExit as stop: os._exit(stop.code or 0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    return finish(self)
CheckpointWriter.finish = second
"""
    done = server.run(*command, cwd=work, log=tmp_path / "log", before=before)
    assert done.code == 0, done.err
    assert "another process is writing" in done.err and tree(work / "out") == stage.new
    assert [path.name for path in work.iterdir()] == ["out"]
