"""A model directory opened by what its files say of themselves: config.json, manifest and headers. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from mpocli.hf.config import read_config
from mpocli.hf.hub import Source
from mpocli.io.digest import file_sha256
from mpocli.io.encodings.known import Encodings
from mpocli.io.manifest import Manifest
from mpocli.io.read_manifest import read_manifest
from mpocli.io.schema import MANIFEST
from mpocli.io.stored import StoredTensors

R = TypeVar("R", bound=StoredTensors[Any])


@dataclass(frozen=True)
class Metadata(Generic[R]):
    """A model directory: its source, `config.json`, tensors, and manifest (None for a dense model)."""

    source: Source
    config_json: dict[str, Any]
    reader: R
    manifest: Manifest | None


def read_metadata(source: Source, open_files: Callable[[Path, Encodings | None], R]) -> Metadata[R]:
    """Raises `InputError` for anything that is not a usable checkpoint, as far as no model class is asked."""
    config_json = read_config(source.directory)
    manifest = read_manifest(source.directory, config_json)
    reader = open_files(source.directory, manifest.encodings if manifest else None)
    if manifest is not None and _rewritten(manifest, reader):
        manifest = manifest.without_measurements()
    return Metadata(source, config_json, reader, manifest)


def _rewritten(manifest: Manifest, reader: StoredTensors[Any]) -> bool:
    """Whether a weight file is not the one the manifest describes: a user's `save_pretrained` into the directory.

    Hashes are computed only for files that changed after the manifest, which is written last.
    """
    claims = [(file, manifest.files[file.name]) for file in reader.files if file.name in manifest.files]
    if not claims:
        return bool(manifest.files)
    written = (reader.directory / MANIFEST).stat().st_mtime
    return any(
        file.stat().st_size != claim["bytes"]
        or (file.stat().st_mtime > written and file_sha256(file) != claim["sha256"])
        for file, claim in claims
    )
