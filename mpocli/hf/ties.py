"""Which parameters are one tensor in the model, and which of these the files keep apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mpocli.io.checkpoint import CheckpointReader
    from mpocli.io.module_entry import ModuleEntry


def stored_apart(
    model: PreTrainedModel, stored: dict[str, str], reader: CheckpointReader, entries: Mapping[str, ModuleEntry]
) -> set[str]:
    """Parameters that the class declares tied and the files hold different: transformers keeps them apart."""
    owner_of: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})

    def differ(name: str, owner: str) -> bool:
        a, b = (entries.get(parameter.removesuffix(".weight")) for parameter in (name, owner))
        if a is None and b is None:
            return not _same(reader, stored[name], stored[owner])
        # The files hold a tombstone of a decomposed one, and the manifest knows whose cores it has.
        return a is None or b is None or not (a.spec.tied_to or b.spec.tied_to)

    return {name for name, owner in owner_of.items() if name in stored and owner in stored and differ(name, owner)}


def tied_groups(model: PreTrainedModel, apart: set[str]) -> list[list[str]]:
    """Matrix-like parameters, those that share one tensor together, the owner first."""
    owner_of: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    first_by_id: dict[int, str] = {}
    groups: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # The skeleton has tied them already, whatever the files say.
        owner = name if name in apart else first_by_id.setdefault(id(parameter), owner_of.get(name, name))
        if parameter.dim() in (2, 3):
            groups.setdefault(owner, []).append(name)
    return [
        [name for name in names if name == owner] + [name for name in names if name != owner]
        for owner, names in groups.items()
    ]


def _same(reader: CheckpointReader, a: str, b: str) -> bool:
    """Whether two stored tensors are equal."""
    if a == b:
        return True
    if reader.specs[a].shape != reader.specs[b].shape:
        return False
    return torch.equal(reader.read(a), reader.read(b))
