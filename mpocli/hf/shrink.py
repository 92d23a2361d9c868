"""Change the bonds of an MPO module inside a loaded model: the module, those tied to it, and the config."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpocli.errors import InputError
from mpocli.mpo import MPO
from mpocli.nn import MPOModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def mpo_modules(model: PreTrainedModel) -> dict[str, MPOModule]:
    """The MPO modules that own their cores, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MPOModule) and module.tied_to is None
    }


def set_mpo(model: PreTrainedModel, name: str, mpo: MPO) -> None:
    """Give a module cores with other bond dimensions; `save_pretrained` then writes a checkpoint that loads.

    Optimisers that hold the old parameters must be built anew. Raises `InputError` for other sites or no such module.
    """
    owner = mpo_modules(model).get(name)
    if owner is None:
        raise InputError(f"module {name} has no cores of its own in this {type(model).__name__}")
    owner.replace_cores(mpo)
    followers = [
        (place, module)
        for place, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, MPOModule) and module.tied_to == name
    ]
    for _, follower in followers:
        for k, core in enumerate(owner.cores):
            setattr(follower, f"core_{k}", core)
        follower.bond_dims = owner.bond_dims
    described = model.config.quantization_config.modules
    for place in (name, *(place for place, _ in followers)):
        described[place] = {**described[place], "bond_dims": list(owner.bond_dims)}
