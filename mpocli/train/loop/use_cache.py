"""The cache of keys and values of past tokens, off while a model trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def use_cache_as_before(config: Any) -> Iterator[None]:
    """A context after which the configuration's `use_cache` is what it was.

    Training keeps no keys and values of past tokens, and Trainer writes that into the configuration for good: the
    output would generate slowly, but for one that was resumed after its last step.
    """
    before = {name: value for name, value in vars(config).items() if name == "use_cache"}
    try:
        yield
    finally:
        vars(config).pop("use_cache", None)
        vars(config).update(before)
