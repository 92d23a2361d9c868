"""Settings that messages speak of, by the names of their options."""

from __future__ import annotations

import re

_SETTING = re.compile(r"‹([a-z][a-z0-9_]*)›")


def as_options(text: str) -> str:
    """A message with options in the place of settings.

    >>> as_options("lower ‹lr› or ‹mpo_lr›")
    'lower --lr or --mpo-lr'
    """
    return _SETTING.sub(lambda found: "--" + found[1].replace("_", "-"), text)
