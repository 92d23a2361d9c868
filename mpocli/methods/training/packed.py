"""Packed weights in a run of training: constants beside what is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpocli.errors import InputError
from mpocli.nn.packed import is_packed
from mpocli.train.loop.updates import roles
from mpocli.train.models import listed

# What the options of `update` would train, and leave alone: everything but the other cores.
_LEFT = {"auxiliary": "central", "central": "auxiliary", "all": None}


def settled_update(model: Any, update: str | None, usual: str, warn: Callable[[str], None]) -> str:
    """What is trained of a model some of whose tensors are packed: as asked for (`update`), or as `usual`.

    Codes have no gradients, so what they stand for stays as it is: `warn` is told where it would have been trained.
    Where nothing is asked and all cores of the usual role are packed, it is all that is not. Raises `InputError` where
    what is asked for is packed to the last core, or the whole model is.
    """
    found = [(name, role, is_packed(parameter)) for name, parameter, role in roles(model)]
    if not any(is_constant for *_, is_constant in found):
        return update or usual
    wanted = update or usual
    cores = [is_constant for _, role, is_constant in found if role == wanted]
    if cores and all(cores):
        if update is not None:
            raise InputError(
                f"--update {update}: all {update} cores are packed codes, which training leaves as they are",
                hint="leave --update out, or run mpocli merge first",
            )
        wanted = "all"
    if all(is_constant for *_, is_constant in found):
        raise InputError(
            "all weights are packed codes, which training leaves as they are", hint="run mpocli merge first"
        )
    kept = [name for name, role, is_constant in found if is_constant and role != _LEFT[wanted]]
    if kept:
        warn(f"packed, and not trained: {listed(kept)}")
    return wanted
