"""Write safetensors files tensor by tensor, so that a model of any size needs the memory of one tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

import torch
from torch import Tensor, uint8

from mpocli.io.checkpoint import DTYPE_NAMES
from mpocli.io.stored import WEIGHTS, WEIGHTS_INDEX
from mpocli.io.tensor_spec import TensorSpec

Spec = TensorSpec[torch.dtype]
# transformers refuses a file whose metadata does not say so.
_METADATA = {"format": "pt"}
_SPOOL = ".spool"
# Of a tensor in the header, beside its name and shape; its offsets have up to 12 digits.
_ENTRY_BYTES = 80


@dataclass(frozen=True)
class Shard:
    """One file to be: its name, its tensors in file order, and its exact size."""

    name: str
    specs: tuple[Spec, ...]
    header: bytes

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(spec.nbytes for spec in self.specs)


def plan_shards(specs: Iterable[Spec], max_shard_bytes: int) -> list[Shard]:
    """Distribute tensors over files of at most `max_shard_bytes` each (one tensor may be larger), in order."""
    empty = len(_header(())) + 8  # and at most this much padding
    groups: list[list[Spec]] = [[]]
    size = empty
    for spec in specs:
        entry = len(json.dumps([spec.name, spec.shape], ensure_ascii=False).encode()) + _ENTRY_BYTES
        more = spec.nbytes + entry
        if groups[-1] and size + more > max_shard_bytes:
            groups.append([])
            size = empty
        groups[-1].append(spec)
        size += more
    count = len(groups)
    shards = []
    for number, group in enumerate(groups, 1):
        name = WEIGHTS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        # Wide types first: every tensor is then aligned to its own element size.
        ordered = tuple(sorted(group, key=lambda spec: (-spec.dtype.itemsize, spec.name)))
        shards.append(Shard(name, ordered, _header(ordered)))
    return shards


def _header(specs: Sequence[Spec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": _METADATA}
    offset = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data start on a multiple of 8
    return len(text).to_bytes(8, "little") + text


class Sink(Protocol):
    """Something tensors are added to, one name after the other."""

    specs: list[Spec]

    def add(self, name: str, tensor: Tensor) -> None: ...


class SpecCounter:
    """A sink that only takes note of shapes: for a dry run."""

    def __init__(self) -> None:
        self.specs: list[Spec] = []

    def add(self, name: str, tensor: Tensor) -> None:
        self.specs.append(TensorSpec(name, tensor.dtype, tuple(tensor.shape)))


class CheckpointWriter:
    """Collects tensors in a spool file and lays them out as safetensors on `finish`.

    The safetensors library writes from memory only; sizes are not known before the last matrix is decomposed,
    and the header comes first, hence the detour. While it works, the disk holds the spool; while it finishes,
    the spool shrinks as the files grow, so that both together never take more than all tensors and the largest
    one again (where files may have holes; twice all tensors where not). As a context manager it drops the spool
    on a failure.
    """

    def __init__(self, directory: Path, max_shard_bytes: int) -> None:
        self._directory = directory
        self._max_shard_bytes = max_shard_bytes
        self._spool = (directory / _SPOOL).open("w+b")
        self._offsets: dict[str, int] = {}
        self.specs: list[Spec] = []

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop the spool and what is in it. Does nothing after `finish`."""
        with suppress(OSError):  # of a full disk: nobody needs the last bytes any more
            self._spool.close()
        (self._directory / _SPOOL).unlink(missing_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor. Each name once."""
        if name in self._offsets:
            raise ValueError(f"tensor {name} is written twice")
        self._offsets[name] = self._spool.tell()
        self.specs.append(TensorSpec(name, tensor.dtype, tuple(tensor.shape)))
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._spool.write(flat.view(uint8).numpy().data)

    def finish(self) -> list[Path]:
        """Write the files (and the index of more than one), remove the spool, return the weight files."""
        shards = plan_shards(self.specs, self._max_shard_bytes)
        for shard in reversed(shards):
            with (self._directory / shard.name).open("wb") as stream:
                stream.write(shard.header)
                places, start = [], len(shard.header)
                for spec in shard.specs:
                    if spec.nbytes:
                        places.append((self._offsets[spec.name], start, spec.nbytes))
                    start += spec.nbytes
                # From the spool's end to its beginning, and what has been copied is cut off.
                for offset, start, count in sorted(places, reverse=True):
                    self._spool.seek(offset)
                    stream.seek(start)
                    _copy(self._spool, stream, count)
                    self._spool.truncate(offset)
        self.close()
        if len(shards) > 1:
            weight_map = {spec.name: shard.name for shard in shards for spec in shard.specs}
            index = {
                "metadata": {"total_size": sum(spec.nbytes for spec in self.specs)},
                "weight_map": dict(sorted(weight_map.items())),
            }
            (self._directory / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return [self._directory / shard.name for shard in shards]


def _copy(source: BinaryIO, target: BinaryIO, count: int) -> None:
    while count:
        block = source.read(min(count, 1 << 22))
        if not block:
            raise OSError("the spool file ended early")
        target.write(block)
        count -= len(block)
