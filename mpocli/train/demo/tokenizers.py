"""The demo models' tokenizers, trained on their text."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BertTokenizerFast,
    GPT2TokenizerFast,
)

from mpocli.train.demo.settings import Settings


def wordpiece_tokenizer(texts: list[str], settings: Settings) -> BertTokenizerFast:
    """BERT's tokenizer: the same for the same texts, in whatever order their characters were counted."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # The trainer numbers the characters inside words in an order that changes from run to run, and breaks ties by
    # these numbers; a fixed place for each makes it deterministic.
    inner = [f"##{c}" for c in sorted({c for text in texts for c in text.lower() if not c.isspace()})]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=settings.vocabulary, special_tokens=special + inner, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return BertTokenizerFast(vocab=tokenizer.get_vocab(), model_max_length=settings.window)


def bytepair_tokenizer(texts: list[str], settings: Settings) -> GPT2TokenizerFast:
    """GPT-2's tokenizer, which reads any bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return GPT2TokenizerFast(vocab=model["vocab"], merges=merges, model_max_length=settings.window)
