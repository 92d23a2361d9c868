"""The manifest `mpo.json`, and the part of it that `config.json` carries and that suffices to load."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mpocli.errors import InputError
from mpocli.io.differences import differences
from mpocli.io.encodings.base import Encoding
from mpocli.io.encodings.dense import Dense
from mpocli.io.encodings.known import KINDS, encodings_from
from mpocli.io.json_file import read_json
from mpocli.io.matrix_entry import MatrixEntry, listed
from mpocli.io.readable import is_there
from mpocli.mpo.shape import SiteShape

MANIFEST = "mpo.json"
QUANT_METHOD = "mpo"
FORMAT = "mpocli"
SCHEMA_VERSION = 1


_RESTORE = "restore config.json and mpo.json from the directory that mpocli wrote"


@dataclass(frozen=True)
class MPOSpec:
    """What must be known of one decomposed weight to build its module: the entry in `config.json`.

    `tied_to` names the module whose cores it shares (a tied head), `scale` is a factor on embedding rows. With
    `experts` it is one linear layer of so many networks: `share` says whether the central core is one for all
    (`central`), each has its own (`none`), or they are dense matrices (`dense`: no cores, dims (O,1)x(1,I), bonds 1);
    `place` whether it is one of a network's first layers (`in`) or its last (`out`), and `router` names the layer that
    holds the router, None for itself.
    """

    kind: str  # linear | conv1d | embedding
    shape: tuple[int, int]
    out_dims: tuple[int, ...]
    in_dims: tuple[int, ...]
    bond_dims: tuple[int, ...]
    tied_to: str | None = None
    scale: float = 1.0
    experts: int = 0
    share: str = "central"
    place: str = "in"
    router: str | None = None

    @property
    def sites(self) -> SiteShape:
        return SiteShape(self.out_dims, self.in_dims)

    @property
    def params(self) -> int:
        """Elements of all that is stored for it, a router's too; none of its own for a tied module."""
        return 0 if self.tied_to else sum(math.prod(shape) for shape in self.stored_shapes().values())

    @property
    def central_params(self) -> int:
        """Of the central core, or of all experts' where they share none."""
        shape = self.core_shapes().get(f"core_{self.sites.central}")
        return math.prod(shape) if shape else 0

    @property
    def auxiliary_params(self) -> int:
        return sum(math.prod(shape) for shape in self.core_shapes().values()) - self.central_params

    @property
    def dense_params(self) -> int:
        return 0 if self.tied_to else self.shape[0] * self.shape[1]

    def core_shapes(self) -> dict[str, tuple[int, ...]]:
        """(left bond, out, in, right bond), with the experts before it where each has its own; none if dense."""
        if self.share == "dense":
            return {}
        bonds, shapes = self.bond_dims, {}
        for k, (out, in_) in enumerate(zip(self.out_dims, self.in_dims, strict=True)):
            is_own = self.experts and (self.share == "none" or k != self.sites.central)
            shapes[f"core_{k}"] = (*((self.experts,) if is_own else ()), bonds[k], out, in_, bonds[k + 1])
        return shapes

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the files hold for it, by its name below the module's, but for bias and tombstone."""
        shapes: dict[str, tuple[int, ...]] = dict(self.core_shapes())
        if self.share == "dense":
            shapes["weight"] = (self.experts, *self.shape)
        if self.experts and self.router is None:
            shapes |= {"router.weight": (self.experts, self.shape[1]), "router.bias": (self.experts,)}
        return shapes

    def fields(self) -> dict[str, Any]:
        """Every one of them, as JSON has it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def to_dict(self) -> dict[str, Any]:
        """The entry in `config.json`: what is not as usual, and always the structure."""
        usual = {"tied_to": None, "scale": 1.0, "router": None}
        said = {name: value for name, value in self.fields().items() if name not in usual or value != usual[name]}
        if not self.experts:
            for name in ("experts", "share", "place"):
                del said[name]
        return said

    @classmethod
    def from_dict(cls, name: str, data: Mapping[str, Any]) -> MPOSpec:
        try:
            shape = tuple(map(int, data["shape"]))
            spec = cls(
                kind=str(data["kind"]),
                shape=(shape[0], shape[1]),
                out_dims=tuple(map(int, data["out_dims"])),
                in_dims=tuple(map(int, data["in_dims"])),
                bond_dims=tuple(map(int, data["bond_dims"])),
                tied_to=None if data.get("tied_to") is None else str(data["tied_to"]),
                scale=float(data.get("scale", 1.0)),
                experts=int(data.get("experts") or 0),
                share=str(data.get("share", "central")),
                place=str(data.get("place", "in")),
                router=None if data.get("router") is None else str(data["router"]),
            )
            sites = spec.sites
        except InputError as error:
            raise InputError(f"module {name}: {error.message}", hint=_RESTORE) from error
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise InputError(f"module {name}: its MPO entry is malformed ({error!r})", hint=_RESTORE) from error
        if len(shape) != 2:
            raise InputError(f"module {name}: {len(shape)} numbers for a shape, a matrix has 2", hint=_RESTORE)
        sites.check_fits(spec.shape, f"module {name}")
        if len(spec.bond_dims) != sites.sites + 1 or spec.kind not in ("linear", "conv1d", "embedding"):
            raise InputError(
                f"module {name}: kind {spec.kind!r} with {len(spec.bond_dims)} bond dimensions for {sites.sites} sites",
                hint="this checkpoint needs a newer mpocli, or its config.json was edited",
            )
        if spec.share not in ("central", "none", "dense") or spec.place not in ("in", "out") or spec.experts < 0:
            raise InputError(
                f"module {name}: {spec.experts} experts that share {spec.share!r}, as a layer {spec.place!r}",
                hint="this checkpoint needs a newer mpocli, or its config.json was edited",
            )
        if not spec.experts and (spec.share, spec.place, spec.router) != ("central", "in", None):
            raise InputError(
                f"module {name}: has no experts, and says of them share {spec.share!r}, place {spec.place!r}, router "
                f"{spec.router!r}",
                hint=_RESTORE,
            )
        if spec.share == "dense" and (spec.out_dims, spec.in_dims) != ((spec.shape[0], 1), (1, spec.shape[1])):
            raise InputError(
                f"module {name}: dense experts of {spec.shape[0]}x{spec.shape[1]} on sites {sites}", hint=_RESTORE
            )
        if not math.isfinite(spec.scale):
            raise InputError(f"module {name}: a scale of {spec.scale}", hint=_RESTORE)
        if spec.bond_dims[0] != 1 or spec.bond_dims[-1] != 1 or min(spec.bond_dims) < 1:
            raise InputError(
                f"module {name}: bond dimensions {list(spec.bond_dims)}, where both ends are 1 and none is less",
                hint=_RESTORE,
            )
        return spec


@dataclass(frozen=True)
class ModuleEntry:
    """One decomposed weight in the manifest: its structure and what was measured when it was made.

    `relative_error` = ‖W−Ŵ‖_F/‖W‖_F of the stored cores against the matrix they came from,
    which is the MPO in the weight files of sha256 `measured_against` where that was truncated again,
    `discarded_weight` = ε_k² per inner bond in units of W², `center` the canonical centre or None.
    None stands for "not known" (a manifest rebuilt from `config.json`).
    """

    name: str
    role: str | None
    spec: MPOSpec
    dtype: str
    relative_error: float | None = None
    discarded_weight: tuple[float, ...] | None = None
    center: int | None = None
    shared_central: str | None = None
    mask: str | None = None
    measured_against: str | None = None

    def unmeasured(self) -> ModuleEntry:
        """The structure alone, where the cores are no longer those that were measured."""
        return replace(self, relative_error=None, discarded_weight=None, center=None)

    def to_dict(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "name": self.name,
            "role": self.role,
            "kind": spec.kind,
            "shape": list(spec.shape),
            "padded_shape": list(spec.sites.padded_shape),
            "out_dims": list(spec.out_dims),
            "in_dims": list(spec.in_dims),
            "bond_dims": list(spec.bond_dims),
            "full_bond_dims": list(spec.sites.full_bond_dims),
            "central": spec.sites.central,
            "center": self.center,
            "params": spec.params,
            "dense_params": spec.dense_params,
            "relative_error": self.relative_error,
            "discarded_weight": None if self.discarded_weight is None else list(self.discarded_weight),
            "tensors": {core: {"encoding": Dense.name, "dtype": self.dtype} for core in spec.core_shapes()},
            "tied_to": spec.tied_to,
            "scale": spec.scale,
            "experts": spec.experts,
            "share": spec.share,
            "place": spec.place,
            "router": spec.router,
            "shared_central": self.shared_central,
            "mask": self.mask,
            **({"measured_against": self.measured_against} if self.measured_against else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModuleEntry:
        name = str(data["name"])
        tensors = dict(data["tensors"])
        dtypes = sorted({str(entry["dtype"]) for entry in tensors.values()})
        encodings = {str(entry["encoding"]) for entry in tensors.values()}
        if not encodings <= {Dense.name, *KINDS}:
            raise InputError(
                f"{MANIFEST}: module {name} stores cores as {sorted(encodings)}, which this mpocli does not read",
                hint="update mpocli",
            )
        discarded = data.get("discarded_weight")
        return cls(
            name=name,
            role=None if data.get("role") is None else str(data["role"]),
            spec=MPOSpec.from_dict(name, data),
            dtype=dtypes[0] if dtypes else "float32",
            relative_error=None if data.get("relative_error") is None else float(data["relative_error"]),
            discarded_weight=None if discarded is None else tuple(map(float, discarded)),
            center=None if data.get("center") is None else int(data["center"]),
            shared_central=data.get("shared_central"),
            mask=data.get("mask"),
            measured_against=data.get("measured_against"),
        )


@dataclass(frozen=True)
class Totals:
    """Of the whole model: parameters now and dense, their ratio (below 1 is smaller), and bytes.

    `bytes` = the weight files, `dense_bytes` = dense parameters × the stored dtype.
    """

    params: int
    dense_params: int
    ratio: float
    bytes: int
    dense_bytes: int

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Totals:
        counts = {name: int(data[name]) for name in ("params", "dense_params", "bytes", "dense_bytes")}
        return cls(ratio=float(data["ratio"]), **counts)


@dataclass(frozen=True)
class Manifest:
    """Everything `mpo.json` says. No clock, host name or absolute path: equal runs give equal bytes.

    `encodings` are the tensors (dense weights, cores) that the files do not hold as they are, by name; `routing` how
    tokens find their experts, empty where there are none; `matrices` all of the model's, in its order, those that are
    not decomposed too, None where an older mpocli has written none.
    """

    base_model: dict[str, Any] = field(default_factory=dict)
    modules: tuple[ModuleEntry, ...] = ()
    matrices: tuple[MatrixEntry, ...] | None = None
    encodings: dict[str, Encoding] = field(default_factory=dict)
    routing: dict[str, Any] = field(default_factory=dict)
    totals: Totals | None = None
    history: tuple[dict[str, Any], ...] = ()
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def by_name(self) -> dict[str, ModuleEntry]:
        return {entry.name: entry for entry in self.modules}

    def without_measurements(self) -> Manifest:
        """The structure alone, where cores are no longer those that were measured."""
        return replace(self, matrices=None, modules=tuple(entry.unmeasured() for entry in self.modules))

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "base_model": self.base_model,
            "totals": asdict(self.totals) if self.totals else None,
            "modules": [self._module(entry) for entry in self.modules],
            **({} if self.matrices is None else listed(self.matrices)),
            "encodings": {name: entry.to_dict() for name, entry in sorted(self.encodings.items())},
            "routing": self.routing,
            "history": list(self.history),
            "files": dict(sorted(self.files.items())),
        }

    def dumps(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def _module(self, entry: ModuleEntry) -> dict[str, Any]:
        data = entry.to_dict()
        for core, described in data["tensors"].items():
            if encoding := self.encodings.get(f"{entry.name}.{core}"):
                described["encoding"] = encoding.name
        return data

    @property
    def needs_plugin(self) -> bool:
        """Whether transformers alone cannot load the files."""
        return bool(self.modules or self.encodings)

    def quantization_config(self) -> dict[str, Any]:
        """The part for `config.json`: enough to load. Empty where an ordinary checkpoint needs none."""
        if not self.needs_plugin:
            return {}
        data: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "schema_version": SCHEMA_VERSION,
            "modules": {entry.name: entry.spec.to_dict() for entry in self.modules},
        }
        if self.encodings:
            data["encodings"] = {name: entry.to_dict() for name, entry in sorted(self.encodings.items())}
        if self.routing:
            data["routing"] = self.routing
        return data


def specs_from_config(data: Mapping[str, Any]) -> dict[str, MPOSpec]:
    """The decomposed modules that a `quantization_config` describes.

    Raises `InputError` for a schema that is newer than this mpocli, and for a structure that cannot be.
    """
    check_schema("config.json", data.get("schema_version", SCHEMA_VERSION))
    modules = data.get("modules") or {}
    if not isinstance(modules, Mapping):
        raise InputError("config.json: the `modules` of its quantization_config are no JSON object")
    specs = {name: MPOSpec.from_dict(name, entry) for name, entry in modules.items()}
    for name, spec in specs.items():
        _check_same("config.json", f"module {name}", modules[name], spec.fields())
    for name, spec in specs.items():
        if spec.tied_to is not None and (spec.tied_to not in specs or spec.tied_to == name):
            raise InputError(
                f"module {name}: shares the cores of {spec.tied_to!r}, which is no other of the {len(specs)} modules",
                hint=_RESTORE,
            )
    return specs


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:99]}…"


def _check_same(file: str, what: str, said: Any, meant: Any) -> None:
    """`InputError` where a file says something else than what was understood of it: a number that is another in its
    own other fields, a field that nobody knows."""
    for difference in differences(said, meant):
        if difference.unclaimed:  # optional, or of a later mpocli's writing
            continue
        place = f" at {difference.where}" if difference.where else ""
        claim = f"{file}: {what} says {_short(difference.claimed)}{place}"
        if difference.unknown:
            raise InputError(f"{claim}, a field that is not known", hint=f"update mpocli, or {_RESTORE}")
        raise InputError(f"{claim}, and by all else it is {_short(difference.found)}", hint=_RESTORE)


def check_schema(where: str, version: object) -> None:
    """Older schemas would be migrated here; there is one so far."""
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise InputError(f"{where}: schema_version is {version!r}, a positive integer was expected")
    if version > SCHEMA_VERSION:
        raise InputError(
            f"{where}: schema_version {version}, this mpocli reads up to {SCHEMA_VERSION}", hint="update mpocli"
        )


def read_manifest(directory: Path, config: Mapping[str, Any]) -> Manifest | None:
    """The manifest of a model directory, None where the model is not an MPO checkpoint.

    `config` is its `config.json`. Without `mpo.json` (a user's own `save_pretrained` writes none) what the
    config says is the manifest. Raises `InputError` where the two disagree.
    """
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, Mapping):
        raise InputError(f"{directory / 'config.json'}: its quantization_config is no JSON object", hint=_RESTORE)
    ours = quantization.get("quant_method") == QUANT_METHOD
    described = specs_from_config(quantization) if ours else None
    encodings = encodings_from(quantization.get("encodings") or {}) if ours else {}
    for name, encoding in encodings.items():
        _check_same("config.json", f"tensor {name}", quantization["encodings"][name], encoding.to_dict())
    routing = dict(quantization.get("routing") or {}) if ours else {}
    path = directory / MANIFEST
    if not is_there(path):  # a pipe, a folder or a dead link in its place is told by `read_json`
        if described is None:
            return None
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        entries = tuple(ModuleEntry(name, None, spec, dtype) for name, spec in described.items())
        return Manifest(modules=entries, encodings=encodings, routing=routing)
    data = read_json(path, strict=True)
    check_schema(MANIFEST, data.get("schema_version"))
    if data.get("format") != FORMAT:
        raise InputError(f"{path}: format {data.get('format')!r}, {FORMAT!r} was expected")
    try:
        totals = Totals.from_dict(data["totals"]) if data.get("totals") else None
        manifest = Manifest(
            base_model={str(key): value and str(value) for key, value in dict(data.get("base_model") or {}).items()},
            modules=tuple(ModuleEntry.from_dict(entry) for entry in data.get("modules") or ()),
            matrices=tuple(map(MatrixEntry.from_dict, data["matrices"])) if "matrices" in data else None,
            encodings=encodings_from(data.get("encodings") or {}),
            routing=dict(data.get("routing") or {}),
            totals=totals,
            history=tuple(
                {**entry, "command": str(entry["command"]), "options": dict(entry["options"])}
                for entry in data.get("history") or ()
            ),
            files={
                str(name): {"sha256": str(claim["sha256"]), "bytes": int(claim["bytes"])}
                for name, claim in (data.get("files") or {}).items()
            },
        )
    except InputError:
        raise
    except (TypeError, AttributeError, ValueError, KeyError, OverflowError) as error:
        raise InputError(f"{path}: malformed ({error!r})", hint=_RESTORE) from error
    counts = Counter(entry.name for entry in manifest.modules)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise InputError(f"{path}: module {twice[0]} is there {counts[twice[0]]} times", hint=_RESTORE)
    if described is None and not manifest.needs_plugin:
        _check_same(str(path), "the manifest", data, manifest.to_dict())
        return manifest
    recorded = {entry.name: entry.spec for entry in manifest.modules}
    for name in sorted(recorded.keys() | (described or {}).keys()):
        if recorded.get(name) != (described or {}).get(name):
            raise InputError(
                f"{directory}: {MANIFEST} and config.json disagree about module {name}",
                hint=f"delete the one that is stale; config.json alone suffices, without {MANIFEST}",
            )
    if manifest.routing != routing:
        raise InputError(
            f"{directory}: {MANIFEST} and config.json disagree about how tokens are routed",
            hint=f"delete the one that is stale; config.json alone suffices, without {MANIFEST}",
        )
    for name in sorted(manifest.encodings.keys() | encodings.keys()):
        if manifest.encodings.get(name) != encodings.get(name):
            raise InputError(
                f"{directory}: {MANIFEST} and config.json disagree about how {name} is stored",
                hint=f"delete the one that is stale; config.json alone suffices, without {MANIFEST}",
            )
    _check_same(str(path), "the manifest", data, manifest.to_dict())
    return manifest
