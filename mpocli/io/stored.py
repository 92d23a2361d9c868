"""What safetensors checkpoints hold, whole or sharded, by their headers alone: no torch, and no data is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors import SafetensorError, safe_open

from mpocli.errors import InputError
from mpocli.io.dtypes import STORED_DTYPES, DType, StoredDType
from mpocli.io.encodings.base import Encoding
from mpocli.io.encodings.dense import Dense
from mpocli.io.encodings.known import Encodings, encoded, encoding_of
from mpocli.io.json_file import read_json
from mpocli.io.readable import is_file, is_there, why_unreadable
from mpocli.io.signpost import SIGNPOST
from mpocli.io.tensor_spec import TensorSpec

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
# The class matters: AutoModel would drop the head.
PICKLE_HINT = (
    "convert it once, where you trust it, with the class that config.json's `architectures` names: "
    'transformers.CLASS.from_pretrained("{model}").save_pretrained("NEW_DIR")'
)
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "pytorch_model.pt", "model.pth")

D = TypeVar("D", bound=DType)


class StoredTensors(Generic[D]):
    """The tensors of a model directory: names, dtypes (from `dtypes`, by the files' word for them) and shapes.

    Opens every file's header at once. Those that `encodings` (the manifest's) describe appear as the dense tensors they
    stand for. Raises `InputError` for a directory without safetensors weights (pickles are never opened), for a file
    that is truncated or corrupt, for an index that names what is not there, and where the files and the encodings do
    not go together.
    """

    def __init__(
        self, directory: Path, encodings: Encodings | None, dtypes: Mapping[str, D], *, framework: str
    ) -> None:
        self.directory = directory
        self._dtypes = dtypes
        self.files = _weight_files(directory)
        self.specs: dict[str, TensorSpec[D]] = {}
        self._handles: dict[str, Any] = {}
        for file in self.files:
            try:
                # Plain reads instead of a memory map: mapped pages count as this process's memory.
                handle = safe_open(file, framework=framework, device="cpu", backend="pread")
                for name in handle.keys():
                    view = handle.get_slice(name)
                    dtype = dtypes.get(view.get_dtype())
                    if dtype is None:
                        raise InputError(
                            f"{file.name}: tensor {name} has dtype {view.get_dtype()}, which mpocli does not read",
                            hint="convert the checkpoint to a floating-point dtype first",
                        )
                    self.specs[name] = TensorSpec(name, dtype, tuple(view.get_shape()))
                    self._handles[name] = handle
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{file}: not a readable safetensors file ({error})",
                    hint="the file is truncated or corrupt: download or write it again",
                ) from error

        self._check_index()
        self.encoded: dict[str, str] = {}
        self._encodings: dict[str, Encoding] = {}
        self._parts: dict[str, tuple[TensorSpec[D], ...]] = {}
        self._show_encoded(encodings or {})

    def _show_encoded(self, encodings: Encodings) -> None:
        """Put a dense spec in the place of a tensor's parts. `encoded` has its entry in `encodings` by stored name."""
        for name, kind in encoded(self.specs).items():
            entry = encoding_of(encodings, name)
            if entry is None or not isinstance(encodings[entry], kind):
                raise InputError(
                    f"{self.directory}: {name} is stored as {kind.phrase}, and config.json has no encoding for it",
                    hint="restore config.json from the directory that mpocli wrote",
                )
            encoding, parts = encodings[entry], tuple(self.specs.pop(part) for part in kind.part_names(name))
            if misfit := encoding.misfit(name, parts, self._dtypes):
                raise InputError(
                    f"{self.directory}: {misfit}", hint="config.json and the weights belong to different checkpoints"
                )
            self.specs[name] = TensorSpec(name, encoding.dense_dtype(parts, self._dtypes), encoding.shape)
            self.encoded[name], self._encodings[name], self._parts[name] = entry, encoding, parts
        absent = sorted(set(encodings) - set(self.encoded.values()))
        if absent:
            lacking = " or ".join(part.noun for part in encodings[absent[0]].parts)
            raise InputError(
                f"{self.directory}: {absent[0]} is encoded, says config.json, and the files lack its {lacking}",
                hint="the weight files are incomplete or belong to another checkpoint",
            )

    def _check_index(self) -> None:
        index = self.directory / WEIGHTS_INDEX
        if len(self.files) == 1 and self.files[0].name == WEIGHTS:
            return
        absent = [name for name in read_json(index)["weight_map"] if name not in self._handles]
        if absent:
            raise InputError(
                f"{index}: names tensor {absent[0]}, which no shard holds ({len(absent)} such)",
                hint="index and shards belong to different checkpoints: download or write them again",
            )

    def __contains__(self, name: str) -> bool:
        return name in self.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def encoding(self, name: str) -> Encoding:
        """How the files hold a tensor."""
        return self._encodings.get(name) or Dense(self.specs[name].shape)

    def parts(self, name: str) -> tuple[TensorSpec[D], ...]:
        """What the files hold for a tensor, a tombstone apart: itself, or the parts of an encoded one."""
        return self._parts.get(name) or (self.specs[name],)

    def zeros(self, name: str) -> int | None:
        """Zeros of a tensor, None where only its values tell."""
        return self.encoding(name).zeros(self.parts(name))

    def _stored(self, name: str) -> Any:
        """What a file holds by that name, as its framework has it."""
        try:
            return self._handles[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{self.directory}: tensor {name} cannot be read ({error})", hint="download or write the file again"
            ) from error

    @property
    def seal(self) -> int | None:
        """What the files say of the config.json that they were written with; None where they say nothing."""
        spec = self.specs.get(SIGNPOST)
        is_seal = spec is not None and spec.dtype == self._dtypes["I64"] and spec.numel == 1
        return int(self._stored(SIGNPOST).reshape(-1)[0]) if is_seal and SIGNPOST not in self.encoded else None

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.stat().st_size for file in self.files)


