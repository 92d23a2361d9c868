"""The encodings that this mpocli knows, and those of a checkpoint's tensors by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mpocli.errors import InputError
from mpocli.io.encodings.base import Encoding
from mpocli.io.encodings.bitmask import Bitmask as Bitmask  # a line for each: what is imported here is known
from mpocli.io.encodings.dense import Dense
from mpocli.io.encodings.quantised import Quantised as Quantised
from mpocli.io.encodings.quantised_bitmask import QuantisedBitmask as QuantisedBitmask

# By the word for it in JSON. A tensor that has no entry there is dense.
KINDS: Mapping[str, type[Encoding]] = {kind.name: kind for kind in Encoding.__subclasses__() if kind is not Dense}

Encodings = Mapping[str, Encoding]


def encodings_from(data: object) -> dict[str, Encoding]:
    """`encodings` of a `quantization_config` or manifest; `InputError` where they cannot be read."""
    if not isinstance(data, Mapping):
        raise InputError(f"the encodings are a {type(data).__name__}, a JSON object was expected")
    return {str(name): _encoding(str(name), entry) for name, entry in data.items()}


def _encoding(name: str, data: Mapping[str, Any]) -> Encoding:
    try:
        word, shape = str(data["encoding"]), tuple(map(int, data["shape"]))
        key = None if data.get("key") is None else str(data["key"])
        kind = KINDS.get(word)
        own = kind.own_fields(data) if kind else {}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"tensor {name}: its encoding is malformed ({error!r})", hint="restore config.json and mpo.json"
        ) from error
    if kind is None or not shape or min(shape) < 1:
        raise InputError(
            f"tensor {name}: stored as {word!r} of shape {list(shape)}, which this mpocli does not read",
            hint="update mpocli",
        )
    return kind(shape, key=key, **own)


def encoded(stored: Iterable[str]) -> dict[str, type[Encoding]]:
    """The tensors that the files hold in parts, in the order of their names."""
    names = set(stored)
    found = {name: kind for kind in KINDS.values() for name in kind.found_in(names)}
    return dict(sorted(found.items()))


def encoding_of(encodings: Encodings, stored: str) -> str | None:
    """The entry of a tensor in the files, by its key, its name, or a shorter or longer path; None for none."""
    by_key = [name for name, encoding in encodings.items() if encoding.key == stored]
    if by_key:
        return by_key[0]
    if stored in encodings:
        return stored
    found = [name for name in encodings if name.endswith(f".{stored}") or stored.endswith(f".{name}")]
    return found[0] if len(found) == 1 else None
