"""Names in the files of what stands for a weight, where transformers renames tensors on loading."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mpocli.hf.matrices import prefix_of
from mpocli.io.encodings.known import KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What stands for the weight of a module: its cores and its router, any of them packed, or the packed weight itself.
_PACKED = "|".join(re.escape(part.suffix) for kind in KINDS.values() for part in kind.parts)
_PART = re.compile(rf"(?P<module>.+)\.(?P<part>core_\d+({_PACKED})?|router\.(weight|bias)|weight({_PACKED}))")


def loading_parts(model: PreTrainedModel, conversions: Sequence[Any], stored: Collection[str]) -> list[Any]:
    """What to rename besides, so that the parts of every weight come to where transformers brings the weight.

    Its own rules speak of weights: one for `head.weight` leaves `head.core_0` where it is. `stored` are the keys of the
    files, `conversions` its rules for `model`, in which the parts have their places. Most models need nothing.
    """
    from transformers.core_model_loading import WeightRenaming

    state = model.state_dict()
    places = _parts_by_module(state)
    rules = copy.deepcopy(list(conversions))  # they remember what they have met
    more = []
    for key in stored:
        weight = _renamed(model, rules, key, state)
        for part in places.get(prefix_of(weight), ()) if weight.endswith(".weight") else ():
            part_key = _part_key(key, part)
            name = f"{prefix_of(weight)}.{part}"
            if part_key in stored and _renamed(model, rules, part_key, state) != name:
                more.append(_exactly(WeightRenaming, _renamed(model, rules, part_key, None), name))
    return more


def saved_keys(model: PreTrainedModel, state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, str]:
    """What `save_pretrained` will call tensors of a state dict, which turns the renaming of loading round."""
    from transformers.core_model_loading import revert_weight_conversion

    wanted = {name: state[name].detach().to("meta") for name in names}
    by_id = {id(tensor): key for key, tensor in revert_weight_conversion(model, dict(wanted)).items()}
    return {name: by_id.get(id(tensor), name) for name, tensor in wanted.items()}


def keep_parts_together(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Let `save_pretrained` call the parts of a weight by the weight's own key, as `loading_parts` expects them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming

    places = _parts_by_module(state)
    weights = {module: f"{module}.weight" for module in places if f"{module}.weight" in state}
    parts = [f"{module}.{part}" for module in weights for part in places[module]]
    keys = saved_keys(model, state, [*weights.values(), *parts])
    more = []
    for module, weight in weights.items():
        for part in places[module]:
            name, wanted = f"{module}.{part}", _part_key(keys[weight], part)
            if keys[name] != wanted:
                more.append(_exactly(WeightRenaming, wanted, name))
    if more:
        rules = getattr(model, "_weight_conversions", None)
        if rules is None:  # it was not loaded: these are what transformers takes then
            made = get_model_conversion_mapping(model, add_legacy=False)
            rules = [rule for rule in made if not isinstance(rule, PrefixChange)]
        anything: Any = model
        anything._weight_conversions = [*rules, *more]


def _parts_by_module(state: Iterable[str]) -> dict[str, list[str]]:
    places: dict[str, list[str]] = {}
    for name in state:
        if match := _PART.fullmatch(name):
            places.setdefault(match["module"], []).append(match["part"])
    return places


def _part_key(key: str, part: str) -> str:
    """`head.weight` and `core_0` → `head.core_0`; `embed` and `weight_values` → `embed_values`."""
    suffix = part.removeprefix("weight")
    return f"{prefix_of(key)}.{part}" if suffix == part else key + suffix


def _renamed(model: PreTrainedModel, rules: Sequence[Any], key: str, state: dict[str, Any] | None) -> str:
    """The name that transformers gives a key; without the model's `state`, before the base model's prefix is fitted."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix = None if state is None else model.base_model_prefix
    name = str(rename_source_key(key, renamings, converters, prefix, state)[0])
    if state is not None and name not in state and key in state:
        return key  # as transformers has it: it was no old name
    return name


def _exactly(renaming: type[Any], key: str, name: str) -> Any:
    """A rule for one name alone, that can be turned round."""
    return renaming(rf"^{re.escape(key)}", rf"^{re.escape(name)}")
