"""Token ids that a model has rows for: where encoded text meets its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpocli.errors import InputError

_HINT = "resize the model's embedding to its tokenizer (resize_token_embeddings), or name its own with ‹tokenizer›"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer beside the model that reads its ids.

    `rows` are those of the table that the model looks its input up in; `target_rows` the lesser number of those that a
    decoder reads and that a head writes; `types` the rows of the table of token types. None where a model has no such
    table.
    """

    tokenizer: Any
    rows: int | None = None
    target_rows: int | None = None
    types: int | None = None

    @property
    def size(self) -> int:
        """The bound below which ids are both given by the tokenizer and known to the model."""
        return min(len(self.tokenizer), self.rows or len(self.tokenizer))

    @property
    def pad(self) -> int:
        """The id that fills up batches, under mask 0, and for the model's `config.pad_token_id`.

        The tokenizer's own; where it has none, or the model no row for it (it was added, and the model never
        resized), that of end of sequence or another special token. Raises `InputError` where there is none.
        """
        tokenizer = self.tokenizer
        own = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        if own == (None, None):
            raise InputError(
                f"the tokenizer ({type(tokenizer).__name__}) has neither a padding nor an end-of-sequence token",
                hint="set pad_token in its tokenizer_config.json",
            )
        # Of the rest, any does: the attention mask hides it.
        for found in (*own, tokenizer.sep_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0):
            if isinstance(found, int) and self.knows(found):
                return found
        raise AssertionError("a table without rows")

    @property
    def mask(self) -> int:
        """The id of the token that hides another; `InputError` where there is none."""
        found = self.tokenizer.mask_token_id
        if found is None:
            raise InputError(
                f"the tokenizer ({type(self.tokenizer).__name__}) has no mask token, which a masked language model "
                "is asked with",
                hint="set mask_token in its tokenizer_config.json, or choose another ‹task›",
            )
        self.check([int(found)], "the mask token")
        return int(found)

    def has(self, token: int, rows: int | None = None) -> bool:
        """Whether a table (the input's, or one of `rows`) has a row for a token."""
        rows = self.rows if rows is None else rows
        return token >= 0 and (rows is None or token < rows)

    def knows(self, token: int | None) -> bool:
        """Whether both what is read and what is written has a row for a token."""
        return token is not None and self.has(token) and self.has(token, self.target_rows)

    def check(self, ids: Sequence[int], where: str, *, written: bool = False) -> None:
        """`InputError` naming the token, its id and the rows of the table, where one of the ids has no row; with
        `written` of the table that targets are looked up in."""
        rows = self.target_rows if written else self.rows
        if rows is None or not ids:
            return
        worst = max(ids) if max(ids) >= rows else min(ids)
        if self.has(worst, rows):
            return
        token = self.tokenizer.convert_ids_to_tokens(worst) if worst >= 0 else None
        called = f"token {token!r} has" if token is not None else "a token has"
        raise InputError(f"{where}: {called} id {worst}, the model's table {rows} rows", hint=_HINT)

    def check_types(self, types: Sequence[int], where: str) -> None:
        """`InputError` for a token type that the model has no row for."""
        if self.types is not None and types and max(types) >= self.types:
            raise InputError(
                f"{where}: the tokenizer gives token type {max(types)}, the model's table has {self.types} rows",
                hint="name the model's own tokenizer with ‹tokenizer›",
            )

    def check_decoder(self, config: Any) -> None:
        """`InputError` where an encoder-decoder fills its decoder's input with an id that it has no row for."""
        for name in ("decoder_start_token_id", "pad_token_id"):
            token = getattr(config, name, None)
            if config.is_encoder_decoder and isinstance(token, int):
                self.check([token], f"config.json: {name}", written=True)
