"""A linear layer whose weight is an MPO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mpocli.mpo.contract import apply_chain, choose_path, to_dense
from mpocli.mpo.mpo import MPO
from mpocli.mpo.shape import SiteShape
from mpocli.nn.cores import MPOModule


class MPOLinear(MPOModule):
    """y = x Wᵀ + b with W (out_features × in_features) as cores.

    `kind` is the layer it stands for: `linear`, or `conv1d`, GPT-2's layer that stores Wᵀ; both compute the
    same and differ only in the orientation of `dense_weight`. Each call takes the cheaper of rebuilding W and
    contracting x with the cores (`mpo.contract.choose_path`).

    >>> layer = MPOLinear.from_mpo(MPO.from_matrix(torch.eye(4), SiteShape((2, 2), (2, 2))))
    >>> layer(torch.ones(3, 5, 4)).shape
    torch.Size([3, 5, 4])
    """

    def __init__(
        self,
        shape: tuple[int, int],
        sites: SiteShape,
        bond_dims: Sequence[int],
        *,
        bias: bool = True,
        kind: Literal["linear", "conv1d"] = "linear",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape, sites, bond_dims, dtype=dtype, device=device)
        self.out_features, self.in_features = shape
        self.kind = kind
        # Rebuild W again in the backward pass: a little time for the memory of one W per layer.
        self.recompute = False
        self.bias = nn.Parameter(torch.zeros(shape[0], dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_mpo(
        cls,
        mpo: MPO,
        bias: Tensor | None = None,
        *,
        kind: Literal["linear", "conv1d"] = "linear",
        dtype: torch.dtype | None = None,
    ) -> MPOLinear:
        dtype = dtype or torch.get_default_dtype()
        layer = cls(mpo.shape, mpo.site_shape, mpo.bond_dims, bias=bias is not None, kind=kind, dtype=dtype)
        layer.load_mpo(mpo)
        if bias is not None and layer.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        tokens = math.prod(x.shape[:-1])
        path = choose_path(tokens, self.sites.out_dims, self.sites.in_dims, self.bond_dims)
        if path == "rebuild":
            if self.recompute and torch.is_grad_enabled():
                rebuilt: Tensor = checkpoint(self._rebuilt, x, *self.cores, use_reentrant=False)
                return rebuilt
            return self._rebuilt(x, *self.cores)
        flat = F.pad(x.reshape(tokens, self.in_features), (0, self.sites.padded_shape[1] - self.in_features))
        y = apply_chain(flat, self.cores, path)[:, : self.out_features].reshape(*x.shape[:-1], self.out_features)
        # Under autocast the product is narrower than the bias, and so is a dense layer's result.
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _rebuilt(self, x: Tensor, *cores: Tensor) -> Tensor:
        # The cores come in as arguments: a recomputation must see the same ones.
        return F.linear(x, to_dense(cores)[: self.shape[0], : self.shape[1]], self.bias)

    def dense_weight(self) -> Tensor:
        """The weight as the dense layer stores it: W for `linear`, Wᵀ for `conv1d`."""
        weight = self.weight_matrix()
        return weight if self.kind == "linear" else weight.T.contiguous()
