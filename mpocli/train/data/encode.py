"""Token ids for a task: features of examples, windows of a text, and padded batches of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mpocli.config.tasks import Task
from mpocli.errors import InputError, UsageError
from mpocli.hf.foreign import foreign
from mpocli.train.data.examples import Examples
from mpocli.train.data.vocabulary import Vocabulary

Family = Literal["encoder", "causal", "seq2seq"]
Ids = list[int]

IGNORE = -100  # the label that transformers' losses leave out
SEPARATOR = " ||"  # between source and target of a decoder-only model, as in LoRA's E2E files


@dataclass(frozen=True)
class Encoded:
    """Features in the order of the examples, and how many of these were cut to fit."""

    features: list[dict[str, Any]]
    truncated: int


@dataclass(frozen=True)
class Windows:
    """A text as consecutive windows; `tokens` and `words` count the text, without added special tokens.

    A causal model predicts `len(window) - 1` tokens of each window: none in a last window of one token.
    """

    ids: list[Ids]
    tokens: int
    words: int


def encode(
    examples: Examples,
    task: Task,
    tokenizer: Any,
    *,
    max_length: int,
    family: Family,
    vocabulary: Vocabulary | None = None,
) -> Encoded:
    """Features for `collate`: `input_ids`, `attention_mask`, `token_type_ids` where the tokenizer makes them, `labels`.

    Classification and regression: one sequence or a pair, the longer part cut first, in any family. Text to text:
    `seq2seq` has source and target as the tokenizer makes them, each at most `max_length` long; where it adds no
    special tokens at all, they end with eos. `causal` has `source || target eos` in one sequence with no loss on the
    source and the separator, the longer part cut first; without labels it has `source ||`, to generate from.
    An empty text becomes one padding token that is attended to, since models have no empty sequence.

    Raises `UsageError` for a `max_length` that leaves no room for a token, and for text to text with an encoder;
    `InputError` for a tokenizer that lacks the end-of-sequence or padding token that is needed, and for a token that
    the model of the `vocabulary` has no row for.
    """
    vocabulary = vocabulary or Vocabulary(tokenizer)
    if task.kind == "text2text" and family == "encoder":
        raise UsageError(
            f"--task {task.name}: an encoder cannot write text", hint="name a causal or an encoder-decoder model"
        )
    pair = examples.pairs is not None
    reserved = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length <= reserved + pair:
        raise UsageError(f"--max-length {max_length}: the tokenizer alone adds {reserved} special tokens")
    if task.kind == "text2text" and family == "causal":
        made = _causal(examples, tokenizer, max_length)
        _check_ids(made.features, examples, vocabulary)
        return made

    ends_with_eos = family == "seq2seq" and reserved == 0
    rows, truncated = _sequences(vocabulary, examples.texts, examples.pairs, max_length, ends_with_eos)
    labels: Sequence[Any] | None = examples.labels
    if labels is not None and task.kind == "text2text":
        targets, cut = _sequences(vocabulary, [str(label) for label in labels], None, max_length, ends_with_eos, True)
        labels = [target["input_ids"] for target in targets]
        truncated |= cut
    if labels is not None:
        for row, label in zip(rows, labels, strict=True):
            row["labels"] = label
    _check_ids(rows, examples, vocabulary)
    return Encoded(rows, len(truncated))


def _check_ids(features: Sequence[Mapping[str, Any]], examples: Examples, vocabulary: Vocabulary) -> None:
    for feature, line in zip(features, examples.lines, strict=False):
        where = f"{examples.source}: line {line}"
        if "token_type_ids" in feature:
            vocabulary.check_types(feature["token_type_ids"], where)
        vocabulary.check(feature["input_ids"], where)
        if isinstance(feature.get("labels"), list):
            vocabulary.check([label for label in feature["labels"] if label != IGNORE], where, written=True)


def collate(
    features: Sequence[Mapping[str, Any]],
    pad_id: int,
    label_pad: int = IGNORE,
    pad_to_multiple_of: int | None = None,
    side: Literal["right", "left"] = "right",
) -> dict[str, Tensor]:
    """A batch as long as its longest row, or the next multiple: (B, L) ids, and labels (B,) or (B, L_target).

    Class labels are int64, scores float32, token labels padded with `label_pad` (ignored by the loss). `side="left"`
    is for generating from a causal model, which goes on from the last place.
    """
    fills = {"input_ids": pad_id, "attention_mask": 0, "token_type_ids": 0, "labels": label_pad}
    batch = {}
    for key, fill in fills.items():
        if key not in features[0]:
            continue
        values = [feature[key] for feature in features]
        if isinstance(values[0], Sequence):
            batch[key] = _padded(values, fill, pad_to_multiple_of or 1, side)
        else:
            batch[key] = torch.tensor(values, dtype=torch.float32 if isinstance(values[0], float) else torch.int64)
    return batch


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
    before, after = _surroundings(tokenizer)
    room = max_length - len(before) - len(after) if masked else max_length
    if room < (1 if masked else 2):
        raise UsageError(f"--max-length {max_length}: no room for a token to predict")
    tokens = _tokenise(text, tokenizer)
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


# --- examples -----------------------------------------------------------------------------------------------------


def _sequences(
    vocabulary: Vocabulary,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    max_length: int,
    ends_with_eos: bool,
    target: bool = False,
) -> tuple[list[dict[str, Any]], set[int]]:
    """One feature per text or pair, and the indices of those that were cut."""
    tokenizer = vocabulary.tokenizer
    room = max_length - ends_with_eos
    rows = _features(vocabulary, texts, pairs, target)
    # Tokenised twice only where it is too long: that is what tells how many are, for every kind of tokenizer.
    long = [index for index, row in enumerate(rows) if len(row["input_ids"]) > room]
    if long:
        some_pairs = None if pairs is None else [pairs[index] for index in long]
        cut = _features(
            vocabulary, [texts[i] for i in long], some_pairs, target, truncation="longest_first", max_length=room
        )
        for index, row in zip(long, cut, strict=True):
            rows[index] = row
    eos = _eos(tokenizer) if ends_with_eos else None
    for row in rows:
        if eos is not None or not row["input_ids"]:
            row["input_ids"].append(vocabulary.pad if eos is None else eos)
            row["attention_mask"].append(1)
            if "token_type_ids" in row:
                row["token_type_ids"].append(0)
    return rows, set(long)


_FAILS, _FAILS_HINT = "the tokenizer ({}) cannot read the text", "restore its files, or name another with --tokenizer"


def _features(
    vocabulary: Vocabulary, texts: Sequence[str], pairs: Sequence[str] | None, target: bool, **truncation: Any
) -> list[dict[str, Any]]:
    tokenizer = vocabulary.tokenizer
    text = "text_target" if target else "text"
    inputs = {text: list(texts)} if pairs is None else {text: list(texts), "text_pair": list(pairs)}
    with foreign(_FAILS.format(type(tokenizer).__name__), hint=_FAILS_HINT):
        made = tokenizer(**inputs, return_attention_mask=True, verbose=False, **truncation)
    keys = [key for key in ("input_ids", "attention_mask", "token_type_ids") if key in made]
    if vocabulary.types in (0, 1):  # all tokens are of one (RoBERTa, DeBERTa), whatever the tokenizer makes of pairs
        keys = [key for key in keys if key != "token_type_ids"]
    return [dict(zip(keys, values, strict=True)) for values in zip(*(made[key] for key in keys), strict=True)]


def _causal(examples: Examples, tokenizer: Any, max_length: int) -> Encoded:
    """`source || target eos`, tokenised in pieces: generation starts from exactly the tokens that training saw."""
    eos = _eos(tokenizer)
    before, _ = _surroundings(tokenizer)
    separator = _ids(tokenizer, [SEPARATOR])[0]
    sources = _ids(tokenizer, examples.texts)
    targets = [[]] * len(sources) if examples.labels is None else _ids(tokenizer, [str(x) for x in examples.labels])
    ending = [] if examples.labels is None else [eos]
    room = max_length - len(before) - len(separator) - len(ending)
    if room < 2:
        raise UsageError(f"--max-length {max_length}: no room for a source and a target")
    features, truncated = [], 0
    for source, target in zip(sources, targets, strict=True):
        keep_source, keep_target = _longest_first(len(source), len(target), room)
        truncated += (keep_source, keep_target) != (len(source), len(target))
        prompt = before + source[:keep_source] + separator
        answer = target[:keep_target] + ending
        feature = {"input_ids": prompt + answer, "attention_mask": [1] * (len(prompt) + len(answer))}
        if examples.labels is not None:
            feature["labels"] = [IGNORE] * len(prompt) + answer
        features.append(feature)
    return Encoded(features, truncated)


def _longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """The lengths left when tokens are taken one by one from the longer of two sequences until both fit.

    >>> _longest_first(9, 2, 8), _longest_first(9, 9, 8), _longest_first(3, 2, 8)
    ((6, 2), (4, 4), (3, 2))
    """
    if first + second <= room:
        return first, second
    if second <= room // 2:
        return room - second, second
    if first <= room - room // 2:
        return first, room - first
    return room - room // 2, room // 2


def _eos(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer ({type(tokenizer).__name__}) has no end-of-sequence token",
            hint="set eos_token in its tokenizer_config.json",
        )
    return int(tokenizer.eos_token_id)


def _ids(tokenizer: Any, texts: Sequence[str], *, special: bool = False) -> list[Ids]:
    """Token ids, without special tokens, and without the advice about sequences longer than the model's maximum."""
    with foreign(_FAILS.format(type(tokenizer).__name__), hint=_FAILS_HINT):
        made = tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)
    return list(made["input_ids"])


