"""A model directory opened for reading, and the files around the weights of one that is written."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpocli import __version__
from mpocli.hf.card import left_behind, license_of, model_card
from mpocli.hf.config import check_counts, load_config
from mpocli.hf.hub import resolve
from mpocli.hf.metadata import Metadata, read_metadata
from mpocli.hf.settled import settled
from mpocli.hf.side_files import carry
from mpocli.hf.stored import in_stored_dtypes, stored_dtypes
from mpocli.hf.survey import Survey, survey
from mpocli.io.checkpoint import CheckpointReader
from mpocli.io.digest import file_sha256
from mpocli.io.encodings.base import Encoding
from mpocli.io.manifest import Manifest
from mpocli.io.schema import MANIFEST
from mpocli.io.signpost import check_seal
from mpocli.io.totals import Totals

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CARD = "README.md"


@dataclass(frozen=True)
class Checkpoint(Metadata[CheckpointReader]):
    """A model directory with its tensors' data and its model's class."""

    trust_remote_code: bool = False

    @classmethod
    def open(cls, model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
        """Open a directory or hub model. Raises `InputError` for anything that is not a usable checkpoint."""
        source = resolve(model, revision=revision, trust_remote_code=trust_remote_code)
        found = read_metadata(source, CheckpointReader)
        return cls(source, found.config_json, found.reader, found.manifest, trust_remote_code)

    @classmethod
    def of(cls, metadata: Metadata[Any], *, trust_remote_code: bool = False) -> Checkpoint:
        """The same directory, that was opened without its data."""
        manifest = metadata.manifest
        reader = CheckpointReader(metadata.source.directory, manifest.encodings if manifest else None)
        return cls(metadata.source, metadata.config_json, reader, manifest, trust_remote_code)

    @cached_property
    def config(self) -> PretrainedConfig:
        check_counts(self.config_json, self.source.directory, len(self.reader.specs))
        return load_config(self.source.directory, trust_remote_code=self.trust_remote_code)

    @cached_property
    def survey(self) -> Survey:
        found = survey(self.config, self.reader, self.manifest, trust_remote_code=self.trust_remote_code)
        # Last, so that what can be told more precisely is.
        check_seal(str(self.source.directory), self.config_json.get("quantization_config") or {}, self.reader.seal)
        return found

    @property
    def architecture(self) -> str:
        """The class it was saved from, `AutoModel` where that is not said."""
        return _architecture(self.config_json)

    @property
    def is_mpo(self) -> bool:
        return self.manifest is not None and bool(self.manifest.modules)

    @property
    def routing(self) -> dict[str, Any]:
        """How tokens find their experts, empty where there are none."""
        return self.manifest.routing if self.manifest else {}

    @property
    def encodings(self) -> dict[str, Encoding]:
        """The encodings of the tensors that the files do not hold as they are, by name."""
        return self.manifest.encodings if self.manifest else {}

    def totals(self, params: int | None = None, size: int | None = None, dtype: str | None = None) -> Totals:
        """The size of this checkpoint, or of one made from it with other parameters, bytes or dtype."""
        import torch

        found = self.survey
        params = found.params if params is None else params
        size = self.reader.nbytes if size is None else size
        dense_bytes = found.dense_params * getattr(torch, dtype).itemsize if dtype else found.dense_bytes
        return Totals(params, found.dense_params, params / found.dense_params, size, dense_bytes)

    def base_model(self) -> dict[str, Any]:
        """What the chain of commands started from: the manifest's word, else this checkpoint itself."""
        if self.manifest is not None and self.manifest.base_model:
            return self.manifest.base_model
        return {"name": self.source.name, "revision": self.source.revision, "weights_sha256": self.reader.sha256}

    def history(
        self,
        command: str,
        options: dict[str, Any],
        seed: int,
        metrics: dict[str, float] | None = None,
        more: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], ...]:
        """The manifest's history with one more command on it; `more` are keys of its own."""
        import torch
        import transformers

        entry = {
            "command": command,
            "options": options,
            "seed": seed,
            "versions": {
                "mpocli": __version__,
                "torch": torch.__version__.partition("+")[0],
                "transformers": transformers.__version__,
            },
            "metrics": metrics or {},
            "input_sha256": self.reader.sha256,
            **(more or {}),
        }
        return (*(self.manifest.history if self.manifest else ()), entry)


def _architecture(config_json: dict[str, Any]) -> str:
    names = config_json.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "AutoModel"


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
    class_name = "AutoModel" if "auto_map" in config else _architecture(config)
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
