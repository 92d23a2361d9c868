"""Features, batches and windows, with tokenizers that are built here."""

from __future__ import annotations

import logging
import random
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mpocli.config.tasks import task_named
from mpocli.errors import InputError, UsageError
from mpocli.train.data import windows as windows_file
from mpocli.train.data.collate import IGNORE, collate
from mpocli.train.data.encode import SEPARATOR, encode
from mpocli.train.data.examples import Examples
from mpocli.train.data.vocabulary import Vocabulary
from mpocli.train.data.windows import lm_windows

SST2, RTE, STSB, E2E = (task_named(name) for name in ("sst2", "rte", "stsb", "e2e"))
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CORPUS = [
    "the mill is a cheap pub near the river",
    "blue spice sells coffee, and 3 cakes.",
    "Ünï çödé || 漢字\n\n tail",
]


@cache
def bert(maximum: int = 16) -> Any:
    """WordPiece with BERT's template and token types."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word for text in CORPUS for word in text.lower().split()} | set(LETTERS))
    vocabulary = {token: i for i, token in enumerate([*specials, *words, *(f"##{letter}" for letter in LETTERS)])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=maximum,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def _bpe(prefix_space: bool = False) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return backend


@cache
def gpt2(prefix_space: bool = False) -> Any:
    """Byte-level BPE without a padding token and without a template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_bpe(prefix_space), eos_token="<|endoftext|>", bos_token="<|endoftext|>", model_max_length=16
    )


@cache
def templated(single: str) -> Any:
    """The same BPE with T5's ending (`$A </s>`) or Llama's beginning (`<s> $A`)."""
    backend = _bpe()
    backend.add_special_tokens(["<s>", "</s>"])
    specials = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=specials)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def examples(texts: list[str], labels: Any = None, pairs: list[str] | None = None) -> Examples:
    lines = tuple(range(1, len(texts) + 1))
    return Examples(tuple(texts), pairs and tuple(pairs), labels and tuple(labels), lines, "a.tsv")  # type: ignore[arg-type]


# --- classification and regression --------------------------------------------------------------------------------


def test_a_single_text_is_what_the_tokenizer_makes_of_it() -> None:
    made = encode(examples(CORPUS, [0, 1, 1]), SST2, bert(), max_length=99, family="encoder")
    assert made.truncated == 0
    for text, label, feature in zip(CORPUS, [0, 1, 1], made.features, strict=True):
        whole = bert()(text)
        assert feature == {**{key: list(whole[key]) for key in whole}, "labels": label}
        assert set(feature) == {"input_ids", "attention_mask", "token_type_ids", "labels"}


def test_a_pair_is_cut_at_its_longer_part_and_the_cut_rows_are_counted() -> None:
    pairs = examples(["a b c d e f", "a", "a b"], [0, 1, 0], ["x", "q r s t u v w", "x y"])
    made = encode(pairs, RTE, bert(), max_length=8, family="encoder")
    assert made.truncated == 2
    tokens = [bert().convert_ids_to_tokens(feature["input_ids"]) for feature in made.features]
    assert tokens == [
        ["[CLS]", "a", "b", "c", "d", "[SEP]", "x", "[SEP]"],
        ["[CLS]", "a", "[SEP]", "q", "r", "s", "t", "[SEP]"],
        ["[CLS]", "a", "b", "[SEP]", "x", "y", "[SEP]"],
    ]
    assert made.features[1]["token_type_ids"] == [0, 0, 0, 1, 1, 1, 1, 1]


def test_a_row_of_exactly_the_maximum_is_not_cut() -> None:
    rows = examples(["a b c", "a b c d"])
    assert encode(rows, SST2, bert(), max_length=6, family="encoder").truncated == 0
    made = encode(rows, SST2, bert(), max_length=5, family="encoder")
    assert made.truncated == 1
    assert [len(feature["input_ids"]) for feature in made.features] == [5, 5]
    assert "labels" not in made.features[0]


def test_a_decoder_only_classifier_gets_no_empty_sequence() -> None:
    made = encode(examples(["", "a"], [0, 1]), SST2, gpt2(), max_length=4, family="encoder")
    eos = gpt2().eos_token_id
    assert made.features[0] == {"input_ids": [eos], "attention_mask": [1], "labels": 0}


