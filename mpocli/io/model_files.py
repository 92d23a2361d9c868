"""Which files of a directory belong to the model in it, and which are somebody's own."""

from __future__ import annotations

import json
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path

from mpocli.io.readable import is_file

# Written beside the weights by mpocli, and not all of them in the manifest.
OWN_FILES = frozenset({"config.json", "mpo.json", "README.md", "metrics.jsonl", "squeeze.jsonl"})
_AFTER_THE_MANIFEST = frozenset({"mpo.json", "metrics.jsonl", "squeeze.jsonl"})
# As transformers, tokenizers, sentence-transformers and the hub call what belongs to a model.
_STANDARD = (
    *("model*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json", "*.bin.index.json"),
    *("*_config.json", "tokenizer*.json", "*token*.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template.*", "additional_chat_templates/*.jinja", "modules.json", "*_config_*.json"),
    *("config_*.json", "[0-9]*_*/config.json", ".gitattributes", "LICENSE*"),
)


def foreign_files(directory: Path) -> list[str]:
    """Paths in a model directory, sorted, that are neither in its manifest nor called as a model's files are."""
    listed = _listed(directory)
    found = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if _is_something(path))
    return sorted(name for name in found if name not in listed and not _is_standard(name))


def unlisted_files(directory: Path, listed: Collection[str]) -> list[str]:
    """Paths, sorted, of files that belong to the model, or are code, and that its manifest should list and does not."""
    found = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if _is_something(path))
    return sorted(
        name
        for name in found
        if (name in OWN_FILES or _is_standard(name) or name.endswith(".py"))
        and name not in listed
        and name not in _AFTER_THE_MANIFEST
        and not name.startswith(".")
    )


def _is_something(path: Path) -> bool:
    return path.is_symlink() or not path.is_dir()


def _is_standard(name: str) -> bool:
    # A pattern's star would cross slashes.
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in _STANDARD)


def _listed(directory: Path) -> frozenset[str]:
    if not is_file(directory / "mpo.json"):
        return OWN_FILES
    try:
        files = json.loads((directory / "mpo.json").read_text(encoding="utf-8"))["files"]
        return OWN_FILES | frozenset(files)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return OWN_FILES
