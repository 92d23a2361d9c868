"""The command line answers as fast as Typer lets it."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer

from mpocli.cli.app import app
from mpocli.cli.group import COMMANDS, command

RUNS = 7
MOST = 1.6

_BARE = '''"""A Typer application that does nothing."""
import typer

app = typer.Typer(name="bare", help="Nothing at all.", rich_markup_mode="rich", add_completion=False)
{commands}

@app.callback()
def root(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    """Nothing at all."""


if __name__ == "__main__":
    app()
'''
_COMMAND = '''
@app.command()
def verb{number}() -> None:
    """Does nothing, in {number} steps."""
'''


def test_help_takes_at_most_1_6_times_a_bare_typer_application(tmp_path: Path) -> None:
    """In processor time, interleaved, the fastest of seven runs each: a machine that is busy slows both."""
    commands = "".join(_COMMAND.format(number=number) for number in range(len(COMMANDS)))
    (tmp_path / "bare.py").write_text(_BARE.format(commands=commands))

    def seconds(module: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "Commands" in done.stdout
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    seconds("bare"), seconds("mpocli")  # compiled and in the page cache
    times = [(seconds("bare"), seconds("mpocli")) for _ in range(RUNS)]
    bare, ours = (min(column) for column in zip(*times, strict=True))
    assert ours <= MOST * bare, f"{ours:.3f} s against {bare:.3f} s: {ours / bare:.2f} times"


def test_help_lists_every_command_with_its_first_line() -> None:
    """Which is that of its own help."""
    done = subprocess.run([sys.executable, "-m", "mpocli", "--help"], capture_output=True, text=True, check=True)
    for name, (_, line) in COMMANDS.items():
        lines = [shown for shown in done.stdout.splitlines() if shown.startswith(f"│ {name} ")]
        assert len(lines) == 1 and " ".join(line.split()[:3]) in lines[0], name
        assert command(name).name == name and command(name).help.split("\n\n")[0] == line


def test_typer_itself_finds_every_command_with_its_options() -> None:
    """As whoever documents or drives a Typer application asks for them."""
    made: Any = typer.main.get_command(app)
    assert list(made.commands) == list(COMMANDS)
    for name, found in made.commands.items():
        assert found is made.commands[name] is made.commands.get(name) is command(name)
        assert "--json" in {option.opts[0] for option in found.params}
    assert made.commands.get("nothing") is None
