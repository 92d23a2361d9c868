"""Token ids beside the tables of a model: what pads, what masks, and what has no row."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from cli.tasks import VOCABULARY, tokenizer

from mpocli.config.tasks import task_named
from mpocli.errors import InputError
from mpocli.train.data.encode import encode
from mpocli.train.data.examples import Examples
from mpocli.train.data.vocabulary import Vocabulary
from mpocli.train.data.windows import lm_windows

SIZE = len(VOCABULARY)


def test_a_padding_token_without_a_row_is_replaced_by_one_that_has_one() -> None:
    added = tokenizer("gpt2")
    added.add_special_tokens({"pad_token": "[NEW]"})
    assert added.pad_token_id == SIZE
    assert Vocabulary(added).pad == SIZE  # nothing is known of a table
    assert Vocabulary(added, SIZE + 1, SIZE + 1).pad == SIZE
    assert Vocabulary(added, SIZE).pad == added.eos_token_id
    assert Vocabulary(added, SIZE + 1, SIZE).pad == added.eos_token_id
    added.add_special_tokens({"eos_token": "[END]", "unk_token": "[ODD]"})
    assert Vocabulary(added, SIZE).pad == 0


def test_a_text_with_a_token_that_has_no_row_is_refused_with_token_id_and_rows() -> None:
    words = tokenizer("gpt2")
    last = VOCABULARY[-1]
    assert len(lm_windows(f"name {last}", words, 8, vocabulary=Vocabulary(words, SIZE, SIZE)).ids) == 1
    for vocabulary in (Vocabulary(words, SIZE - 1), Vocabulary(words, SIZE, SIZE - 1)):
        with pytest.raises(InputError) as caught:
            lm_windows(f"name {last}", words, 8, vocabulary=vocabulary)
        assert repr(last) in caught.value.message
        assert f"id {SIZE - 1}, the model's table {SIZE - 1} rows" in caught.value.message


def test_random_replacements_are_drawn_from_what_both_have() -> None:
    assert [Vocabulary(tokenizer("bert"), rows).size for rows in (None, SIZE - 4, SIZE + 4)] == [SIZE, SIZE - 4, SIZE]


def test_a_token_type_without_a_row_is_refused_and_one_type_for_all_is_left_out() -> None:
    pair = Examples(("name",), ("food",), None, (1,), "here")
    encoded = {
        types: lambda types=types: encode(
            pair,
            task_named("rte"),
            tokenizer("bert"),
            max_length=9,
            family="encoder",
            vocabulary=Vocabulary(tokenizer("bert"), types=types),
        ).features[0]
        for types in (None, 1, 2)
    }
    assert encoded[None]()["token_type_ids"] == encoded[2]()["token_type_ids"] == [0, 0, 0, 1, 1]
    assert "token_type_ids" not in encoded[1]()
    with pytest.raises(InputError, match=r"here: line 1.*token type 1, the model's table has 1 rows"):
        Vocabulary(tokenizer("bert"), types=1).check_types([0, 1], "here: line 1")


def test_a_tokenizer_without_a_mask_token_cannot_ask_a_masked_language_model() -> None:
    with pytest.raises(InputError, match="no mask token"):
        _ = Vocabulary(tokenizer("gpt2")).mask
    with pytest.raises(InputError, match="id 4, the model's table 3 rows"):
        _ = Vocabulary(tokenizer("bert"), 3).mask


def test_a_decoder_that_begins_with_what_it_has_no_row_for_is_refused() -> None:
    t5 = Vocabulary(tokenizer("t5"), 90, 90)
    for name in ("decoder_start_token_id", "pad_token_id"):
        config = SimpleNamespace(is_encoder_decoder=True, **{name: 90})
        with pytest.raises(InputError, match=f"{name}.*id 90, the model's table 90 rows"):
            t5.check_decoder(config)
        t5.check_decoder(SimpleNamespace(is_encoder_decoder=False, **{name: 90}))
