"""Load a model's weights and its tokenizer through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mpocli.errors import InputError
from mpocli.hf.config import TOKENIZER_FILES, check_side_files
from mpocli.hf.foreign import foreign
from mpocli.hf.skeleton import build_skeleton

if TYPE_CHECKING:
    from mpocli.hf.artifact import Checkpoint


def load(cls: Any, directory: Path, *, hint: str = "restore the files of the model", **options: Any) -> Any:
    """`cls.from_pretrained(directory, **options)`; `InputError` for whatever comes out of transformers."""
    check_side_files(directory)
    name = cls.__name__.removeprefix("AutoModelFor")
    with foreign(f"{directory}: does not load as {name}", hint=hint):
        return cls.from_pretrained(directory, **options)


def load_as_saved(checkpoint: Checkpoint) -> Any:
    """A checkpoint as the class that it was saved from, in float32 and evaluation mode."""
    cls: Any = type(build_skeleton(checkpoint.config, trust_remote_code=checkpoint.trust_remote_code))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of parameters that the files lack
        return load(cls, checkpoint.source.directory, dtype=torch.float32).eval()


def load_tokenizer(directory: Path, name: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer, or the one of another model; `InputError` where there is none."""
    from transformers import AutoTokenizer

    source = name or directory
    hint = "name another with ‹tokenizer›"
    if Path(source).is_dir():
        check_side_files(Path(source), TOKENIZER_FILES)
    with foreign(f"{source}: no tokenizer that can be used", hint=hint):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        vocabulary, special = tokenizer.get_vocab(), tokenizer.all_special_ids
        words = len({number for number in vocabulary.values() if isinstance(number, int)} - set(special))
    # Where no file is, transformers makes one of special tokens (and of T5's kind one that knows a space).
    if words < 2:
        raise InputError(f"{source}: no tokenizer, or one without words", hint=hint)
    return tokenizer
