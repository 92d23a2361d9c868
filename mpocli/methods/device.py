"""Devices by the name that a user gives."""

from __future__ import annotations

import torch

from mpocli.errors import InputError


def device_of(name: str) -> torch.device:
    """A torch device by name, `auto` for the best one there is; `InputError` for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} cannot be used here", hint="use --device cpu") from error
    return device
