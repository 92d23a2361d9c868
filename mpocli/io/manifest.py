"""The manifest `mpo.json`, and the part of it that `config.json` carries and that suffices to load."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mpocli.io.encodings.base import Encoding
from mpocli.io.matrix_entry import MatrixEntry, listed
from mpocli.io.module_entry import ModuleEntry
from mpocli.io.schema import FORMAT, QUANT_METHOD, SCHEMA_VERSION
from mpocli.io.totals import Totals


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
