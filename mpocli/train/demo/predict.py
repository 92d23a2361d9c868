"""Load a demo checkpoint the way any user would, and see what it knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from mpocli.train.demo.perplexity import evaluate_causal, evaluate_masked


@dataclass(frozen=True)
class Examination:
    """Parameters of a loaded model, its perplexity per token on held-out text, and its answers to questions."""

    params: int
    perplexity: float
    predictions: tuple[str, ...]


def examine(directory: Path, texts: list[str], questions: Sequence[str], *, masked: bool) -> Examination:
    """What a checkpoint knows: a masked language model fills each question's mask, a causal one goes on from it."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model = auto.from_pretrained(directory).eval()
    perplexity = (evaluate_masked if masked else evaluate_causal)(model, tokenizer, texts)
    answer = _fill if masked else _continue
    params = sum(parameter.numel() for parameter in model.parameters())
    return Examination(params, perplexity, tuple(answer(model, tokenizer, question) for question in questions))


@torch.no_grad()
def _fill(model: Any, tokenizer: Any, text: str) -> str:
    """The three likeliest words for the mask."""
    inputs = tokenizer(text, return_tensors="pt")
    position = int((inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0])
    best = model(**inputs).logits[0, position].topk(3).indices.tolist()
    return ", ".join(tokenizer.convert_ids_to_tokens(best))


@torch.no_grad()
def _continue(model: Any, tokenizer: Any, text: str) -> str:
    """Ten greedy tokens after the prompt."""
    inputs = tokenizer(text, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=10, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(made[0], skip_special_tokens=True)).replace("\n", " ")
