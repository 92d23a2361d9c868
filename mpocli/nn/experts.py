"""Linear layers of a mixture of experts: the first and the last ones of a feed-forward network, around its own code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from mpocli.nn.experts_contract import apply_chain, choose_way, join_sides, rebuild
from mpocli.nn.router import Router, Routing

# `in`: routes its input and returns what each token's experts make of it; `out`: takes that and sums it with the gates.
Place = Literal["in", "out"]
Share = Literal["central", "none"]
Kind = Literal["linear", "conv1d"]
# (rows of the routed experts one after another, the routing) → the product with their weights, bias added.
Multiply = Callable[[Tensor, Routing], Tensor]


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
        _load_bias(layer.bias, bias)
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
        _load_bias(layer.bias, self.bias)
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
            _add_noise(core, std, generator)

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
        return _linear_by_expert(rows, weights.unbind(0), self.bias, routing.counts)

    def _routed(self, routing: Routing, cores: Sequence[Tensor]) -> list[Tensor]:
        """The cores of the routed experts only."""
        if len(routing.routed) == self.experts:
            return list(cores)
        index = torch.tensor(routing.routed, device=cores[0].device)
        return [core.index_select(0, index) if self.stacked(k) else core for k, core in enumerate(cores)]

    def extra_repr(self) -> str:
        return f"{self.experts} experts of {super().extra_repr()}, {self.place}, shared: {self.share}"


class DenseExperts(nn.Module):
    """The O×I weights of n experts of one linear layer, (n, O, I), with a bias in common: what `MPOExperts` is
    compared with, and becomes by merging. O×I for both kinds."""

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        experts: int,
        place: Place,
        bias: bool = True,
        kind: Kind = "linear",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.experts, self.place, self.kind = shape, experts, place, kind
        self.out_features, self.in_features = shape
        self.weight = nn.Parameter(torch.empty(experts, *shape, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(shape[0], dtype=dtype, device=device)) if bias else None
        self.router: Router | None = None

    @classmethod
    def from_matrix(
        cls,
        matrix: Tensor,
        bias: Tensor | None = None,
        *,
        experts: int,
        place: Place,
        kind: Kind = "linear",
        dtype: torch.dtype | None = None,
    ) -> DenseExperts:
        """n equal experts of an O×I matrix."""
        shape = (matrix.shape[0], matrix.shape[1])
        dtype = dtype or torch.get_default_dtype()
        layer = cls(shape, experts=experts, place=place, bias=bias is not None, kind=kind, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(matrix)
        _load_bias(layer.bias, bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return dispatch_traced(x, self)
        return dispatch(x, self.router, self.place, self.out_features, self._multiply)

    def weight_matrix(self, expert: int) -> Tensor:
        return self.weight[expert]

    @torch.no_grad()
    def perturb(self, std: float, generator: torch.Generator | None = None) -> None:
        """Gaussian noise, `std` times the root mean square of all weights."""
        _add_noise(self.weight, std, generator)

    def _multiply(self, rows: Tensor, routing: Routing) -> Tensor:
        weights = self.weight.unbind(0)
        return _linear_by_expert(rows, [weights[expert] for expert in routing.routed], self.bias, routing.counts)

    def extra_repr(self) -> str:
        return f"{self.experts} experts of {self.shape[0]}x{self.shape[1]}, {self.place}"


def attach_router(layer: MPOExperts | DenseExperts, router: Router, *, own: bool) -> None:
    """Give a layer its router. One layer of a network owns it, as a submodule that is stored; the others see it."""
    if own:
        layer.router = router
    else:
        object.__setattr__(layer, "router", router)  # as a submodule it would be stored again


def dispatch(x: Tensor, router: Router | None, place: Place, out_features: int, multiply: Multiply) -> Tensor:
    """Group the rows by expert, multiply, and put the results back where their tokens are.

    `in`: (…, I) → (…, O), or (…, k, O) for k ≥ 2; `out`: these → (…, O).
    """
    if router is None:
        raise RuntimeError("a layer of experts without a router")
    routing = router(x) if place == "in" else router.take()
    k = routing.k
    if place == "in":
        leading, source = x.shape[:-1], routing.tokens  # of a token
    else:
        leading, source = (x.shape[:-2] if k > 1 else x.shape[:-1]), routing.order  # of a slot
    rows = x.reshape(-1, x.shape[-1]).index_select(0, source)
    made = multiply(rows, routing) if routing.routed else rows.new_zeros(0, out_features)
    # (T·k, O), zero where a choice was dropped
    slots = made.new_zeros(routing.experts.numel(), out_features).index_copy_(0, routing.order, made)
    if place == "in":
        return slots.reshape(*leading, *((k,) if k > 1 else ()), out_features)
    weighted = slots.reshape(-1, k, out_features) * routing.gates.to(slots.dtype)[:, :, None]
    return (weighted.sum(1) if k > 1 else weighted).reshape(*leading, out_features)


def dispatch_traced(x: Tensor, layer: MPOExperts | DenseExperts) -> Tensor:
    """The same in a compiled graph, whose shapes must not depend on the routing: every expert multiplies every row."""
    router = layer.router
    if router is None:
        raise RuntimeError("a layer of experts without a router")
    routing = router(x) if layer.place == "in" else router.take()
    k, first = routing.k, layer.place == "in"
    leading = x.shape[:-1] if first or k == 1 else x.shape[:-2]
    rows = x.reshape(-1, layer.in_features)
    if first and k > 1:
        rows = rows.repeat_interleave(k, 0)  # a row for each slot
    slots = rows.new_zeros(rows.shape[0], layer.out_features)
    for expert in range(layer.experts):
        mine = (routing.experts == expert) & routing.kept
        made = F.linear(rows, layer.weight_matrix(expert), layer.bias)
        slots = torch.where(mine.reshape(-1, 1), made, slots.to(made.dtype))
    if first:
        return slots.reshape(*leading, *((k,) if k > 1 else ()), layer.out_features)
    weighted = slots.reshape(-1, k, layer.out_features) * routing.gates.to(slots.dtype)[:, :, None]
    return weighted.sum(1).reshape(*leading, layer.out_features)


def _linear_by_expert(rows: Tensor, weights: Sequence[Tensor], bias: Tensor | None, counts: Sequence[int]) -> Tensor:
    """(S, I) → (S, O) with one O×I matrix for each group of rows."""
    parts = zip(rows.split(list(counts)), weights, strict=True)
    made = [F.linear(part, weight, bias) for part, weight in parts]
    return made[0] if len(made) == 1 else torch.cat(made)


def _load_bias(bias: nn.Parameter | None, values: Tensor | None) -> None:
    if bias is not None and values is not None:
        with torch.no_grad():
            bias.copy_(values)


def _add_noise(parameter: Tensor, std: float, generator: torch.Generator | None) -> None:
    if std:
        # Drawn on the CPU in float32: the same noise on every device and in every dtype.
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        size = parameter.detach().float().square().mean().sqrt()
        parameter.add_((noise.to(parameter.device) * (std * size)).to(parameter.dtype))