def test_a_t5_classifier_gets_an_eos_even_from_a_tokenizer_that_adds_nothing() -> None:
    made = encode(examples(["a", "b c d e f g"], [0, 1]), SST2, gpt2(), max_length=4, family="seq2seq")
    assert [feature["input_ids"].count(gpt2().eos_token_id) for feature in made.features] == [1, 1]
    assert [feature["input_ids"][-1] for feature in made.features] == [gpt2().eos_token_id] * 2
    assert len(made.features[1]["input_ids"]) == len(made.features[1]["attention_mask"]) == 4
    assert made.truncated == 1


def test_a_maximum_without_room_for_a_token_is_a_usage_error() -> None:
    single, pair = examples(["a"]), examples(["a"], None, ["b"])
    assert encode(single, SST2, bert(), max_length=3, family="encoder").features[0]["input_ids"][0] == 2
    assert encode(pair, RTE, bert(), max_length=5, family="encoder").truncated == 0
    with pytest.raises(UsageError, match="‹max_length› 2"):
        encode(single, SST2, bert(), max_length=2, family="encoder")
    with pytest.raises(UsageError, match="‹max_length› 4"):
        encode(pair, RTE, bert(), max_length=4, family="encoder")


# --- text to text -------------------------------------------------------------------------------------------------


def test_sequence_to_sequence_has_source_and_target_as_the_tokenizer_ends_them() -> None:
    t5 = templated("$A </s>")
    made = encode(examples(["the mill"], ["a cheap pub"]), E2E, t5, max_length=32, family="seq2seq")
    assert made.features[0]["input_ids"] == t5("the mill")["input_ids"]
    assert made.features[0]["labels"] == t5("a cheap pub")["input_ids"]
    assert made.features[0]["labels"].count(t5.eos_token_id) == 1


def test_sequence_to_sequence_ends_with_eos_where_the_tokenizer_adds_nothing() -> None:
    made = encode(examples(["the mill"], ["a cheap pub"]), E2E, gpt2(), max_length=32, family="seq2seq")
    bare, eos = gpt2(), gpt2().eos_token_id
    assert made.features[0]["input_ids"] == [*bare("the mill")["input_ids"], eos]
    assert made.features[0]["labels"] == [*bare("a cheap pub")["input_ids"], eos]


def test_a_row_cut_in_source_and_target_counts_once() -> None:
    long = "the mill is a cheap pub near the river " * 4
    rows = examples([long, long, "a", "a"], [long, "a", long, "a"])
    made = encode(rows, E2E, templated("$A </s>"), max_length=12, family="seq2seq")
    assert made.truncated == 3
    assert [len(feature["input_ids"]) for feature in made.features[:2]] == [12, 12]
    assert [len(made.features[row]["labels"]) for row in (0, 2)] == [12, 12]
    assert all(feature["labels"][-1] == templated("$A </s>").eos_token_id for feature in made.features)


