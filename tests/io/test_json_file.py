"""JSON of files that nobody vouches for: what is read, and what is refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mpocli.errors import InputError
from mpocli.io import json_file
from mpocli.io.json_file import DEEPEST, read_json
from mpocli.io.readable import is_there, why_unreadable

REFUSED = {
    "nested too deep": ('{"a":' + "[" * DEEPEST + "]" * DEEPEST + "}", "64 levels"),
    "nested past Python's own depth": ("[" * 100_000 + "]" * 100_000, "64 levels"),
    "objects in objects": ('{"a":' * 50_000 + "1" + "}" * 50_000, "64 levels"),
    "a number of thousands of digits": ('{"a": ' + "9" * 5000 + "}", "5,000 digits"),
    "a number beyond the floats": ('{"a": 1e999}', "1e999"),
    "half of a surrogate pair": ('{"a": "x\\ud83d"}', "\\ud83d"),
    "half of a pair in a key": ('{"\\uDE00": 1}', "\\ude00"),
    "a list": ("[1]", "not a list"),
    "a number": ("5", "not a int"),
    "cut off": ('{"a": ', "Expecting value"),
    "nothing": ("", "Expecting value"),
    "a zero byte": ('{"a": 1}\0', "Extra data"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_json_that_could_surprise_whoever_reads_on_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    text, word = REFUSED[case]
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError) as caught:
        read_json(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in caught.value.message
    assert word in caught.value.message
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_what_real_files_hold_is_read_as_it_stands(tmp_path: Path) -> None:
    kept = {"max": int(1e30), "limit": [0.0, float("inf")], "emoji": "\U0001f600", "deep": {}}
    inner = kept["deep"]
    for _ in range(DEEPEST - 3):
        inner["a"] = {}
        inner = inner["a"]
    (tmp_path / "a.json").write_text(json.dumps(kept))  # the emoji as an escaped pair
    assert "\\ud83d" in (tmp_path / "a.json").read_text()
    assert read_json(tmp_path / "a.json") == kept


def test_a_file_too_large_to_be_json_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_file, "MOST_BYTES", 10)
    (tmp_path / "a.json").write_text('{"a": 100000}')
    with pytest.raises(InputError, match="13 bytes of JSON, 10 are read at most"):
        read_json(tmp_path / "a.json")


def test_what_is_no_readable_file_is_told_by_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("x")
    told = {name: why_unreadable(tmp_path / name) for name in ("pipe", "link", "loop", ".", "none", "file", "a" * 5000)}
    assert told == {
        "pipe": "is a pipe, and files are read more than once",
        "link": "is a link to what does not exist",
        "loop": "cannot be read (Too many levels of symbolic links)",
        ".": "is a directory",
        "none": "does not exist",
        "file": None,
        "a" * 5000: "cannot be read (File name too long)",
    }
    assert [is_there(tmp_path / name) for name in ("link", "none", "a" * 5000)] == [True, False, False]

    def refuse(path: object, flags: int) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert why_unreadable(tmp_path / "file") == "cannot be read (Permission denied)"
