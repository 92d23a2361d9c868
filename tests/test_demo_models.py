"""The demo's models: real, reproducible, cached, and never half there."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from mpocli.errors import InputError
from mpocli.train.demo import docstrings, training
from mpocli.train.demo import models as demo_models
from mpocli.train.demo.docstrings import read_docstrings
from mpocli.train.demo.models import build_demo_models
from mpocli.train.demo.perplexity import evaluate_causal, evaluate_masked
from mpocli.train.demo.settings import Settings
from mpocli.train.demo.tokenizers import bytepair_tokenizer, wordpiece_tokenizer

Build = Callable[..., demo_models.DemoModels]


@pytest.fixture(scope="module")
def documents() -> list[list[str]]:
    """Some of the library's docstrings, read once."""
    sources = list(itertools.islice(docstrings.source_files(Path(sysconfig.get_path("stdlib"))), 60))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docstrings, "source_files", lambda root: sources)
        return read_docstrings(lambda *step: None)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, documents: list[list[str]]) -> Build:
    monkeypatch.setattr(demo_models, "read_docstrings", lambda report: documents)
    return build_demo_models


def digests(directory: Path) -> dict[str, str]:
    """The hash of every file but demo.json, which holds the time that the training took."""
    files = [file for file in directory.rglob("*") if file.is_file() and file.name != "demo.json"]
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_docstrings_are_prose_and_come_once(documents: list[list[str]]) -> None:
    texts = [text for document in documents for text in document]
    assert len(set(texts)) == len(texts) > 1000
    assert not any(">>>" in text or "\n" in text for text in texts)


