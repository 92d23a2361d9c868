"""Linear layers of a mixture of experts whose weights are dense matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpocli.nn.dispatch import Kind, Place, dispatch, dispatch_traced, linear_by_expert
from mpocli.nn.router import Router, Routing


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
        load_bias(layer.bias, bias)
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
        add_noise(self.weight, std, generator)

    def _multiply(self, rows: Tensor, routing: Routing) -> Tensor:
        weights = self.weight.unbind(0)
        return linear_by_expert(rows, [weights[expert] for expert in routing.routed], self.bias, routing.counts)

    def extra_repr(self) -> str:
        return f"{self.experts} experts of {self.shape[0]}x{self.shape[1]}, {self.place}"


def load_bias(bias: nn.Parameter | None, values: Tensor | None) -> None:
    if bias is not None and values is not None:
        with torch.no_grad():
            bias.copy_(values)


def add_noise(parameter: Tensor, std: float, generator: torch.Generator | None) -> None:
    if std:
        # Drawn on the CPU in float32: the same noise on every device and in every dtype.
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        size = parameter.detach().float().square().mean().sqrt()
        parameter.add_((noise.to(parameter.device) * (std * size)).to(parameter.dtype))
