"""Measure what a feed-forward network of experts costs in a training step: dense, n dense experts, n that share a core.

    python tests/bench/expert_cost.py [--width 768 --inner 3072 --experts 8]

One network of two matrices at full bond, for several numbers of tokens; the arms take turns, so that a noisy machine is
noisy for all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import nn

from mpocli.mpo import MPO, site_shape
from mpocli.nn import DenseExperts, MPOExperts, Router, attach_router
from mpocli.nn.experts_contract import choose_way

TOKENS = (64, 512, 4096)


class Network(nn.Module):
    """Two linear layers with a GELU between, as in BERT and GPT-2."""

    def __init__(self, first: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = first, last

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(nn.functional.gelu(self.first(x)))


def experts(kind: str, first: nn.Linear, last: nn.Linear, count: int) -> Network:
    layers: list[Any] = []
    for linear, place in ((first, "in"), (last, "out")):
        weight, bias = linear.weight.detach(), linear.bias.detach()
        options: dict[str, Any] = {"experts": count, "place": place}
        if kind == "dense experts":
            layers.append(DenseExperts.from_matrix(weight, bias, **options))
        else:
            layers.append(MPOExperts.from_mpo(MPO.from_matrix(weight, site_shape(*weight.shape, 5)), bias, **options))
    router = Router(first.in_features, count)
    attach_router(layers[0], router, own=True)
    attach_router(layers[1], router, own=False)
    return Network(*layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("--width", 768), ("--inner", 3072), ("--experts", 8), ("--steps", 8)):
        parser.add_argument(name, type=int, default=default)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    first, last = nn.Linear(chosen.width, chosen.inner), nn.Linear(chosen.inner, chosen.width)
    arms = {"dense": Network(first, last)}
    arms |= {kind: experts(kind, first, last, chosen.experts) for kind in ("dense experts", "MPOE")}
    sites = site_shape(chosen.inner, chosen.width, 5)
    print("| tokens | arm | time | parameters | way |\n|---:|---|---:|---:|---|")
    for tokens in TOKENS:
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        for step in range(chosen.steps + 2):
            x = torch.randn(tokens, chosen.width)
            for arm, network in arms.items():
                started = time.perf_counter()
                network(x).square().mean().backward()
                network.zero_grad()
                if step >= 2:  # the first ones allocate
                    seconds[arm].append(time.perf_counter() - started)
        for arm, network in arms.items():
            ratio = statistics.median(a / b for a, b in zip(seconds[arm], seconds["dense"], strict=True))
            params = sum(parameter.numel() for parameter in network.parameters())
            way = choose_way(tokens, chosen.experts, sites, sites.full_bond_dims).kind if arm == "MPOE" else ""
            print(f"| {tokens} | {arm} | {ratio:.2f}× | {params:,} | {way} |")


if __name__ == "__main__":
    main()
