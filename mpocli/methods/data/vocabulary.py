"""Room in a model for the text it is given: its tokenizer beside its tables, and its positions."""

from __future__ import annotations

from typing import Any

from mpocli.errors import InputError, UsageError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.loading import load_tokenizer
from mpocli.train.data.vocabulary import Vocabulary


def model_vocabulary(checkpoint: Checkpoint, tokenizer: str | None = None) -> Vocabulary:
    """The checkpoint's tokenizer, or the one that was named, beside the tables of its model. Raises `InputError` for a
    model that takes no text, one without a tokenizer, and a decoder that begins with a token that it has not."""
    found = checkpoint.survey
    if found.reads != "input_ids":
        raise InputError(
            f"{checkpoint.source.name}: a {checkpoint.architecture} reads {found.reads}, no text",
            hint="choose a model of text, or what needs no data",
        )
    loaded = load_tokenizer(checkpoint.source.directory, tokenizer, trust_remote_code=checkpoint.trust_remote_code)
    types = getattr(checkpoint.config.get_text_config(), "type_vocab_size", None)
    types = types if isinstance(types, int) else None
    vocabulary = Vocabulary(loaded, found.token_rows, found.target_rows, types)
    vocabulary.check_decoder(checkpoint.config)
    return vocabulary


def positions(config: Any) -> int | None:
    """How many tokens a model has places for, None where there is no such limit (T5's relative ones)."""
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not isinstance(most, int) or most < 1 or hasattr(config, "relative_attention_num_buckets"):
        return None
    # RoBERTa's positions begin after its padding index.
    return most - (2 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0)


def check_length(checkpoint: Checkpoint, length: int, written: int) -> None:
    """`UsageError` where source (and what is written after it) needs more places than the model has positions."""
    most = positions(checkpoint.config)
    if most is not None and length + written > most:
        what = f"--max-length {length}" + (f" and --max-new-tokens {written}" if written else "")
        raise UsageError(f"{what}: the model has {most} positions", hint=f"at most {most} together")
