"""The structure of one decomposed weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpocli.errors import InputError
from mpocli.io.schema import RESTORE
from mpocli.mpo.shape import SiteShape


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
        """Elements of the central core, or of all experts' central cores where they share none."""
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
        """Every field, as JSON has it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def to_dict(self) -> dict[str, Any]:
        """The entry in `config.json`: the structure, and of the other fields those that are not as usual."""
        usual = {"tied_to": None, "scale": 1.0, "router": None}
        said = {name: value for name, value in self.fields().items() if name not in usual or value != usual[name]}
        if not self.experts:
            for name in ("experts", "share", "place"):
                del said[name]
        return said

    @classmethod
    def from_dict(cls, name: str, data: Mapping[str, Any]) -> MPOSpec:
        """Raises `InputError` for an entry of module `name` that is malformed or describes nothing that can be."""
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
            raise InputError(f"module {name}: {error.message}", hint=RESTORE) from error
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise InputError(f"module {name}: its MPO entry is malformed ({error!r})", hint=RESTORE) from error
        if len(shape) != 2:
            raise InputError(f"module {name}: {len(shape)} numbers for a shape, a matrix has 2", hint=RESTORE)
        spec._check(name, sites)
        return spec

    def _check(self, name: str, sites: SiteShape) -> None:
        """`InputError` for a structure that cannot be, or that this mpocli does not know."""
        sites.check_fits(self.shape, f"module {name}")
        if len(self.bond_dims) != sites.sites + 1 or self.kind not in ("linear", "conv1d", "embedding"):
            raise InputError(
                f"module {name}: kind {self.kind!r} with {len(self.bond_dims)} bond dimensions for {sites.sites} sites",
                hint="this checkpoint needs a newer mpocli, or its config.json was edited",
            )
        if self.share not in ("central", "none", "dense") or self.place not in ("in", "out") or self.experts < 0:
            raise InputError(
                f"module {name}: {self.experts} experts that share {self.share!r}, as a layer {self.place!r}",
                hint="this checkpoint needs a newer mpocli, or its config.json was edited",
            )
        if not self.experts and (self.share, self.place, self.router) != ("central", "in", None):
            raise InputError(
                f"module {name}: has no experts, and says of them share {self.share!r}, place {self.place!r}, router "
                f"{self.router!r}",
                hint=RESTORE,
            )
        if self.share == "dense" and (self.out_dims, self.in_dims) != ((self.shape[0], 1), (1, self.shape[1])):
            raise InputError(
                f"module {name}: dense experts of {self.shape[0]}x{self.shape[1]} on sites {sites}", hint=RESTORE
            )
        if not math.isfinite(self.scale):
            raise InputError(f"module {name}: a scale of {self.scale}", hint=RESTORE)
        if self.bond_dims[0] != 1 or self.bond_dims[-1] != 1 or min(self.bond_dims) < 1:
            raise InputError(
                f"module {name}: bond dimensions {list(self.bond_dims)}, where both ends are 1 and none is less",
                hint=RESTORE,
            )
