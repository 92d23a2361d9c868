"""demo: the whole path on models made on the spot: make, decompose, load with transformers, predict."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpocli.config.decompose import DecomposeConfig
from mpocli.io.apart import check_apart
from mpocli.io.schema import MANIFEST
from mpocli.train.demo.models import build_demo_models
from mpocli.train.demo.predict import examine

MASKED = ("Return the [MASK] of the file.", "If the [MASK] is None, the default is used.")
PROMPTS = ("Return a", "This method is")
# Tiny models bear little truncation without training after it: this much is seen in sizes and answers alike.
CAP = 80


@dataclass(frozen=True)
class Arm:
    """One checkpoint of a model: how it was made, its size, its held-out perplexity, and what it predicts."""

    model: str
    made_by: str
    directory: str
    params: int
    bytes: int
    perplexity: float
    predictions: tuple[str, ...]


@dataclass(frozen=True)
class DemoReport:
    out: str
    seconds: float
    cached: bool
    questions: tuple[tuple[str, ...], tuple[str, ...]]  # asked of BERT, of GPT-2
    arms: tuple[Arm, ...]


def run(
    cache: Path,
    out: Path,
    decompose: Callable[..., Any],
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> DemoReport:
    """Make the demo models under `cache` unless they are there, and their MPO checkpoints under `out`.

    `decompose(model, config, out, overwrite=…)` is the verb of that name; `progress(stage, done, total)` is called
    along the way. Raises `InputError` where a directory cannot be written.
    """
    started = time.perf_counter()
    check_apart({"--cache": cache, "--out": out}, {})
    models = build_demo_models(cache, progress=progress)
    texts = [text for text in models.held_out.read_text(encoding="utf-8").split("\n\n") if text.strip()]
    plans = [
        ("bert", models.bert, DecomposeConfig()),
        ("bert", models.bert, DecomposeConfig(trunc=CAP)),
        ("gpt2", models.gpt2, DecomposeConfig()),
        ("gpt2", models.gpt2, DecomposeConfig(trunc=CAP)),
    ]
    arms: list[Arm] = []
    for done, (name, dense, config) in enumerate(plans):
        if not any(arm.model == name for arm in arms):
            arms.append(_arm(name, "dense", dense, texts))
        suffix = "lossless" if config.trunc is None else f"trunc-{config.trunc}"
        made = out / f"{name}-{suffix}"
        decompose(str(dense), config, made, overwrite=_is_demos(made, name))
        arms.append(_arm(name, suffix.replace("trunc-", "--trunc "), made, texts))
        if progress:
            progress("decomposing, loading, predicting", done + 1, len(plans))
    return DemoReport(str(out), time.perf_counter() - started, models.cached, (MASKED, PROMPTS), tuple(arms))


def _is_demos(made: Path, name: str) -> bool:
    """Whether an earlier demo wrote this directory: then, and only then, it is replaced unasked."""
    try:
        manifest = json.loads((made / MANIFEST).read_text(encoding="utf-8"))
        commands = [entry["command"] for entry in manifest["history"]]
        return commands == ["decompose"] and manifest["base_model"]["name"] == name
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _arm(name: str, made_by: str, directory: Path, texts: list[str]) -> Arm:
    found = examine(directory, texts, MASKED if name == "bert" else PROMPTS, masked=name == "bert")
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return Arm(name, made_by, str(directory), found.params, size, found.perplexity, found.predictions)
