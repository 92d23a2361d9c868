"""Which tensors training moves, and at what rate: told by their role in an MPO, never by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Literal

from torch import nn

from mpocli.nn import MPOLinear, MPOModule

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

    Everything that is not decomposed is trained in each case: biases, norms, position tables, heads.
    """
    frozen = {"auxiliary": "central", "central": "auxiliary", "all": None}[update]
    for _, parameter, role in roles(model):
        if role != "other":  # what the model itself froze (sinusoidal positions) stays so
            parameter.requires_grad_(role != frozen)


def set_recompute(model: nn.Module, recompute: bool) -> None:
    """Whether MPO layers rebuild their weight again in the backward pass instead of keeping it."""
    for module in model.modules():
        if isinstance(module, MPOLinear):
            module.recompute = recompute


def parameter_groups(
    model: nn.Module, lr: float, mpo_lr: float, weight_decay: float, *, at_mpo_lr: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Optimiser groups of all trained parameters, each in exactly one: cores and others, decayed and not.

    Vectors (biases, norms) are not decayed. `at_mpo_lr` names dense parameters that take the cores' rate. Empty
    groups are left out; `name` is for logs.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter, role in roles(model):
        if parameter.requires_grad:
            groups.setdefault((role != "other" or name in at_mpo_lr, parameter.dim() > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": mpo_lr if is_core else lr,
            "weight_decay": weight_decay if decayed else 0.0,
            "name": f"{'cores' if is_core else 'dense'}{'' if decayed else ', no decay'}",
        }
        for (is_core, decayed), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
