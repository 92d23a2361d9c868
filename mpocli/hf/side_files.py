"""What lies beside a model's weights and travels with them: all that its files name, nothing of the old weights."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from mpocli.errors import InputError
from mpocli.io.model_files import OWN_FILES
from mpocli.io.readable import is_file, real_path, why_unreadable
from mpocli.printable import printable

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".ckpt"}
# The old weights, whoever names them, and once more for other programs.
_OLD_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "tf_model*.h5", "flax_model*.msgpack", "consolidated*")
_OTHER_FORMATS = ("onnx", "openvino", "coreml", "original", "gguf")
# An adapter was trained on the old weights, and transformers would load it, or fail to, unasked.
_ADAPTER = "adapter_*"
# Files whose values are read as names of others. (A vocabulary's words are not, nor what a Trainer notes down.)
_NAMING = ("modules.json", "config*.json", "*_config.json", "*_config_*.json")
_NOT_NAMES = {"_name_or_path", "name_or_path", "base_model_name_or_path"}
# Folders that nothing names travel if they are small: chat templates, code, word lists.
_MAX_FOLDER_BYTES = 1 << 20
_MAX_JSON_BYTES = 1 << 20


def carry(source: Path, work: Path) -> list[str]:
    """Copy the side files that are not in `work` yet; what is left behind, a line of name and reason each.

    Nothing comes from outside of `source`: a link is followed only in it, or into the hub cache's own store. Raises
    `InputError` where the files name something that cannot be carried.
    """
    named = _named(source)
    left: list[str] = []
    for path in sorted(source.iterdir()):
        name = path.name
        if name in OWN_FILES or name.startswith(".") or name.endswith(".index.json"):
            continue
        if path.is_file() and any(fnmatchcase(name, pattern) for pattern in _OLD_WEIGHTS):
            continue
        is_named = any(PurePosixPath(found).parts[0] == name for found in named)
        if fnmatchcase(name, _ADAPTER) or (path.is_dir() and (path / "adapter_config.json").exists()):
            left.append(f"{name}: an adapter of the old weights")
        elif path.is_dir():
            reason = _reason_against(path, is_named=is_named)
            if reason:
                left.append(f"{name}: {reason}")
            else:
                left += _copy_folder(source, path, work / name, is_named=is_named)
        elif path.suffix not in _WEIGHTS or is_named:
            left += _copy_file(source, path, work / name, is_named=is_named)
    if left:
        shown = "; ".join(printable(line) for line in left[:5]) + ("; …" if len(left) > 5 else "")
        logging.getLogger("mpocli").warning("left behind: %s", shown)
    return left


def _reason_against(folder: Path, *, is_named: bool) -> str | None:
    if folder.name in _OTHER_FORMATS:
        return "the old weights in another format"
    if is_named:
        return None
    files = [path for path in folder.rglob("*") if path.is_file()]
    if any(path.suffix in _WEIGHTS for path in files):
        return "weights that no file of the model names"
    size = sum(path.stat().st_size for path in files)
    return f"{size:,} bytes that no file of the model names" if size > _MAX_FOLDER_BYTES else None


def _copy_folder(source: Path, folder: Path, target: Path, *, is_named: bool) -> list[str]:
    """Files and folders without their modes: out of a read-only store comes a folder that can be deleted."""
    left = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            place = target / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            left += _copy_file(source, path, place, is_named=is_named)
    return left


def _copy_file(source: Path, path: Path, place: Path, *, is_named: bool) -> list[str]:
    if place.exists():
        return []
    if not is_inside(source, path):
        name = path.relative_to(source).as_posix()
        if is_named:
            raise InputError(
                f"{source}: {name} is named by the model's files, and a link out of the directory",
                hint="put the file itself there, where you trust it",
            )
        return [f"{name}: a link out of the directory"]
    why = why_unreadable(path)  # a pipe would be waited for
    if why:
        raise InputError(f"{path}: {why}", hint="put the file itself there, or take it out of the directory")
    shutil.copyfile(path, place)
    return []


def is_inside(source: Path, path: Path) -> bool:
    """Whether a path, its links followed, ends in `source`, or in the store that a snapshot of the hub's cache is
    made of links to (`<repo>/snapshots/<revision>` and `<repo>/blobs`)."""
    root, real = real_path(source), real_path(path)
    in_store = root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
    return in_store or root in real.parents


def _named(source: Path) -> set[str]:
    """Relative paths of what is there and is a value in one of the files that name others."""
    found: set[str] = set()
    for path in source.iterdir():
        if not any(fnmatchcase(path.name, pattern) for pattern in _NAMING) or fnmatchcase(path.name, _ADAPTER):
            continue
        try:
            if is_file(path) and path.stat().st_size <= _MAX_JSON_BYTES:
                found |= set(_strings(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, RecursionError):  # no loader reads it either
            continue
    return {name for name in found if _is_below(source, name)}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in _NOT_NAMES:
                yield key
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _is_below(source: Path, name: str) -> bool:
    pure = PurePosixPath(name)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\0" in name:
        return False
    try:
        return (source / pure).exists()
    except (OSError, ValueError):
        return False