def _surroundings(tokenizer: Any) -> tuple[Ids, Ids]:
    """The special tokens that the tokenizer puts before and after a text."""
    bare = _ids(tokenizer, ["a"])[0]
    full = _ids(tokenizer, ["a"], special=True)[0]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise InputError(
        f"the tokenizer ({type(tokenizer).__name__}) gives 'a' as {bare}, and with special tokens as {full}",
        hint="its special tokens have to stand before and after the text",
    )


# --- windows ------------------------------------------------------------------------------------------------------

_PIECE = 1 << 16  # characters; pieces are tokenised side by side, and short ones keep memory low
_PIECES_AT_ONCE = 16
_NEIGHBOURHOOD = 256  # characters on either side of a cut that are tokenised whole, to prove the cut harmless
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")  # a letter, here, a space and a letter


def _tokenise(text: str, tokenizer: Any, piece: int = _PIECE) -> Ids:
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
        whole = _ids(tokenizer, [left + right for left, right in sides])
        left_ids = _ids(tokenizer, [left for left, _ in sides])
        right_ids = _ids(tokenizer, [right for _, right in sides])
        tried = zip(cuts, whole, left_ids, right_ids, strict=True)
        cuts = [cut for cut, ids, left, right in tried if ids == left + right]
    bounds = [0, *cuts, len(text)]
    pieces = [text[start:end] for start, end in pairwise(bounds)]
    tokens: Ids = []
    for start in range(0, len(pieces), _PIECES_AT_ONCE):
        for ids in _ids(tokenizer, pieces[start : start + _PIECES_AT_ONCE]):
            tokens += ids
    return tokens


def _padded(rows: Sequence[Sequence[int]], fill: int, multiple: int, side: str) -> Tensor:
    length = -(-max(len(row) for row in rows) // multiple) * multiple
    padded = np.full((len(rows), length), fill, dtype=np.int64)
    for place, row in zip(padded, rows, strict=True):
        if side == "right":
            place[: len(row)] = row
        else:
            place[length - len(row) :] = row
    return torch.from_numpy(padded)
