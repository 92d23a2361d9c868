"""The files around the weights of a model directory that is written: config, tokenizer, card and manifest."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpocli.hf.artifact import Checkpoint, architecture
from mpocli.hf.card import left_behind, license_of, model_card
from mpocli.hf.settled import settled
from mpocli.hf.side_files import carry
from mpocli.hf.stored import in_stored_dtypes, stored_dtypes
from mpocli.io.checkpoint import CheckpointReader
from mpocli.io.digest import file_sha256
from mpocli.io.manifest import Manifest
from mpocli.io.schema import MANIFEST
from mpocli.io.totals import Totals

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD = "README.md"


def write_surroundings(
    work: Path,
    checkpoint: Checkpoint,
    manifest: Manifest,
    *,
    dtype: str | None = None,
    model: Checkpoint | None = None,
) -> None:
    """Everything beside the weights: config, tokenizer and generation files, model card, and last the manifest.

    `model` has the class where that is not the source's any more.
    """
    described = model or checkpoint
    manifest = settled(manifest, described.survey, CheckpointReader(work, manifest.encodings))
    source = checkpoint.source.directory
    left = carry(source, work)
    config = {key: value for key, value in described.config_json.items() if key != "quantization_config"}
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    if manifest.needs_plugin:
        config["quantization_config"] = manifest.quantization_config()
    _write_json(work / "config.json", config)
    class_name = "AutoModel" if "auto_map" in config else architecture(config)
    card = model_card(manifest, license_of(source / CARD), class_name)
    card += left_behind(left)
    (work / CARD).write_text(card, encoding="utf-8")
    files = sorted(path for path in work.rglob("*") if path.is_file())
    digests = {
        str(path.relative_to(work)): {"sha256": file_sha256(path), "bytes": path.stat().st_size} for path in files
    }
    (work / MANIFEST).write_text(replace(manifest, files=digests).dumps(), encoding="utf-8")


def write_trained(
    work: Path,
    model: PreTrainedModel,
    source: Checkpoint,
    command: str,
    options: dict[str, Any],
    *,
    seed: int,
    metrics: dict[str, float],
    more: dict[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Totals:
    """A trained model as a checkpoint in `work`, every tensor in the dtype that its source has for it, and what it now
    amounts to.

    Its cores have moved: errors and canonical claims of the source do not hold for them.
    """
    with in_stored_dtypes(model, stored_dtypes(model, source)):
        model.save_pretrained(work, max_shard_size=max_shard_bytes)
    _readable(work)
    saved = Checkpoint.open(str(work), trust_remote_code=source.trust_remote_code)
    manifest = Manifest(
        base_model=source.base_model(),
        modules=saved.manifest.modules if saved.manifest else (),
        encodings=saved.encodings,
        routing=saved.routing,
        totals=saved.totals(),
        history=source.history(command, options, seed, metrics, more),
    )
    # transformers writes that of the first tensor.
    dtype = source.config_json.get("dtype", source.config_json.get("torch_dtype"))
    write_surroundings(work, source, manifest, dtype=dtype, model=saved)
    return saved.totals()


def _readable(work: Path) -> None:
    """As any file that is created here: some releases of safetensors write for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in work.glob("*.safetensors"):
        file.chmod(0o666 & ~mask)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
