"""Connect the expert layers of a model: one router a network, padding masks in, balance losses out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mpocli.errors import InputError
from mpocli.io.manifest import MPOSpec
from mpocli.nn import DenseExperts, MPOExperts, Router, RouterOptions, Shared, attach_router

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_MASK = 0.5


@dataclass(frozen=True)
class RoutingConfig:
    """What `config.json` says of routing: the router's options, and the gradient mask of training.

    `mask_prob` = probability that a step's update of a shared central core is discarded (MPOE §3.2), drawn once for
    each core, or for each of its elements with `mask_elements`.
    """

    router: RouterOptions
    mask_prob: float = DEFAULT_MASK
    mask_elements: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self.router), "mask_prob": self.mask_prob, "mask_elements": self.mask_elements}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RoutingConfig:
        """Raises `InputError` for options that this mpocli does not know or that cannot be meant."""
        known = {field.name for field in fields(RouterOptions)}
        try:
            router = RouterOptions(**{name: value for name, value in data.items() if name in known})
            rest = {name: value for name, value in data.items() if name not in known}
            return cls(router, **rest)
        except TypeError as error:
            raise InputError(f"config.json: routing {dict(data)} cannot be read", hint="update mpocli") from error


def connect(model: PreTrainedModel, specs: Mapping[str, MPOSpec], routing: RoutingConfig) -> None:
    """Give the expert layers that `specs` names their routers, and let the model tell and ask them.

    Every stack with an attention mask of its own (an encoder, a decoder) tells its routers which tokens are padding;
    in training the model's loss becomes the sum with the routers' losses.
    """
    experts = {name: spec for name, spec in specs.items() if spec.experts}
    if not experts:
        return
    stacks = _stacks(model)
    shared: dict[str, Shared] = {}
    for name, spec in experts.items():
        if spec.router is not None:
            continue
        layer = _layer(model, name)
        weight = next(layer.parameters())
        router = Router(spec.shape[1], spec.experts, routing.router, dtype=weight.dtype, device=weight.device)
        stack = max((prefix for prefix in stacks if _is_in(name, prefix)), key=len)
        router.shared = shared.setdefault(stack, Shared())
        attach_router(layer, router, own=True)
    for name, spec in experts.items():
        if spec.router is not None:
            owner = _layer(model, spec.router)
            if owner.router is None:
                raise InputError(f"module {name} is routed by {spec.router}, which has no router")
            attach_router(_layer(model, name), owner.router, own=False)
    for prefix, state in shared.items():
        stacks[prefix].register_forward_pre_hook(_Begin(state, _names(stacks[prefix])), with_kwargs=True)
    model.register_forward_hook(_AddLosses(list(shared.values())))


def routers(model: nn.Module) -> dict[str, Router]:
    """Every router once, by the name of the layer that owns it."""
    return {
        name.removesuffix(".router"): module for name, module in model.named_modules() if isinstance(module, Router)
    }


def _layer(model: PreTrainedModel, name: str) -> MPOExperts | DenseExperts:
    layer = model.get_submodule(name)
    assert isinstance(layer, MPOExperts | DenseExperts)
    return layer


def _stacks(model: PreTrainedModel) -> dict[str, nn.Module]:
    from transformers import PreTrainedModel

    return {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}


def _is_in(name: str, prefix: str) -> bool:
    return not prefix or name.startswith(f"{prefix}.")


def _names(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)


# Objects rather than functions: a copied model has copied ones, which know its own routers.
class _Begin:
    """Before a stack runs: which of the tokens it is given are padding."""

    def __init__(self, shared: Shared, names: tuple[str, ...]) -> None:
        self.shared, self.names = shared, names

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        tokens = next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)
        mask = given.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2 or not isinstance(tokens, Tensor):
            self.shared.begin()
            return
        # With a cache the mask covers what was read before, too.
        self.shared.begin(mask[:, -tokens.shape[1] :])


class _AddLosses:
    """After the model has run: its loss is what it was and what the routers add."""

    def __init__(self, states: list[Shared]) -> None:
        self.states = states

    def __call__(self, module: nn.Module, args: Any, outputs: Any) -> Any:
        found = [loss for loss in (state.end() for state in self.states) if loss is not None]
        loss = outputs.get("loss") if hasattr(outputs, "get") else None
        if loss is None or not module.training or not found:
            return outputs
        outputs["loss"] = loss + torch.stack([extra.to(loss.device) for extra in found]).sum().to(loss.dtype)
        return outputs
