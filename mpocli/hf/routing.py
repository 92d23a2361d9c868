"""Connect the expert layers of a model: one router a network, padding masks in, balance losses out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mpocli.config.routing import RoutingConfig
from mpocli.errors import InputError
from mpocli.hf.padding import given_to, padding_id, parameter_names, stack_mask
from mpocli.io.mpo_spec import MPOSpec
from mpocli.nn import DenseExperts, MPOExperts, Router, Shared, attach_router

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def connect(model: PreTrainedModel, specs: Mapping[str, MPOSpec], routing: RoutingConfig) -> None:
    """Give the expert layers that `specs` names their routers, and let the model tell and ask them.

    Every stack (an encoder, a decoder) tells its routers which of the tokens that it is given are padding, whoever
    calls it with what; in training the model's loss becomes the sum with the routers' losses.
    """
    experts = {name: spec for name, spec in specs.items() if spec.experts}
    if not experts:
        return
    order = [name for name, _ in model.named_modules(remove_duplicate=False) if name in experts]
    check_networks({name: experts[name] for name in order})
    stacks = _stacks(model)
    shared: dict[str, Shared] = {}
    for name, spec in experts.items():
        if spec.router is not None:
            continue
        layer = _layer(model, name)
        weight = next(layer.parameters())
        router = Router(spec.shape[1], spec.experts, routing.router, dtype=weight.dtype, device=weight.device)
        stack = max((prefix for prefix in stacks if _is_in(name, prefix)), key=len)
        router.shared = shared.setdefault(stack, Shared(length_first=routing.length_first))
        attach_router(layer, router, own=True)
    for name, spec in experts.items():
        if spec.router is not None:
            owner = _layer(model, spec.router).router
            assert owner is not None
            attach_router(_layer(model, name), owner, own=False)
    call, sides = _Call(parameter_names(model), padding_id(model)), _sides(model)
    model.register_forward_pre_hook(call, with_kwargs=True)
    for prefix, state in shared.items():
        stack_module = stacks[prefix]
        is_decoder = sides is not None and stack_module not in sides
        begin = _Begin(state, call, parameter_names(stack_module), is_decoder)
        stack_module.register_forward_pre_hook(begin, with_kwargs=True)
    model.register_forward_hook(_AddLosses(list(shared.values())))
    # Of a pass that failed, too, nothing may be taken for the next one's.
    model.register_forward_hook(call.end, always_call=True)


def last_of(shapes: Sequence[tuple[int, int]]) -> int | None:
    """The matrix of a feed-forward network that goes back, (D, F) after one or two (F, D): the only one of its shape,
    or of two square ones the second; or after one (2F, D), a gate and what it gates in one. None where they make no
    network.
    """
    for k in range(len(shapes) - 1, -1, -1):
        others = [other for j, other in enumerate(shapes) if j != k]
        rows, columns = shapes[k]
        fits = all(other == (columns, rows) for other in others) or others == [(2 * columns, rows)]
        if len(shapes) in (2, 3) and fits:
            return k
    return None


def check_networks(specs: Mapping[str, MPOSpec]) -> None:
    """`InputError` where layers of experts, in the model's order, do not make up networks: each with one router, in
    its first matrix, and one last matrix, which gathers what the experts made."""
    groups: dict[str, list[str]] = {}
    for name, spec in specs.items():
        groups.setdefault(spec.router or name, []).append(name)
    for owner, names in groups.items():
        members = [specs[name] for name in names]
        last = last_of([spec.shape for spec in members])
        # The first in the model's order has the router, of those that are not the last.
        first = next((name for k, name in enumerate(names) if k != last), None)
        wrong = [name for k, name in enumerate(names) if specs[name].place != ("out" if k == last else "in")]
        if last is None or first != owner or len({spec.experts for spec in members}) > 1:
            raise InputError(
                f"module {owner} routes for {len(names)} matrices ({', '.join(names[:3])}), which make no network",
                hint="config.json was edited, or the model class changed",
            )
        if wrong:
            raise InputError(
                f"module {wrong[0]} is the {'last' if specs[wrong[0]].place == 'in' else 'first'} matrix of its "
                f"network, the manifest has its place as {specs[wrong[0]].place!r}",
                hint="config.json was edited, or the model class changed",
            )


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
    """What is called with tokens of its own: models within the model, and the two sides of an encoder-decoder."""
    from transformers import PreTrainedModel

    sides = [model.get_encoder(), model.get_decoder()] if model.config.is_encoder_decoder else []
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) or any(module is side for side in sides)
    }


def _sides(model: PreTrainedModel) -> set[nn.Module] | None:
    """The modules of the encoder, None for a model of one side."""
    if not model.config.is_encoder_decoder:
        return None
    encoder: Any = model.get_encoder()
    return set(encoder.modules())


def _is_in(name: str, prefix: str) -> bool:
    return not prefix or name.startswith(f"{prefix}.")


# Objects rather than functions: a copied model has copied ones, which know its own routers.
class _Call:
    """What the whole model is called with, for as long as it runs."""

    def __init__(self, names: tuple[str, ...], pad: int | None) -> None:
        self.names, self.pad = names, pad
        self.given: dict[str, Any] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.given = given_to(self.names, args, kwargs)

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.given = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "given": {}}


class _Begin:
    """Before a stack runs: which of the tokens it is given are padding."""

    def __init__(self, shared: Shared, call: _Call, names: tuple[str, ...], is_decoder: bool) -> None:
        self.shared, self.call, self.names, self.is_decoder = shared, call, names, is_decoder

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = given_to(self.names, args, kwargs)
        self.shared.begin(stack_mask(given, self.call.given, self.call.pad, decoder=self.is_decoder))


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
