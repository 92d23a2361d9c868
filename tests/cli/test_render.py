"""Tables say the whole truth in every width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mpocli.cli import bars, console, tables, wording


def printed(monkeypatch: pytest.MonkeyPatch, width: int) -> str:
    stream = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=stream, width=width, highlight=False, force_terminal=False))
    table = tables.table("role", "as MPO", "parameters", "→ after", "ratio", "worst err", "mean err")
    table.add_row("embedding", "1 of 1", "23,440,896", "16,123,456", "0.688", "0.503", "0.503")
    tables.show(table)
    return stream.getvalue()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 160])
def test_no_column_and_no_digit_is_lost_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    text = printed(monkeypatch, width)
    for cell in ("role", "as MPO", "→ after", "worst err", "embedding", "23,440,896", "16,123,456", "0.688", "0.503"):
        assert cell in text, (width, text)
    assert "…" not in text


def test_notes_name_a_role_once_where_only_numbers_differ() -> None:
    class Module:
        action, role = "kept", "attention"

        def __init__(self, name: str, reason: str) -> None:
            self.name, self.reason = name, reason

    larger = "an MPO would be larger ({} > {} parameters)"
    modules = [Module("q", larger.format(5, 4)), Module("k", larger.format(7, 6))]
    assert wording.notes(modules) == ["kept dense: 2 attention matrices: an MPO would be larger"]
    same = [Module("q", larger.format(5, 4)), Module("k", larger.format(5, 4))]
    assert wording.notes(same) == [f"kept dense: 2 attention matrices: {larger.format(5, 4)}"]


def test_where_no_terminal_is_long_work_tells_where_it_is_and_short_work_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every command that can take long, beside --json too: it goes to stderr."""
    clock = iter([0.0, 20.0, 31.0, 40.0, 62.0])
    monkeypatch.setattr(bars.time, "monotonic", lambda: next(clock))
    with bars.progress_bar("plan") as progress:
        assert progress is not None
        for done in range(1, 5):
            progress(done, 4, f"layers.{done}")
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == "plan: 2 of 4 after 31 s (layers.2)\nplan: 4 of 4 after 62 s (layers.4)\n"
