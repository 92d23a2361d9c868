"""Names out of foreign files reach a terminal as text, whatever they are made of."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest

from cli.shell import Cli, edited, succeeded
from mpocli.cli import bars, console, tables

# A title, a cleared line, a bell, C1's CSI, text turned round, a new line, markup, a broken closing tag, a lone half.
SPOILT = "a\x1b]0;owned\x07\x1b[2K\x9b31m\u202egnp.\rx\n✓ verified[red]b[/red][/x]:smile:\ud83d"
SHOWN = r"a\x1b]0;owned\x07\x1b[2K\x9b31m\u202egnp.\rx\n✓ verified[red]b[/red][/x]:smile:\ud83d"

WHOLE = SPOILT[:-1]  # what JSON may hold


def _is_clean(text: str) -> None:
    assert [char for char in text if not char.isprintable() and char != "\n"] == []


@pytest.mark.parametrize("where", ["print", "cell", "header", "spans", "style"])
def test_a_name_is_shown_as_it_is_spelled_wherever_it_is_printed(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(console.out, "_file", stream)
    monkeypatch.setattr(console.out, "width", 300)
    if where in ("cell", "header"):
        table = tables.table("role", SPOILT if where == "header" else "what")
        table.add_row("ffn", SPOILT)
        tables.show(table)
    elif where == "spans":
        console.out.print(console.spans((SPOILT, "bold"), "  ", SPOILT))
    else:
        console.out.print(SPOILT, style="dim" if where == "style" else None)
    assert SHOWN in stream.getvalue()
    _is_clean(stream.getvalue())


def test_a_bar_on_a_terminal_shows_a_name_as_it_is_spelled(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(
        console, "err", console.SafeConsole(file=stream, force_terminal=True, width=300, **console.PLAIN)
    )
    with bars.progress_bar("inspect") as tell:
        assert tell is not None
        tell(1, 2, "\x07[/x]\u202e")
    assert r"\x07[/x]\u202e" in stream.getvalue()
    assert "\x07" not in stream.getvalue() and "\u202e" not in stream.getvalue()


def test_a_directory_full_of_foreign_names_is_shown_in_lines_of_our_own(cli: Cli, mpo: Path, tmp_path: Path) -> None:
    with edited(mpo / "mpo.json") as manifest:
        manifest["files"][WHOLE] = {"sha256": "", "bytes": 1}
        manifest["history"][0]["command"] = WHOLE
    place = shutil.move(mpo, tmp_path / "\x1b[31m[/x]")
    outcome = cli("inspect", place, "--verify")
    assert outcome.code == 3
    _is_clean(outcome.out + outcome.err)
    assert f"✗ {SHOWN[:-6]}: is in mpo.json" in outcome.err and f"history: {SHOWN[:-6]}" in outcome.err
    assert r"error: " in outcome.err and r"\x1b[31m[/x]" in outcome.err
    assert "\x1b" not in cli("inspect", place, "--verify", "--json").out


@pytest.mark.parametrize(
    "arguments",
    [("inspect", SPOILT[:-1]), ("inspect", "{}", "--module", SPOILT[:-1]), ("inspect", "{}", f"--{SPOILT[:-1]}")],
)
def test_an_error_message_is_one_line_without_control_characters(
    arguments: tuple[str, ...], cli: Cli, bert_mpo: Path
) -> None:
    outcome = cli(*(argument.format(bert_mpo) for argument in arguments))
    assert outcome.code in (2, 3)
    _is_clean(outcome.err)
    assert [line[:7] for line in outcome.err.splitlines()] in (["error: "], ["error: ", "  try: "])


def test_a_bug_is_reported_without_control_characters(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(SPOILT)

    monkeypatch.setattr("mpocli.methods.inspect.run.run", broken)
    outcome = cli("inspect", "anything")
    assert outcome.code == 1 and "Traceback" in outcome.err
    _is_clean(outcome.err)


def test_ordinary_names_in_any_script_are_left_alone(cli: Cli, bert: Path, work: Path) -> None:
    out = "größe-重み-мера"
    assert f"written to {out} in" in succeeded(cli("decompose", bert, "-o", out)).err
