"""What every MPO module shares: its cores as named parameters, their roles, and the dense weight's tombstone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mpocli.errors import InputError
from mpocli.mpo.contract import to_dense
from mpocli.mpo.mpo import MPO
from mpocli.mpo.shape import SiteShape

Update = Literal["auxiliary", "central", "all", "none"]

# The dense weight's name stays in the state dict as one zero: loading such a file into the dense model is a
# size mismatch, hence an error, instead of a silently random layer. Model code that reads `.weight.dtype` or
# `.weight.device` (T5, Switch, GPT-2) finds them on it too.
TOMBSTONE = "weight"


class MPOModule(nn.Module):
    """An O×I weight held as cores `core_0 … core_{n-1}`, each (left bond, out, in, right bond).

    Named parameters rather than a `ParameterList`, whose offloading to disk fails.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        sites: SiteShape,
        bond_dims: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        sites.check_fits(shape, type(self).__name__)
        self.shape = shape
        self.sites = sites
        self.bond_dims = tuple(bond_dims)
        # Set where the module is put into a model: the module whose cores these are, and the class it replaced.
        self.tied_to: str | None = None
        self.dense_class: type[nn.Module] | None = None
        for k, core_shape in enumerate(self.core_shapes()):
            self.register_parameter(f"core_{k}", nn.Parameter(torch.empty(core_shape, dtype=dtype, device=device)))
        self.register_buffer(TOMBSTONE, torch.zeros(1, dtype=dtype, device=device))

    def core_shapes(self) -> list[tuple[int, int, int, int]]:
        """(left bond, out, in, right bond) of every core."""
        bonds, dims = self.bond_dims, zip(self.sites.out_dims, self.sites.in_dims, strict=True)
        return [(bonds[k], out, in_, bonds[k + 1]) for k, (out, in_) in enumerate(dims)]

    @property
    def stored_shape(self) -> tuple[int, int]:
        """The shape of the dense weight as its layer stores it: GPT-2's `Conv1D` holds the transpose."""
        return self.shape[::-1] if getattr(self, "kind", None) == "conv1d" else self.shape

    @property
    def cores(self) -> tuple[nn.Parameter, ...]:
        # Plain attribute access: `torch.func.functional_call` puts tensors in the parameters' places.
        return tuple(getattr(self, f"core_{k}") for k in range(self.sites.sites))

    @property
    def central(self) -> int:
        """Index of the central core; the others are auxiliary."""
        return self.sites.central

    def central_parameters(self) -> Iterator[nn.Parameter]:
        yield self.cores[self.central]

    def auxiliary_parameters(self) -> Iterator[nn.Parameter]:
        yield from (core for k, core in enumerate(self.cores) if k != self.central)

    def set_update(self, update: Update) -> None:
        """Let gradients reach the auxiliary cores, the central one, all or none; other parameters are left alone."""
        for k, core in enumerate(self.cores):
            role = "central" if k == self.central else "auxiliary"
            core.requires_grad_(update in ("all", role))

    def weight_matrix(self) -> Tensor:
        """The O×I matrix in the cores' dtype, differentiable; rows are output features (or the vocabulary)."""
        return to_dense(self.cores)[: self.shape[0], : self.shape[1]]

    @torch.no_grad()
    def load_mpo(self, mpo: MPO) -> None:
        """Copy an MPO's cores in, cast to this module's dtype. `InputError` where their dimensions differ."""
        if [tuple(core.shape) for core in mpo.cores] != self.core_shapes():
            raise InputError(
                f"an MPO of {mpo.site_shape} with bonds {mpo.bond_dims} for a module of {self.sites} with bonds "
                f"{self.bond_dims}"
            )
        for parameter, core in zip(self.cores, mpo.cores, strict=True):
            parameter.copy_(core)

    @torch.no_grad()
    def replace_cores(self, mpo: MPO) -> None:
        """Take over an MPO of the same sites and other bonds: new parameters where a shape differs, copies elsewhere.

        Whoever holds the old parameters (an optimiser, a tied module) must be told. `InputError` for other sites.
        """
        if mpo.site_shape != self.sites or mpo.shape != self.shape:
            raise InputError(f"an MPO of {mpo.site_shape}, {mpo.shape} for a module of {self.sites}, {self.shape}")
        for k, (old, new) in enumerate(zip(self.cores, mpo.cores, strict=True)):
            if old.shape == new.shape:
                old.copy_(new)
            else:
                made = nn.Parameter(new.to(old).clone(), requires_grad=old.requires_grad)
                setattr(self, f"core_{k}", made)
        self.bond_dims = mpo.bond_dims

    def to_mpo(self) -> MPO:
        return MPO(tuple(core.detach() for core in self.cores), self.shape)

    def extra_repr(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]} as {self.sites}, bonds {self.bond_dims}"
