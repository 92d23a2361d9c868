"""Losses that no command reports."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import mpocli  # noqa: F401 (so that from_pretrained knows the format)


@torch.no_grad()
def e2e_loss(model_dir: Path, source: Path, file: Path) -> float:
    """Of an encoder-decoder per target token, over the pairs of an E2E file."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForSeq2SeqLM.from_pretrained(model_dir).eval()
    with file.open() as stream:
        rows = list(csv.DictReader(stream))
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
