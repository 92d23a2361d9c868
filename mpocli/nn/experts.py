"""Linear layers of a mixture of experts whose weights are MPOs, with a core in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mpocli.errors import InputError
from mpocli.mpo.contract import to_dense
from mpocli.mpo.mpo import MPO
from mpocli.mpo.shape import SiteShape
from mpocli.nn.cores import MPOModule
from mpocli.nn.dense_experts import DenseExperts, add_noise, load_bias
from mpocli.nn.dispatch import Kind, Place, dispatch, dispatch_traced, linear_by_expert
from mpocli.nn.experts_contract import apply_chain, choose_way, join_sides, rebuild
from mpocli.nn.router import Router, Routing

Share = Literal["central", "none"]


class MPOExperts(MPOModule):
    """The O×I weights of n experts of one linear layer as MPOs that share their central core (MPOE, COLING 2022).

    `share="central"` stores that core once, (left bond, out, in, right bond), and every auxiliary core for all experts,
    (n, left bond, out, in, right bond); `share="none"` stores n of each. The bias is everybody's, as published. The
    router is put in by `attach_router`. Only routed experts are computed, in the cheaper of two ways
    (`experts_contract.choose_way`).

    `place="in"` takes (…, I) and returns (…, O), or (…, k, O) for k ≥ 2 experts a token; zeros where a choice was
    dropped. `place="out"` takes what that made and returns Σ_k gate_k · (W_k h_k + b), (…, O). What lies between must
    be element-wise.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        sites: SiteShape,
        bond_dims: Sequence[int],
        *,
        experts: int,
        place: Place,
        share: Share = "central",
        bias: bool = True,
        kind: Kind = "linear",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        # The base class asks for `core_shapes`.
        self.experts, self.share = experts, share
        super().__init__(shape, sites, bond_dims, dtype=dtype, device=device)
        self.out_features, self.in_features = shape
        self.place, self.kind = place, kind
        # Rebuild the weights again in the backward pass: a little time for the memory of r matrices a layer.
        self.recompute = False
        self.bias = nn.Parameter(torch.zeros(shape[0], dtype=dtype, device=device)) if bias else None
        self.router: Router | None = None

    @classmethod
    def from_mpo(
        cls,
        mpo: MPO,
        bias: Tensor | None = None,
        *,
        experts: int,
        place: Place,
        share: Share = "central",
        kind: Kind = "linear",
        dtype: torch.dtype | None = None,
    ) -> MPOExperts:
        """n equal experts."""
        dtype = dtype or torch.get_default_dtype()
        options: dict[str, Any] = {"experts": experts, "place": place, "share": share, "kind": kind}
        layer = cls(mpo.shape, mpo.site_shape, mpo.bond_dims, bias=bias is not None, dtype=dtype, **options)
        layer.load_mpo(mpo)
        load_bias(layer.bias, bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return dispatch_traced(x, self)
        return dispatch(x, self.router, self.place, self.out_features, self._multiply)

    def stacked(self, core: int) -> bool:
        """Whether each expert has its own core of this number."""
        return self.share == "none" or core != self.sites.central

    def core_shapes(self) -> list[tuple[int, ...]]:  # type: ignore[override]
        """(left bond, out, in, right bond) of the shared core, (n, left bond, out, in, right bond) of the others."""
        shapes = super().core_shapes()
        return [(self.experts, *shape) if self.stacked(k) else shape for k, shape in enumerate(shapes)]

    def cores_of(self, expert: int) -> tuple[Tensor, ...]:
        """One expert's cores, 4-way, differentiable."""
        return tuple(core[expert] if self.stacked(k) else core for k, core in enumerate(self.cores))

    def weight_matrix(self, expert: int) -> Tensor:  # type: ignore[override]
        """The O×I matrix of one expert in the cores' dtype, differentiable."""
        return to_dense(self.cores_of(expert))[: self.shape[0], : self.shape[1]]

    def dense_weight(self, expert: int) -> Tensor:
        """One expert's weight as the dense layer stores it: W for `linear`, Wᵀ for `conv1d`."""
        weight = self.weight_matrix(expert)
        return weight if self.kind == "linear" else weight.T.contiguous()

    def to_mpo(self, expert: int) -> MPO:  # type: ignore[override]
        return MPO(tuple(core.detach() for core in self.cores_of(expert)), self.shape)

    @torch.no_grad()
    def to_dense_experts(self) -> DenseExperts:
        """The same layer with n dense matrices, without its router."""
        like: dict[str, Any] = {"dtype": self.cores[0].dtype, "device": self.cores[0].device}
        options: dict[str, Any] = {"experts": self.experts, "place": self.place, "kind": self.kind}
        layer = DenseExperts(self.shape, bias=self.bias is not None, **options, **like)
        for expert in range(self.experts):
            layer.weight[expert] = self.weight_matrix(expert)
        load_bias(layer.bias, self.bias)
        return layer.train(self.training)

    def load_mpo(self, mpo: MPO) -> None:
        """Copy an MPO's cores into every expert. `InputError` where their dimensions differ."""
        self.load_experts([mpo] * self.experts)

    @torch.no_grad()
    def load_experts(self, mpos: Sequence[MPO]) -> None:
        """Copy one MPO into each expert, cast to this module's dtype.

        `InputError` for another number of experts, other dimensions, or different central cores where one is shared.
        """
        if len(mpos) != self.experts:
            raise InputError(f"{len(mpos)} MPOs for {self.experts} experts")
        for expert, mpo in enumerate(mpos):
            if (mpo.site_shape, mpo.bond_dims, mpo.shape) != (self.sites, self.bond_dims, self.shape):
                raise InputError(
                    f"expert {expert}: an MPO of {mpo.site_shape} with bonds {mpo.bond_dims} for a module of "
                    f"{self.sites} with bonds {self.bond_dims}"
                )
            first, central = mpos[0].cores[self.central], mpo.cores[self.central]
            if self.share == "central" and central is not first and not torch.equal(central, first):
                raise InputError(f"experts 0 and {expert} have different central cores", hint="share none keeps both")
        for k, parameter in enumerate(self.cores):
            for expert, mpo in enumerate(mpos if self.stacked(k) else mpos[:1]):
                (parameter[expert] if self.stacked(k) else parameter).copy_(mpo.cores[k])

    def replace_cores(self, mpo: MPO) -> None:
        raise InputError(
            f"one MPO cannot take the place of the cores of {self.experts} experts", hint="use load_experts"
        )

    @torch.no_grad()
    def perturb(self, std: float, generator: torch.Generator | None = None) -> None:
        """Break the symmetry of equal experts: Gaussian noise on the auxiliary cores, `std` times a core's root mean
        square."""
        for core in self.auxiliary_parameters():
            add_noise(core, std, generator)

    def _multiply(self, rows: Tensor, routing: Routing) -> Tensor:
        way = choose_way(rows.shape[0], len(routing.routed), self.sites, self.bond_dims)
        if way.kind == "rebuild" and self.recompute and torch.is_grad_enabled():
            rebuilt: Tensor = checkpoint(self._rebuilt, rows, routing, way.near, *self.cores, use_reentrant=False)
            return rebuilt
        if way.kind == "rebuild":
            return self._rebuilt(rows, routing, way.near, *self.cores)
        sides = join_sides(self._routed(routing, self.cores), way.near)
        padded = F.pad(rows, (0, self.sites.padded_shape[1] - self.in_features))
        y = apply_chain(padded, sides, routing.counts)[:, : self.out_features]
        # Under autocast the product is narrower than the bias, and so is a dense layer's result.
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _rebuilt(self, rows: Tensor, routing: Routing, near: Literal["left", "right"], *cores: Tensor) -> Tensor:
        # The cores come in as arguments: a recomputation must see the same ones.
        weights = rebuild(join_sides(self._routed(routing, cores), near))[:, : self.shape[0], : self.shape[1]]
        return linear_by_expert(rows, weights.unbind(0), self.bias, routing.counts)

    def _routed(self, routing: Routing, cores: Sequence[Tensor]) -> list[Tensor]:
        """The cores of the routed experts only."""
        if len(routing.routed) == self.experts:
            return list(cores)
        index = torch.tensor(routing.routed, device=cores[0].device)
        return [core.index_select(0, index) if self.stacked(k) else core for k, core in enumerate(cores)]

    def extra_repr(self) -> str:
        return f"{self.experts} experts of {super().extra_repr()}, {self.place}, shared: {self.share}"
