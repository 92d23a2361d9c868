"""Devices by the name that a user gives."""

from __future__ import annotations

import torch

from mpocli.errors import InputError, UsageError


def device_of(name: str) -> torch.device:
    """A torch device by name, `auto` for the best one there is.

    Raises `UsageError` for a name that stands for no device, `InputError` for a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name!r} is no device", hint="write it as cpu, cuda, cuda:0 or auto") from error
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"device {name!r} cannot be used here", hint="use --device cpu") from error
    return device