def test_models_load_are_found_again_and_two_builds_agree_to_the_byte(build: Build, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    made = build(tmp_path / "new" / "demo", steps=3, progress=lambda *step: seen.append(step))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert not made.cached
    assert seen[-1] == ("training GPT-2", 3, 3)
    assert {stage for stage, done, total in seen if done == total} == {
        "training the tokenizers",
        "training BERT",
        "training GPT-2",
    }
    texts = made.held_out.read_text(encoding="utf-8").split("\n\n")

    bert, wordpiece = AutoModelForMaskedLM.from_pretrained(made.bert), AutoTokenizer.from_pretrained(made.bert)
    assert wordpiece.tokenize("Return [MASK] of the FILE")[0:2] == ["return", "[MASK]"]
    assert len(wordpiece) == bert.config.vocab_size
    assert evaluate_masked(bert, wordpiece, texts) == pytest.approx(made.bert_perplexity, rel=1e-4)

    gpt2, bytepair = AutoModelForCausalLM.from_pretrained(made.gpt2), AutoTokenizer.from_pretrained(made.gpt2)
    text = "Return the naïve file."
    assert bytepair.decode(bytepair(text)["input_ids"]) == text
    assert len(bytepair) == gpt2.config.vocab_size
    assert evaluate_causal(gpt2, bytepair, texts) == pytest.approx(made.gpt2_perplexity, rel=1e-4)

    again = build(tmp_path / "new" / "demo", steps=3)
    assert again == replace(made, cached=True)
    first = digests(made.bert.parent)
    torch.set_num_threads(2)
    try:
        second = digests(build(tmp_path / "second", steps=3).bert.parent)
    finally:
        torch.set_num_threads(1)
    assert first == second
    assert {"bert/model.safetensors", "gpt2/model.safetensors", "held_out.txt"} <= set(first)
    assert not build(tmp_path / "new" / "demo", steps=1).cached
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["demo"]


def test_models_learn(build: Build, tmp_path: Path) -> None:
    made = build(tmp_path / "demo", steps=14)
    vocabulary = json.loads((made.bert / "config.json").read_text())["vocab_size"]
    assert 1 < made.bert_perplexity < vocabulary / 2
    assert 1 < made.gpt2_perplexity < vocabulary / 2


@pytest.mark.parametrize("stage", ["training the tokenizers", "training GPT-2"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_build_that_fails_leaves_nothing(
    build: Build, tmp_path: Path, stage: str, error: type[BaseException]
) -> None:
    def fail(current: str, done: int, total: int) -> None:
        if current == stage:
            raise error

    with pytest.raises(error):
        build(tmp_path / "demo", steps=1000, progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_fails_stops_the_other(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no more memory")

    monkeypatch.setattr(training, "choose_masked", fail)  # only BERT's training masks
    with pytest.raises(RuntimeError, match="no more memory"):
        build(tmp_path / "demo", steps=100_000)
    assert list(tmp_path.iterdir()) == []


def test_a_second_builder_is_refused_and_the_first_goes_on(build: Build, tmp_path: Path) -> None:
    refusals: list[str] = []

    def race(stage: str, done: int, total: int) -> None:
        if stage == "training BERT" and not refusals:
            with pytest.raises(InputError) as refusal:
                build(tmp_path / "demo", steps=2)
            refusals.append(refusal.value.message)

    first = build(tmp_path / "demo", steps=2, progress=race)
    assert len(refusals) == 1 and "demo" in refusals[0]
    assert build(tmp_path / "demo", steps=2) == replace(first, cached=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["demo"]


def test_a_damaged_cache_is_made_again_and_foreign_files_are_kept(build: Build, tmp_path: Path) -> None:
    made = build(tmp_path / "demo", steps=1)
    before = digests(tmp_path / "demo")
    (made.bert / "model.safetensors").unlink()
    assert not build(tmp_path / "demo", steps=1).cached
    assert digests(tmp_path / "demo") == before

    (tmp_path / "demo" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        build(tmp_path / "demo", steps=2)
    assert (tmp_path / "demo" / "notes.txt").read_text() == "mine"
    assert build(tmp_path / "demo", steps=1).cached


def test_no_sources_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpocli.train.demo.docstrings.sysconfig.get_path", lambda name: str(tmp_path / "lib.zip"))
    with pytest.raises(InputError, match="0 source files") as caught:
        build_demo_models(tmp_path / "demo")
    assert caught.value.hint
    assert not (tmp_path / "demo").exists()


def test_sources_that_do_not_parse_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text('"""\n    A module\n    of words.\n    """\nclass A:\n    "A class."\n')
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "binary.py").write_bytes(b'"""\xff\x00"""')
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text('"""A test."""')
    files = list(docstrings.source_files(tmp_path))
    assert [file.name for file in files] == ["binary.py", "broken.py", "good.py"]
    assert [list(filter(None, docstrings.docstrings_of(file))) for file in files] == [
        [],
        [],
        ["A module\nof words.", "A class."],
    ]


class Uniform(torch.nn.Module):
    """Gives every token the same chance; remembers what it was asked."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(vocabulary))
        self.config = type("Config", (), {"max_position_embeddings": 48})()
        self.asked: list[torch.Tensor] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        self.asked.append(input_ids)
        return type("Output", (), {"logits": self.weight.expand(*input_ids.shape, -1)})()


def test_perplexity_of_a_model_that_knows_nothing(documents: list[list[str]]) -> None:
    texts = [text for document in documents for text in document]
    settings = Settings()
    wordpiece, bytepair = wordpiece_tokenizer(texts, settings), bytepair_tokenizer(texts, settings)
    for evaluate, tokenizer in ((evaluate_masked, wordpiece), (evaluate_causal, bytepair)):
        model = Uniform(len(tokenizer)).train()
        assert math.isclose(evaluate(model, tokenizer, texts, max_tokens=1000), len(tokenizer), rel_tol=1e-5)
        assert model.training
        assert torch.cat(model.asked).shape == (20, 48)  # the model's window, and no more than 1000 tokens
        first, model.asked = model.asked, []
        evaluate(model, tokenizer, texts, max_tokens=1000)
        assert all(torch.equal(a, b) for a, b in zip(first, model.asked, strict=True))
        with pytest.raises(InputError, match="fewer than the 48"):
            evaluate(model, tokenizer, texts[:1])
    masked = Uniform(len(wordpiece))
    evaluate_masked(masked, wordpiece, texts, max_tokens=1000)
    assert ((torch.cat(masked.asked) == wordpiece.mask_token_id).sum(1) == round(0.15 * 48)).all()
    with pytest.raises(InputError, match="no mask token"):
        evaluate_masked(masked, bytepair, texts)
