"""Token ids of examples, as a task and a family of models have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpocli.config.tasks import Task
from mpocli.errors import UsageError
from mpocli.train.data.collate import IGNORE
from mpocli.train.data.examples import Examples
from mpocli.train.data.token_ids import eos_id, surroundings, token_ids, tokenizing
from mpocli.train.data.vocabulary import Vocabulary
from mpocli.train.models import Family

SEPARATOR = " ||"  # between source and target of a decoder-only model, as in LoRA's E2E files


@dataclass(frozen=True)
class Encoded:
    """Features in the order of the examples, and how many of these were cut to fit."""

    features: list[dict[str, Any]]
    truncated: int


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
            f"‹task› {task.name}: an encoder cannot write text", hint="name a causal or an encoder-decoder model"
        )
    pair = examples.pairs is not None
    reserved = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length <= reserved + pair:
        raise UsageError(f"‹max_length› {max_length}: the tokenizer alone adds {reserved} special tokens")
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
    eos = eos_id(tokenizer) if ends_with_eos else None
    for row in rows:
        if eos is not None or not row["input_ids"]:
            row["input_ids"].append(vocabulary.pad if eos is None else eos)
            row["attention_mask"].append(1)
            if "token_type_ids" in row:
                row["token_type_ids"].append(0)
    return rows, set(long)


def _features(
    vocabulary: Vocabulary, texts: Sequence[str], pairs: Sequence[str] | None, target: bool, **truncation: Any
) -> list[dict[str, Any]]:
    tokenizer = vocabulary.tokenizer
    text = "text_target" if target else "text"
    inputs = {text: list(texts)} if pairs is None else {text: list(texts), "text_pair": list(pairs)}
    with tokenizing(tokenizer):
        made = tokenizer(**inputs, return_attention_mask=True, verbose=False, **truncation)
    keys = [key for key in ("input_ids", "attention_mask", "token_type_ids") if key in made]
    if vocabulary.types in (0, 1):  # all tokens are of one (RoBERTa, DeBERTa), whatever the tokenizer makes of pairs
        keys = [key for key in keys if key != "token_type_ids"]
    return [dict(zip(keys, values, strict=True)) for values in zip(*(made[key] for key in keys), strict=True)]


def _causal(examples: Examples, tokenizer: Any, max_length: int) -> Encoded:
    """`source || target eos`, tokenised in pieces: generation starts from exactly the tokens that training saw."""
    eos = eos_id(tokenizer)
    before, _ = surroundings(tokenizer)
    separator = token_ids(tokenizer, [SEPARATOR])[0]
    sources = token_ids(tokenizer, examples.texts)
    targets = (
        [[]] * len(sources) if examples.labels is None else token_ids(tokenizer, [str(x) for x in examples.labels])
    )
    ending = [] if examples.labels is None else [eos]
    room = max_length - len(before) - len(separator) - len(ending)
    if room < 2:
        raise UsageError(f"‹max_length› {max_length}: no room for a source and a target")
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