@pytest.mark.parametrize("template", [None, "<s> $A", "<s> $A </s>"])
def test_a_causal_row_is_source_separator_target_eos_with_loss_on_the_last_two(template: str | None) -> None:
    tokenizer = templated(template) if template else gpt2()
    bos = [tokenizer.bos_token_id] if template else []
    made = encode(examples(["the mill"], ["a cheap pub"]), E2E, tokenizer, max_length=64, family="causal")
    prompt = bos + [
        i for part in ("the mill", SEPARATOR) for i in tokenizer(part, add_special_tokens=False)["input_ids"]
    ]
    answer = [*tokenizer("a cheap pub", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert made.features == [
        {
            "input_ids": prompt + answer,
            "attention_mask": [1] * (len(prompt) + len(answer)),
            "labels": [IGNORE] * len(prompt) + answer,
        }
    ]
    assert made.truncated == 0


def test_without_targets_a_causal_row_is_the_beginning_of_the_same_row() -> None:
    trained = encode(examples(["the mill"], ["a pub"]), E2E, gpt2(), max_length=64, family="causal").features[0]
    asked = encode(examples(["the mill"]), E2E, gpt2(), max_length=64, family="causal").features[0]
    assert "labels" not in asked
    length = len(asked["input_ids"])
    assert asked["input_ids"] == trained["input_ids"][:length]
    assert set(trained["labels"][:length]) == {IGNORE}
    assert trained["labels"][length] != IGNORE


def test_a_long_causal_row_keeps_its_separator_and_eos() -> None:
    long = "the mill is a cheap pub near the river " * 9
    rows = examples([long, long, "a", "a"], [long, "b", long, "b"])
    made = encode(rows, E2E, gpt2(), max_length=20, family="causal")
    assert made.truncated == 3
    separator = gpt2()(SEPARATOR)["input_ids"]
    for feature in made.features:
        ids, start = feature["input_ids"], feature["labels"].count(IGNORE)
        assert len(ids) <= 20
        assert ids[start - len(separator) : start] == separator
        assert ids[-1] == feature["labels"][-1] == gpt2().eos_token_id
        assert len(ids) - start >= 2
    assert [len(feature["input_ids"]) for feature in made.features[:3]] == [20, 20, 20]


def test_text_to_text_needs_a_model_that_writes_a_tokenizer_that_ends_and_room() -> None:
    rows = examples(["a"], ["b"])
    with pytest.raises(UsageError, match="encoder cannot write"):
        encode(rows, E2E, bert(), max_length=16, family="encoder")
    with pytest.raises(InputError, match="no end-of-sequence"):
        encode(rows, E2E, bert(), max_length=16, family="causal")
    with pytest.raises(UsageError, match="‹max_length›"):
        encode(rows, E2E, gpt2(), max_length=len(gpt2()(SEPARATOR)["input_ids"]) + 2, family="causal")


# --- batches ------------------------------------------------------------------------------------------------------


def padded(rows: list[list[int]], fill: int, length: int, left: bool = False) -> np.ndarray:
    """By index loops."""
    out = np.zeros((len(rows), length), dtype=np.int64)
    for i, row in enumerate(rows):
        for j in range(length):
            k = j - (length - len(row)) if left else j
            out[i, j] = row[k] if 0 <= k < len(row) else fill
    return out


def test_the_pad_id_is_the_tokenizers_own_else_eos_else_an_error() -> None:
    assert Vocabulary(bert()).pad == bert().pad_token_id == 0
    assert gpt2().pad_token_id is None
    assert Vocabulary(gpt2()).pad == gpt2().eos_token_id
    with pytest.raises(InputError, match="neither"):
        _ = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=_bpe())).pad


@pytest.mark.parametrize(("multiple", "length"), [(None, 5), (1, 5), (5, 5), (8, 8)])
def test_a_batch_is_as_long_as_its_longest_row_or_the_next_multiple(multiple: int | None, length: int) -> None:
    rows = [[5, 6], [7, 8, 9, 10, 11], [12]]
    features = [{"input_ids": row, "attention_mask": [1] * len(row), "token_type_ids": [1] * len(row)} for row in rows]
    batch = collate(features, 99, pad_to_multiple_of=multiple)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
    np.testing.assert_array_equal(batch["input_ids"], padded(rows, 99, length))
    ones = padded([[1] * len(row) for row in rows], 0, length)
    np.testing.assert_array_equal(batch["attention_mask"], ones)
    np.testing.assert_array_equal(batch["token_type_ids"], ones)
    assert batch["input_ids"].dtype == torch.int64


def test_class_labels_are_int64_and_scores_float32() -> None:
    def labels(values: list[Any]) -> torch.Tensor:
        return collate([{"input_ids": [1], "attention_mask": [1], "labels": value} for value in values], 0)["labels"]

    assert labels([1, 0]).dtype == torch.int64
    scores = labels([2.5, 5.0])
    assert scores.dtype == torch.float32
    assert scores.tolist() == [2.5, 5.0]


def test_target_tokens_are_padded_to_their_own_length_with_what_the_loss_ignores() -> None:
    rows = examples(["the mill is", "a"], ["a", "a cheap pub near the river"])
    made = encode(rows, E2E, gpt2(), max_length=32, family="seq2seq")
    batch = collate(made.features, Vocabulary(gpt2()).pad)
    targets = [feature["labels"] for feature in made.features]
    np.testing.assert_array_equal(batch["labels"], padded(targets, IGNORE, max(map(len, targets))))
    assert batch["labels"].shape != batch["input_ids"].shape


def test_left_padding_puts_the_last_token_last() -> None:
    rows = [[5, 6], [7, 8, 9]]
    batch = collate([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], 0, side="left")
    np.testing.assert_array_equal(batch["input_ids"], padded(rows, 0, 3, left=True))
    np.testing.assert_array_equal(batch["attention_mask"], padded([[1, 1], [1, 1, 1]], 0, 3, left=True))


# --- windows ------------------------------------------------------------------------------------------------------


def prose(seed: int, words: int) -> str:
    """Words of several scripts between all kinds of white space and punctuation, special tokens too."""
    rng = random.Random(seed)
    between = [" "] * 12 + [
        " \n ",
        "\n\n",
        "  ",
        ", ",
        ".\n",
        " || ",
        "\t",
        "-",
        "' ",
        " 12 ",
        "<|endoftext|>",
        "[MASK]",
    ]
    return "".join(rng.choice(" ".join(CORPUS).split()) + rng.choice(between) for _ in range(words))


