"""Weight matrices as names, shapes and dtypes: held against the files, and chosen by role and by name. No torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mpocli.config.text import ROLES
from mpocli.errors import InputError
from mpocli.io.dtypes import DType

if TYPE_CHECKING:
    from mpocli.io.module_entry import ModuleEntry
    from mpocli.io.stored import StoredTensors

D = TypeVar("D", bound=DType)


def prefix_of(key: str) -> str:
    """What the cores of a weight are called below in the files, by the weight's key.

    >>> prefix_of("embed_out.weight"), prefix_of("gate_weight")
    ('embed_out', 'gate_weight')
    """
    return key.removesuffix(".weight")


@dataclass(frozen=True)
class Member:
    """One of the modules that use a weight: its name, kind (linear | conv1d | embedding) and embedding scale."""

    name: str
    kind: str
    scale: float = 1.0


@dataclass(frozen=True)
class Matrix(Generic[D]):
    """A weight matrix, O×I with rows = output features (or the vocabulary), and how it is stored.

    `members` are the modules that share it, the owner first (more than one: tied). `key` is its name in the files, for
    a decomposed one the tombstone's. `obstacle` says why it cannot be decomposed, if so. `entry` is the manifest's,
    where it is decomposed already.
    """

    members: tuple[Member, ...]
    roles: frozenset[str]
    shape: tuple[int, int]
    key: str | None
    dtype: D
    obstacle: str = ""
    entry: ModuleEntry | None = None

    @property
    def name(self) -> str:
        return self.members[0].name

    @property
    def kind(self) -> str:
        return self.members[0].kind

    @property
    def role(self) -> str | None:
        """The first of its roles in the order of `ROLES`: a tied embedding and head is an embedding."""
        return next((role for role in ROLES if role in self.roles), None)

    @property
    def dense_params(self) -> int:
        return self.shape[0] * self.shape[1]

    def key_of(self, part: str) -> str:
        """What the files call a part of it: `weight` itself, a core, a router's tensor."""
        assert self.key is not None
        return self.key if part == "weight" else f"{prefix_of(self.key)}.{part}"


M = TypeVar("M", bound=Matrix[Any])


def checked(weight: M, reader: StoredTensors[Any], why_not_stored: str) -> M:
    """The weight if the files hold it as described; `why_not_stored` is its obstacle where they have no key of it."""
    if weight.entry is None:
        if weight.key and not weight.obstacle:
            stored = reader.specs[weight.key].shape
            expected = weight.shape[::-1] if weight.kind == "conv1d" else weight.shape
            if stored != expected:
                raise InputError(
                    f"{reader.directory}: tensor {weight.key} is {_by(stored)}, config.json implies {_by(expected)}",
                    hint="config.json and the weights belong to different models",
                )
        elif weight.key is None and not weight.obstacle:
            return replace(weight, obstacle=why_not_stored)
        return weight
    if weight.key is None:
        raise InputError(
            f"{reader.directory}: module {weight.name} is in the manifest and has no tensor {weight.name}.weight",
            hint="the weight files belong to another checkpoint",
        )
    spec = weight.entry.spec
    parts = {weight.key_of(part): shape for part, shape in spec.stored_shapes().items()}
    for name, shape in parts.items():
        if name not in reader:
            raise InputError(
                f"{reader.directory}: {_part(name)} is in the manifest and not in the files",
                hint="the weight files are incomplete or belong to another checkpoint",
            )
        if reader.specs[name].shape != shape:
            raise InputError(
                f"{reader.directory}: {_part(name)} is {_by(reader.specs[name].shape)}, the manifest says {_by(shape)}",
                hint="the weight files belong to another checkpoint",
            )
    cores = len(spec.core_shapes())
    extra = weight.key_of(f"core_{cores}")
    if extra in reader:
        raise InputError(
            f"{reader.directory}: core {extra} is in the files, the manifest has {cores} cores there",
            hint="the weight files belong to another checkpoint",
        )
    return replace(weight, dtype=reader.specs[next(iter(parts))].dtype)


def _part(name: str) -> str:
    return f"core {name}" if re.search(r"\.core_\d+$", name) else f"tensor {name}"


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def select(
    weights: Sequence[M],
    *,
    layers: Sequence[str] | None,
    targets: Sequence[str],
    ignore: Sequence[str],
    default_roles: Sequence[str],
    target_option: str = "‹target›",
) -> list[M]:
    """The weights that the roles and globs choose; either half of a tied pair chooses both.

    `targets` alone replaces the default roles, with `layers` both must hold, `ignore` subtracts last. Globs
    match whole module names and `*` crosses dots. `InputError` for a glob that matches nothing, which calls the
    targets by the option that they came from.
    """
    names = [member.name for weight in weights for member in weight.members]
    for option, globs in ((target_option, targets), ("‹ignore›", ignore)):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in names):
                raise InputError(f"{option} {glob!r} matches no weight matrix", hint=_nearest(glob, names))
    roles = set(layers if layers is not None else default_roles)

    def matches(weight: M, globs: Sequence[str]) -> bool:
        return any(fnmatchcase(member.name, glob) for member in weight.members for glob in globs)

    chosen = []
    for weight in weights:
        wanted = bool(weight.roles & roles) if layers is not None or not targets else True
        if targets:
            wanted = wanted and matches(weight, targets)
        if wanted and not matches(weight, ignore):
            chosen.append(weight)
    return chosen


def _nearest(glob: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(glob.strip("*"), names, n=3, cutoff=0.3)
    if not close:
        pieces = {name.rpartition(".")[2] for name in names}
        close = difflib.get_close_matches(glob.strip("*."), sorted(pieces), n=3, cutoff=0.3) or sorted(pieces)[:3]
    return "the nearest names are " + ", ".join(close) + "; `*` crosses dots, as in '*attention*'"
