"""One decomposed weight in the manifest: its structure, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mpocli.errors import InputError
from mpocli.io.encodings.dense import Dense
from mpocli.io.encodings.known import KINDS
from mpocli.io.mpo_spec import MPOSpec
from mpocli.io.schema import MANIFEST


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