@pytest.mark.parametrize("tokenizer", [gpt2(), bert(), gpt2(True), templated("<s> $A")], ids=["bpe", "wp", "sp", "bos"])
@pytest.mark.parametrize("piece", [40, 333, 1000])
def test_a_text_in_pieces_has_the_tokens_of_the_whole(tokenizer: Any, piece: int) -> None:
    for seed in range(3):
        text = prose(seed, 1500)
        whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        assert windows_file.tokenise(text, tokenizer, piece) == whole


def test_a_cut_that_would_change_the_tokens_is_given_up() -> None:
    """A space put before whatever is tokenised would appear in the middle of the text."""
    backend = _bpe()
    backend.normalizer = normalizers.Prepend("_")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = prose(0, 300)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    middle = text.index(" the ", 500)
    halves = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text[:middle], text[middle:])]
    assert halves[0] + halves[1] != whole
    assert windows_file.tokenise(text, tokenizer, 100) == whole


def test_pieces_are_really_made(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def letters(_: Any, texts: list[str]) -> list[list[int]]:
        seen.extend(len(text) for text in texts)
        return [[ord(letter) for letter in text] for text in texts]

    text = "the mill " * 1000
    monkeypatch.setattr(windows_file, "token_ids", letters)
    assert windows_file.tokenise(text, None, 1000) == [ord(letter) for letter in text]
    assert max(seen) < 1100
    seen.clear()
    monkeypatch.setattr(windows_file, "token_ids", lambda *given: [[0] for _ in letters(*given)])
    windows_file.tokenise(text, None, 1000)
    assert max(seen) == len(text)  # [0] + [0] is not [0]: with such a tokenizer every cut is given up


@pytest.mark.parametrize("tokenizer", [gpt2(), templated("<s> $A")], ids=["gpt2", "llama"])
def test_causal_windows_are_the_tokenized_text_cut_into_equal_parts_and_a_last_one(tokenizer: Any) -> None:
    text = prose(4, 200)
    whole = tokenizer(text, verbose=False)["input_ids"]
    windows = lm_windows(text, tokenizer, 16)
    assert [i for window in windows.ids for i in window] == whole
    assert {len(window) for window in windows.ids[:-1]} == {16}
    assert 0 < len(windows.ids[-1]) <= 16
    assert windows.tokens == len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def test_masked_windows_stand_between_special_tokens_that_count() -> None:
    text = prose(5, 200)
    plain = bert()(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = lm_windows(text, bert(), 16, masked=True)
    assert {len(window) for window in windows.ids[:-1]} == {16}
    assert all((window[0], window[-1]) == (2, 3) for window in windows.ids)
    assert [i for window in windows.ids for i in window[1:-1]] == plain
    assert windows.tokens == len(plain)


@pytest.mark.parametrize(
    ("text", "words"), [(" a b \n", 3), (" a b ", 3), ("a\n\nb\n", 5), ("a\u2028b\n", 3), ("a\n b", 4)]
)
def test_words_are_whitespace_tokens_and_one_per_line(text: str, words: int) -> None:
    assert lm_windows(text, gpt2(), 4).words == words


def test_a_text_longer_than_the_models_maximum_gives_no_advice(caplog: pytest.LogCaptureFixture) -> None:
    from transformers.utils import logging as hf_logging

    hf_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            lm_windows(prose(6, 100), gpt2(), 16)
            encode(examples([prose(6, 100)], [1]), SST2, bert(), max_length=16, family="encoder")
            assert caplog.records == []
            bert.__wrapped__()(prose(6, 100))
            assert "longer than" in caplog.text  # such advice would have been noticed
    finally:
        hf_logging.disable_propagation()


def test_windows_need_room_and_tokens() -> None:
    assert lm_windows("a b c", bert(), 3, masked=True).ids[0][0] == 2
    assert len(lm_windows("a b c", gpt2(), 2).ids[0]) == 2
    with pytest.raises(UsageError, match="‹max_length› 2"):
        lm_windows("a b c", bert(), 2, masked=True)
    with pytest.raises(UsageError, match="‹max_length› 1"):
        lm_windows("a b c", gpt2(), 1)
    with pytest.raises(InputError, match="no tokens"):
        lm_windows(" \n", bert(), 8, masked=True)
