"""Digests of files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_sha256(files: Sequence[Path]) -> str:
    """One digest over weight files: of the file itself, or of the sorted `digest  name` lines of shards."""
    digests = [(file_sha256(file), file.name) for file in files]
    if len(digests) == 1:
        return digests[0][0]
    lines = "".join(f"{digest}  {name}\n" for digest, name in sorted(digests, key=lambda pair: pair[1]))
    return hashlib.sha256(lines.encode()).hexdigest()