def stored_tensors(directory: Path, encodings: Encodings | None = None) -> StoredTensors[StoredDType]:
    """Without torch."""
    return StoredTensors(directory, encodings, STORED_DTYPES, framework="np")


def _is_file_name(name: str) -> bool:
    """No path: an index that somebody else wrote must not lead anywhere else."""
    return 0 < len(name.encode("utf-8", "replace")) < 256 and name not in (".", "..") and not set(name) & set("/\\\0")


def _weight_files(directory: Path) -> list[Path]:
    index = directory / WEIGHTS_INDEX
    for path in (directory / WEIGHTS, index):
        if is_there(path) and (why := why_unreadable(path)):
            raise InputError(f"{path}: {why}", hint="download or write the file again")
    if is_file(directory / WEIGHTS):
        return [directory / WEIGHTS]
    if is_file(index):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise InputError(f"{index}: its weight_map does not map tensors to files", hint="download it again")
        names = sorted(set(weight_map.values()))
        for name in names:
            if not _is_file_name(name):
                raise InputError(
                    f"{index}: names the shard {name[:80]!r}, which is no file name in this directory",
                    hint="download the index again, from where you trust it",
                )
        missing = [name for name in names if why_unreadable(directory / name)]
        if missing or not names:
            first = f" (first: {_shown(missing[0])}, which {why_unreadable(directory / missing[0])})" if missing else ""
            raise InputError(
                f"{index}: names {len(names)} shards, {len(missing)} of them missing{first}",
                hint="download the missing shards",
            )
        return [directory / name for name in names]
    pickles = [name for name in _PICKLES if is_there(directory / name)]
    if pickles:
        raise InputError(
            f"{directory}: only a pickle checkpoint ({pickles[0]}), which can run code when it is opened",
            hint=PICKLE_HINT.format(model="DIR"),
        )
    raise InputError(f"{directory}: no {WEIGHTS} and no {WEIGHTS_INDEX}", hint="name a transformers model directory")


def _shown(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:59]}…"
