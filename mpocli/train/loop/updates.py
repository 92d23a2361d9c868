"""Which tensors training moves, and at what rate: told by their role in an MPO, never by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import nn

from mpocli.nn import MPOExperts, MPOLinear, MPOModule
from mpocli.nn.packed import is_packed

Role = Literal["central", "auxiliary", "other"]
UPDATES = ("auxiliary", "central", "all")


def roles(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Role]]:
    """Every parameter once: its name, itself, and whether it is a central core, an auxiliary one or neither."""
    found: dict[int, Role] = {}
    for module in model.modules():
        if isinstance(module, MPOModule):
            for k, core in enumerate(module.cores):
                found[id(core)] = "central" if k == module.central else "auxiliary"
    for name, parameter in model.named_parameters():
        yield name, parameter, found.get(id(parameter), "other")


def set_update(model: nn.Module, update: str) -> None:
    """Freeze the central cores (`auxiliary`, MPOP §4.1), the auxiliary ones (`central`), or none (`all`).

    Everything that is not decomposed is trained in each case: biases, norms, position tables, heads. What is packed
    (`nn.packed`) never is.
    """
    frozen = {"auxiliary": "central", "central": "auxiliary", "all": None}[update]
    for _, parameter, role in roles(model):
        if role != "other":  # what the model itself froze (sinusoidal positions) stays so
            parameter.requires_grad_(role != frozen and not is_packed(parameter))


def set_recompute(model: nn.Module, recompute: bool) -> None:
    """Whether MPO layers rebuild their weight again in the backward pass instead of keeping it."""
    for module in model.modules():
        if isinstance(module, MPOLinear | MPOExperts):
            module.recompute = recompute


def parameter_groups(
    model: nn.Module, lr: float, mpo_lr: float, weight_decay: float, *, rates: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Optimiser groups of all trained parameters, each in exactly one: cores and others, decayed and not.

    Vectors (biases, norms) are not decayed. `rates` are those of parameters that have one of their own, by name. Empty
    groups are left out; `name` is for logs.
    """
    own = rates or {}
    groups: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
    for name, parameter, role in roles(model):
        if parameter.requires_grad:
            kind = "own rate" if name in own else "dense" if role == "other" else "cores"
            rate = own.get(name, lr if role == "other" else mpo_lr)
            groups.setdefault((kind, rate, parameter.dim() > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rate,
            "weight_decay": weight_decay if decayed else 0.0,
            "name": f"{kind}{'' if decayed else ', no decay'}",
        }
        for (kind, rate, decayed), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]
