"""A model directory opened for reading."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mpocli import __version__
from mpocli.hf.config import check_counts, load_config
from mpocli.hf.hub import resolve
from mpocli.hf.metadata import Metadata, read_metadata
from mpocli.hf.survey import Survey, survey
from mpocli.io.checkpoint import CheckpointReader
from mpocli.io.encodings.base import Encoding
from mpocli.io.signpost import check_seal
from mpocli.io.totals import Totals

if TYPE_CHECKING:
    from transformers import PretrainedConfig


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
        return architecture(self.config_json)

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


def architecture(config_json: dict[str, Any]) -> str:
    """The class that a model was saved from, `AutoModel` where that is not said."""
    names = config_json.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "AutoModel"
