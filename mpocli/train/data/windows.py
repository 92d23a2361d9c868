"""A text as windows of token ids, as language models are evaluated on it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mpocli.errors import InputError, UsageError
from mpocli.train.data.token_ids import Ids, surroundings, token_ids
from mpocli.train.data.vocabulary import Vocabulary


@dataclass(frozen=True)
class Windows:
    """A text as consecutive windows; `tokens` and `words` count the text, without added special tokens.

    A causal model predicts `len(window) - 1` tokens of each window: none in a last window of one token.
    """

    ids: list[Ids]
    tokens: int
    words: int


def lm_windows(
    text: str, tokenizer: Any, max_length: int, *, masked: bool = False, vocabulary: Vocabulary | None = None
) -> Windows:
    """Non-overlapping windows of at most `max_length` tokens, the last partial one kept.

    A causal text is tokenised as one whole, special tokens as the tokenizer adds them to the whole (Llama: one bos at
    the beginning), and cut; for a masked model every window stands between special tokens of its own, which count in
    `max_length`. Words are whitespace tokens and one per line, as published word perplexities count.

    Raises `UsageError` for a `max_length` without room for a prediction, and `InputError` for a text without tokens,
    or with one that the model of the `vocabulary` has no row for.
    """
    before, after = surroundings(tokenizer)
    room = max_length - len(before) - len(after) if masked else max_length
    if room < (1 if masked else 2):
        raise UsageError(f"‹max_length› {max_length}: no room for a token to predict")
    tokens = tokenise(text, tokenizer)
    if not tokens:
        raise InputError("the text has no tokens", hint="name a file with text")
    stream = tokens if masked else before + tokens + after
    windows = [stream[start : start + room] for start in range(0, len(stream), room)]
    if masked:
        windows = [before + window + after for window in windows]
    if vocabulary is not None:
        vocabulary.check([*before, *tokens, *after], "the text")
        vocabulary.check(tokens, "the text", written=True)
    lines = text.count("\n") + (not text.endswith("\n"))
    return Windows(windows, len(tokens), len(text.split()) + lines)


_PIECE = 1 << 16  # characters; pieces are tokenised side by side, and short ones keep memory low
_PIECES_AT_ONCE = 16
_NEIGHBOURHOOD = 256  # characters on either side of a cut that are tokenised whole, to prove the cut harmless
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")  # a letter, here, a space and a letter


def tokenise(text: str, tokenizer: Any, piece: int = _PIECE) -> Ids:
    """The ids of the whole text without special tokens, made piece by piece (a third of the time and memory).

    Pieces end between two words, where no tokenizer's pattern reaches across. Since tokenizers are many (some put a
    space before whatever they get), each cut is tried on its neighbourhood and given up where the ids would differ.
    """
    cuts = []
    for target in range(piece, len(text), piece):
        found = _BETWEEN_WORDS.search(text, target, min(target + piece, len(text)))
        if found:
            cuts.append(found.start())
    sides = [(text[max(0, cut - _NEIGHBOURHOOD) : cut], text[cut : cut + _NEIGHBOURHOOD]) for cut in cuts]
    if sides:
        whole = token_ids(tokenizer, [left + right for left, right in sides])
        left_ids = token_ids(tokenizer, [left for left, _ in sides])
        right_ids = token_ids(tokenizer, [right for _, right in sides])
        tried = zip(cuts, whole, left_ids, right_ids, strict=True)
        cuts = [cut for cut, ids, left, right in tried if ids == left + right]
    bounds = [0, *cuts, len(text)]
    pieces = [text[start:end] for start, end in pairwise(bounds)]
    tokens: Ids = []
    for start in range(0, len(pieces), _PIECES_AT_ONCE):
        for ids in token_ids(tokenizer, pieces[start : start + _PIECES_AT_ONCE]):
            tokens += ids
    return tokens
