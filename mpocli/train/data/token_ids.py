"""Token ids of texts, and the special tokens around them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from mpocli.errors import InputError
from mpocli.hf.foreign import foreign

Ids = list[int]


def tokenizing(tokenizer: Any) -> AbstractContextManager[None]:
    """A context around a call of the tokenizer: what it cannot read becomes an `InputError`."""
    return foreign(
        f"the tokenizer ({type(tokenizer).__name__}) cannot read the text",
        hint="restore its files, or name another with ‹tokenizer›",
    )


def eos_id(tokenizer: Any) -> int:
    """The id of the end-of-sequence token; `InputError` where there is none."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer ({type(tokenizer).__name__}) has no end-of-sequence token",
            hint="set eos_token in its tokenizer_config.json",
        )
    return int(tokenizer.eos_token_id)


def token_ids(tokenizer: Any, texts: Sequence[str], *, special: bool = False) -> list[Ids]:
    """The ids of each text, with special tokens if `special`, and without the tokenizer's advice about long ones."""
    with tokenizing(tokenizer):
        made = tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)
    return list(made["input_ids"])


def surroundings(tokenizer: Any) -> tuple[Ids, Ids]:
    """The special tokens that the tokenizer puts before and after a text; `InputError` where it does anything else."""
    bare = token_ids(tokenizer, ["a"])[0]
    full = token_ids(tokenizer, ["a"], special=True)[0]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise InputError(
        f"the tokenizer ({type(tokenizer).__name__}) gives 'a' as {bare}, and with special tokens as {full}",
        hint="its special tokens have to stand before and after the text",
    )
