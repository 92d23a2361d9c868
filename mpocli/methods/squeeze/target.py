"""The size that a squeeze aims at."""

from __future__ import annotations

import math

from mpocli.config.squeeze import SqueezeConfig
from mpocli.errors import UsageError
from mpocli.io.totals import Totals


def target_params(config: SqueezeConfig, before: Totals, itemsize: int) -> int | None:
    """The most parameters that all targets together allow; `UsageError` where there is nothing to do."""
    limits = {}
    if config.target_params is not None:
        limits[f"--target-params {config.target_params:,}"] = config.target_params
    if config.target_ratio is not None:
        limits[f"--target-ratio {config.target_ratio:g}"] = int(config.target_ratio * before.dense_params)
    if config.target_bytes is not None:
        # What is in the files beside the cores stays; headers change by some bytes.
        too_many = max(0, before.bytes - config.target_bytes)
        kept = before.params - math.ceil(too_many / itemsize)
        limits[f"--target-bytes {config.target_bytes:,}"] = kept if too_many else before.params
    if not limits:
        return None
    option = min(limits, key=limits.__getitem__)
    if limits[option] >= before.params:
        raise UsageError(
            f"{option}: the checkpoint has {before.params:,} parameters ({before.ratio:.3f} of dense, "
            f"{before.bytes:,} bytes) already",
            hint="choose less",
        )
    return limits[option]
