"""What the tables measure and no command reports."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from scipy.stats import spearmanr
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import mpocli  # noqa: F401 (so that from_pretrained knows the format)

# Two at a time lose tied weights: from_pretrained changes what all threads share.
_LOADING = Lock()


def _loaded(kind: Any, model_dir: Path) -> Any:
    with _LOADING:
        return kind.from_pretrained(model_dir).eval()


@torch.no_grad()
def e2e_loss(model_dir: Path, source: Path, file: Path, most: int | None = None) -> float:
    """Of an encoder-decoder per target token, over the pairs of an E2E file, or the first `most` of them."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = _loaded(AutoModelForSeq2SeqLM, model_dir)
    with file.open() as stream:
        rows = list(csv.DictReader(stream))[:most]
    total, count = 0.0, 0
    for start in range(0, len(rows), 32):
        part = rows[start : start + 32]
        batch = tokenizer([row["mr"] for row in part], return_tensors="pt", padding=True)
        labels = tokenizer([row["ref"] for row in part], return_tensors="pt", padding=True)["input_ids"]
        labels[labels == tokenizer.pad_token_id] = -100
        tokens = int((labels != -100).sum())
        total += float(model(**batch, labels=labels).loss) * tokens
        count += tokens
    return total / count


@torch.no_grad()
def window_perplexity(model_dir: Path, source: Path, file: Path, most: int | None = None) -> float:
    """Of a causal model, over a text in windows of 256 tokens, or the first `most` of them."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = _loaded(AutoModelForCausalLM, model_dir)
    ids = torch.tensor(tokenizer(file.read_text())["input_ids"])
    windows = ids[: len(ids) // 256 * 256].view(-1, 256)[:most]
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in windows.split(16)]
    return math.exp(sum(losses) / len(windows))


# Sentence embeddings of the dense model.
_ORIGINAL: dict[Path, list[torch.Tensor]] = {}


def embeddings(model_dir: Path, source: Path, file: Path) -> tuple[float, float]:
    """Of STS-B's sentences: mean cosine with the original's, and Spearman's correlation of pair cosines with scores."""
    with file.open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    sides = [[row["sentence1"] for row in rows], [row["sentence2"] for row in rows]]
    if source not in _ORIGINAL:
        _ORIGINAL[source] = [_embedded(source, source, sentences) for sentences in sides]
    before, after = _ORIGINAL[source], [_embedded(model_dir, source, sentences) for sentences in sides]
    cosine = torch.cat([(a * b).sum(-1) for a, b in zip(before, after, strict=True)]).mean()
    scores = [float(row["score"]) for row in rows]
    return float(cosine), float(spearmanr((after[0] * after[1]).sum(-1), scores).statistic)


@torch.no_grad()
def _embedded(model_dir: Path, source: Path, sentences: list[str]) -> torch.Tensor:
    """Unit vectors, the means over the tokens."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = _loaded(AutoModel, model_dir)
    order = sorted(range(len(sentences)), key=lambda k: len(sentences[k]))  # little padding
    made = torch.empty(len(sentences), model.config.hidden_size)
    for start in range(0, len(order), 64):
        part = order[start : start + 64]
        batch = tokenizer([sentences[k] for k in part], return_tensors="pt", padding=True, truncation=True)
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        made[part] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return made
