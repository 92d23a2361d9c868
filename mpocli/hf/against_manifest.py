"""The manifest's modules held against the model's class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mpocli.errors import InputError
from mpocli.hf.replace import check_spec
from mpocli.hf.routing import check_networks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mpocli.hf.weight import Weight
    from mpocli.io.manifest import Manifest
    from mpocli.io.module_entry import ModuleEntry


def entries_by_name(manifest: Manifest | None, model: PreTrainedModel) -> dict[str, ModuleEntry]:
    """The manifest's modules; `InputError` where the model has none of such a name."""
    if manifest is None:
        return {}
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    unknown = [entry.name for entry in manifest.modules if entry.name not in names]
    if unknown:
        raise InputError(
            f"the manifest names module {unknown[0]}, which a {type(model).__name__} does not have",
            hint="config.json's `architectures` must name the class that was decomposed",
        )
    return manifest.by_name


def check_entries(model: PreTrainedModel, weights: Sequence[Weight], entries: Mapping[str, ModuleEntry]) -> None:
    """`InputError` where the manifest's structure is not that of the class: kind, scale, ties, networks."""
    owners = {member.name: weight.entry for weight in weights if weight.entry for member in weight.members}
    for name, entry in entries.items():
        check_spec(name, entry.spec, model.get_submodule(name))
        owner = owners.get(name)
        tied_to = owner.name if owner and owner.name != name else None
        if owner is None or entry.spec.tied_to != tied_to or entry.spec.core_shapes() != owner.spec.core_shapes():
            raise InputError(
                f"module {name} has, by the manifest, "
                + (f"the cores of {entry.spec.tied_to}" if entry.spec.tied_to else "cores of its own")
                + f", and in a {type(model).__name__} "
                + (f"its weight is that of {tied_to}" if tied_to else "a weight of its own" if owner else "no matrix"),
                hint="config.json was edited, or the model class changed",
            )
    owned = [weight.entry for weight in weights if weight.entry]
    check_networks({entry.name: entry.spec for entry in owned if entry.spec.experts})
