"""Whose mistake an exception is: a user's file under foreign code, or a bug of our own."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from mpocli.errors import InputError, NumericsError
from mpocli.hf.activations import run
from mpocli.hf.foreign import foreign
from mpocli.io import json_file


def foreign_code(call: object = None) -> None:
    """Stands for transformers: this module is none of mpocli's."""
    if callable(call):
        call()
    raise KeyError("model.layers")


def test_an_exception_of_foreign_code_becomes_one_line_with_its_words() -> None:
    with pytest.raises(InputError) as caught, foreign("bert: does not load", hint="try another"):
        foreign_code()
    assert caught.value.message == "bert: does not load ('model.layers')"
    assert caught.value.hint == "try another"


@pytest.mark.parametrize("kind", [ImportError, RecursionError, AttributeError, AssertionError, MemoryError])
def test_any_class_of_exception_is_caught_and_only_its_first_line_is_told(kind: type[Exception]) -> None:
    def fail() -> None:
        raise kind("\n" + "x" * 1000 + "\ud800\nsecond")

    with pytest.raises(InputError) as caught, foreign("bert", hint="try"):
        foreign_code(fail)
    assert len(caught.value.message) < 220
    assert "second" not in caught.value.message
    caught.value.message.encode()


def test_a_panic_of_rust_is_the_files_trouble_too() -> None:
    """pyo3's class of it derives from `BaseException`, so that nobody goes on by accident."""

    class PanicException(BaseException):
        pass

    def fail() -> None:
        raise PanicException("no entry found for key")

    with pytest.raises(InputError, match="no entry found for key"), foreign("tokenizer", hint="try"):
        foreign_code(fail)


def test_a_bug_of_our_own_that_foreign_code_ran_into_stays_a_bug() -> None:
    with pytest.raises(TypeError), foreign("bert", hint="try"):
        foreign_code(lambda: json_file.parse_json(None))  # type: ignore[arg-type]


def test_what_is_said_on_purpose_passes_as_it_is() -> None:
    def fail() -> None:
        raise NumericsError("not finite")

    with pytest.raises(NumericsError), foreign("bert", hint="try"):
        foreign_code(fail)
    with pytest.raises(KeyboardInterrupt), foreign("bert", hint="try"):
        raise KeyboardInterrupt


def test_an_error_that_has_no_words_is_told_by_its_class() -> None:
    with pytest.raises(InputError, match=r"bert \(StopIteration\)"), foreign("bert", hint="try"):
        next(iter(json.loads("[]")))


def test_a_model_that_takes_no_text_is_refused_at_its_own_error() -> None:
    class Ear(nn.Linear):
        device = torch.device("cpu")

        def forward(self, sound: torch.Tensor) -> torch.Tensor:
            return sound

    with pytest.raises(InputError, match=r"a Ear cannot be run on text \(.*input_ids"):
        run(Ear(1, 1), {"input_ids": torch.tensor([[1]])})  # type: ignore[arg-type]
