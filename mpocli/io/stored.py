"""What safetensors checkpoints hold, whole or sharded, by their headers alone: no torch, and no data is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors import SafetensorError, safe_open

from mpocli.errors import InputError
from mpocli.io.dtypes import STORED_DTYPES, DType, StoredDType
from mpocli.io.encoding import Encodings, encoded_names, encoding_of, has_tombstone, part_names
from mpocli.io.json_file import read_json
from mpocli.io.readable import is_file, is_there, why_unreadable
from mpocli.io.signpost import SIGNPOST

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
# The class matters: AutoModel would drop the head.
PICKLE_HINT = (
    "convert it once, where you trust it, with the class that config.json's `architectures` names: "
    'transformers.CLASS.from_pretrained("{model}").save_pretrained("NEW_DIR")'
)
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "pytorch_model.pt", "model.pth")

D = TypeVar("D", bound=DType)


@dataclass(frozen=True)
class TensorSpec(Generic[D]):
    """Name, dtype and shape of a stored tensor."""

    name: str
    dtype: D
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


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
        self.kept_values: dict[str, int] = {}
        self._show_encoded(encodings or {})

    def _show_encoded(self, encodings: Encodings) -> None:
        """Put a dense spec in the place of bitmask and values. `encoded` has its entry in `encodings` by stored name,
        `kept_values` how many entries are stored."""
        for name in sorted(encoded_names(self.specs)):
            entry = encoding_of(encodings, name)
            if entry is None:
                raise InputError(
                    f"{self.directory}: {name} is stored as a bitmask, and config.json has no encoding for it",
                    hint="restore config.json from the directory that mpocli wrote",
                )
            bits, values = (self.specs.pop(part) for part in part_names(name))
            shape = encodings[entry].shape
            dense = TensorSpec(name, values.dtype, shape)
            if bits.dtype != self._dtypes["U8"] or bits.numel != -(-dense.numel // 8) or len(values.shape) != 1:
                raise InputError(
                    f"{self.directory}: the bitmask of {name} has {bits.numel} elements of {bits.dtype} and values of "
                    f"shape {values.shape}, shape {'x'.join(map(str, shape))} needs {-(-dense.numel // 8)} bytes and "
                    "a list",
                    hint="config.json and the weights belong to different checkpoints",
                )
            self.specs[name], self.encoded[name], self.kept_values[name] = dense, entry, values.numel
        absent = sorted(set(encodings) - set(self.encoded.values()))
        if absent:
            raise InputError(
                f"{self.directory}: {absent[0]} is encoded, says config.json, and the files lack its bitmask or values",
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

    def part_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that the files hold for an encoded one."""
        dense, (bits, values) = self.specs[name], part_names(name)
        shapes: dict[str, tuple[int, ...]] = {bits: (-(-dense.numel // 8),), values: (self.kept_values[name],)}
        return {**shapes, **({name: (1,)} if has_tombstone(name) else {})}

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
