"""What shows only from one process to the next: identical output, and pipes whose reader has left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli.processes import Server
from cli.shell import WEIGHTS, Cli, succeeded, tree


def test_same_input_options_and_seed_give_byte_identical_directories(
    cli: Cli, server: Server, bert: Path, gpt2: Path, t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes with other hash seeds, working directories and output names; two seeds differ."""

    def commands(name: str) -> list[list[str]]:
        return [
            ["decompose", str(bert), "--trunc", "8", "--seed", "3", "-o", f"{name}-bert"],
            ["decompose", str(gpt2), "--rel-tol", "0.5", "--max-shard-size", "50KB", "-o", f"{name}-gpt2"],
            ["decompose", str(t5), "--gauge", "symmetric", "--dtype", "bfloat16", "-o", f"{name}-t5"],
            ["decompose", f"{name}-bert", "--layers", "head", "-o", f"{name}-again"],
            ["merge", f"{name}-again", "-o", f"{name}-dense"],
        ]

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    for command in commands("one"):
        succeeded(cli(*command))
    other = f"assert hash('two') != {hash('two')}, 'the same hash seed'"
    for command in commands("two"):
        ended = server.run(*command, cwd=tmp_path / "two", log=tmp_path / "log", before=other)
        assert ended.code == 0, ended.err
    for step in ("bert", "gpt2", "t5", "again", "dense"):
        # The first command's output is the fourth's input, and a checkpoint's name is that of its folder.
        one, two = tree(tmp_path / "one" / f"one-{step}"), tree(tmp_path / "two" / f"two-{step}")
        assert one and one == two
    manifest = json.loads((tmp_path / "one" / "one-bert" / "mpo.json").read_text())
    assert manifest["history"][0]["seed"] == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "{mpo}"),
        ("inspect", "{mpo}", "--json"),
        ("inspect", "{mpo}", "--verify"),
        ("inspect", "{mpo}", "--module", "*", "--spectrum"),
        ("decompose", "{dense}", "--trunc", "8", "-o", "out"),
        ("decompose", "{dense}", "--trunc", "8", "-o", "out", "--json"),
        ("decompose", "{dense}", "--trunc", "8", "--dry-run"),
        ("merge", "{mpo}", "-o", "out"),
        ("--help",),
        ("inspect", "--help"),
        ("--version",),
    ],
    ids=" ".join,
)
def test_a_reader_that_has_left_gets_no_complaint_and_the_work_is_done(
    arguments: tuple[str, ...], server: Server, bert: Path, bert_mpo: Path, work: Path, tmp_path: Path
) -> None:
    """`mpocli … | head -1`: no traceback, and nothing of Python's own at exit."""
    filled = [argument.format(mpo=bert_mpo, dense=bert) for argument in arguments]
    ended = server.run(*filled, cwd=work, log=tmp_path / "log", out="closed pipe")
    assert "Traceback" not in ended.err and "Broken pipe" not in ended.err and "Exception ignored" not in ended.err
    assert "error:" not in ended.err
    if "-o" in arguments:
        assert (work / "out" / WEIGHTS).is_file() and (work / "out" / "mpo.json").is_file()
        assert [path.name for path in work.iterdir()] == ["out"]


def test_a_reader_that_has_left_is_exit_0(server: Server, bert_mpo: Path, work: Path, tmp_path: Path) -> None:
    """Exit 1 would say that mpocli has a bug, and stop a script under `set -o pipefail`."""
    commands = (["inspect", bert_mpo], ["inspect", bert_mpo, "--json"], ["merge", bert_mpo, "-o", "out"], ["--help"])
    codes = [server.run(*command, cwd=work, log=tmp_path / "log", out="closed pipe").code for command in commands]
    assert codes == [0, 0, 0, 0]


@pytest.mark.parametrize("options", [[], ["--json"]], ids=str)
def test_a_reader_that_has_left_does_not_change_the_verdict(
    options: list[str], server: Server, mpo: Path, work: Path, tmp_path: Path
) -> None:
    """`mpocli inspect --verify … | head -1` under `set -o pipefail`."""
    (mpo / "vocab.txt").write_text("of another model")
    ended = server.run("inspect", mpo, "--verify", *options, cwd=work, log=tmp_path / "log", out="closed pipe")
    assert ended.code == 3
    assert ended.err.count("error: ") == 1 and "vocab.txt" in ended.err


def test_a_pipe_into_head_prints_the_head_and_nothing_else(tmp_path: Path) -> None:
    """The shell's own pipe, Python's shutdown included."""
    script = f"'{sys.executable}' -m mpocli decompose --help | head -2"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "Usage: mpocli decompose" in done.stdout and done.stdout.count("\n") == 2


@pytest.mark.parametrize("arguments", [["{mpo}"], ["{mpo}", "--json"], ["--help"]], ids=" ".join)
def test_a_full_disk_behind_stdout_is_one_line_and_no_bug(
    arguments: list[str], server: Server, bert_mpo: Path, work: Path, tmp_path: Path
) -> None:
    """`mpocli … > file` is the user's trouble then, not ours."""
    filled = [argument.format(mpo=bert_mpo) for argument in arguments]
    ended = server.run("inspect", *filled, cwd=work, log=tmp_path / "log", out="full device")
    assert ended.code == 3, ended.err
    assert "Traceback" not in ended.err and "Exception ignored" not in ended.err
    assert ended.err.count("error: ") == 1 and "No space left" in ended.err


def test_a_full_disk_behind_stderr_leaves_the_exit_code(tmp_path: Path) -> None:
    script = f"'{sys.executable}' -m mpocli inspect --sites 1 model 2> /dev/full"
    assert subprocess.run(["bash", "-c", script], cwd=tmp_path, check=False).returncode == 2
