"""The encodings that this mpocli knows, and those of a checkpoint's tensors by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mpocli.errors import InputError
from mpocli.io.encodings.base import Encoding
from mpocli.io.encodings.bitmask import Bitmask
from mpocli.io.encodings.corrected import Corrected
from mpocli.io.encodings.quantised import Quantised
from mpocli.io.encodings.quantised_bitmask import QuantisedBitmask

ENCODINGS: tuple[type[Encoding], ...] = (
    Bitmask,
    Quantised,
    QuantisedBitmask,
    Corrected,
)


def by_name(kinds: Iterable[type[Encoding]]) -> dict[str, type[Encoding]]:
    """Encodings by the word for them in JSON; `TypeError` where two have one word, or parts that end alike."""
    found: dict[str, type[Encoding]] = {}
    ends: dict[str, type[Encoding]] = {}
    for kind in kinds:
        if kind.name in found:
            raise TypeError(f"{kind.__name__} and {found[kind.name].__name__} are both called {kind.name!r}")
        for part in kind.parts:
            for end, other in ends.items():
                if part.suffix.endswith(end) or end.endswith(part.suffix):
                    raise TypeError(
                        f"the part {part.suffix!r} of {kind.__name__} ends like {end!r} of {other.__name__}: "
                        "choose another suffix"
                    )
            ends[part.suffix] = kind
        found[kind.name] = kind
    return found


# A tensor that has no entry there is dense.
KINDS: Mapping[str, type[Encoding]] = by_name(ENCODINGS)

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


def widened(before: Encodings, after: Encodings) -> int:
    """Tensors that were in few bits and are not any more, by their entries."""
    return sum(
        encoding.code_bits is not None and (name not in after or after[name].code_bits is None)
        for name, encoding in before.items()
    )


def encoding_of(encodings: Encodings, stored: str) -> str | None:
    """The entry of a tensor in the files, by its key, its name, or a shorter or longer path; None for none."""
    by_key = [name for name, encoding in encodings.items() if encoding.key == stored]
    if by_key:
        return by_key[0]
    if stored in encodings:
        return stored
    found = [name for name in encodings if name.endswith(f".{stored}") or stored.endswith(f".{name}")]
    return found[0] if len(found) == 1 else None
