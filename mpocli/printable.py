"""Text of foreign files where people read it: what would steer a terminal, or deceive the eye, is spelled out."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    """The text with every character that is not printable written as in Python's `repr`, but for those in `keep`.

    Control characters (ESC, BEL, C1, a carriage return), marks that reorder or hide text, line ends and lone
    surrogates become visible; letters of any script stay.

    >>> printable("core\\x1b[2K\\u202e0"), printable("größe 重み")
    ('core\\\\x1b[2K\\\\u202e0', 'größe 重み')
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else repr(char)[1:-1] for char in text)
