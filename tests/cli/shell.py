"""What a run of the command line gave, what it must give when it refuses, and ways to look at and edit directories."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Outcome:
    """Exit code, stdout and stderr of one run."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout: nothing beside it, no NaN, no infinity."""
        assert self.out.endswith("\n") and self.out.count("\n") == 1, self.out
        data: dict[str, Any] = json.loads(self.out, parse_constant=_no_constant)
        return data


Cli = Callable[..., Outcome]


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} in JSON output")


def succeeded(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err
    assert "Traceback" not in outcome.err
    return outcome


def refused(outcome: Outcome, code: int, *words: str, told: str = "") -> str:
    """Exactly one `error:` line and at most one `try:` line on stderr, nothing else anywhere. Returns the text.

    `words` must all be in it. `told` is in the one line of notice before it, where the work had begun, and lines of
    progress may stand there. Blank lines are the business of one test, not of every one.
    """
    assert "Traceback" not in outcome.err, outcome.err
    assert outcome.code == code, (outcome.code, outcome.err)
    assert outcome.out == ""
    lines = [line for line in outcome.err.splitlines() if line and not re.match(r"(step|round) [\d,]+", line)]
    if told:
        assert told in lines.pop(0), outcome.err
    assert lines and lines[0].startswith("error: "), outcome.err
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("  try: ")), outcome.err
    assert all(len(line) > len("  try: ") for line in lines)
    for word in words:
        assert word in outcome.err, (word, outcome.err)
    return outcome.err


def tree(directory: Path) -> dict[str, str]:
    """Every path below a directory, hidden ones too, with the digest of a file's content."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(directory.rglob("*"))
    }


@contextmanager
def edited(path: Path) -> Iterator[dict[str, Any]]:
    """A JSON file's object, written back at the end."""
    data = json.loads(path.read_text())
    yield data
    path.write_text(json.dumps(data, indent=2))


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a directory's only weight file, through the safetensors library."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
