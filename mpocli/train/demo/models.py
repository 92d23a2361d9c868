"""Small real language models made on the spot: a BERT and a GPT-2 trained on Python's own docstrings.

Every Python installation carries about a megabyte of English prose in the docstrings of its standard library. The
two models learn from it in well under a minute on two CPU cores, without a network. They are tiny, but trained: their
spectra, perplexities and predictions are those of models that know something.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mpocli.errors import InputError
from mpocli.hf import quiet
from mpocli.io.output import output_directory
from mpocli.progress import StageProgress
from mpocli.train.demo.docstrings import read_docstrings
from mpocli.train.demo.settings import Settings
from mpocli.train.demo.training import train_models


@dataclass(frozen=True)
class DemoModels:
    """Where the models lie, and what they reached on the docstrings that they never saw.

    `held_out` is a text file, its paragraphs separated by blank lines. `tokens` counts the training text, in tokens
    of GPT-2; `seconds` is what the training took, also where `cached` says that this call only found its result.
    """

    bert: Path
    gpt2: Path
    held_out: Path
    bert_perplexity: float
    gpt2_perplexity: float
    tokens: int
    seconds: float
    cached: bool


def build_demo_models(
    directory: Path, *, progress: StageProgress | None = None, steps: int | None = None
) -> DemoModels:
    """Train both models into `directory`, or find there what an earlier call has trained with the same settings.

    `steps` replaces the number of steps of both trainings. `progress(stage, done, total)` is called along the way.
    The result depends on nothing but the settings, the Python installation, the versions of torch and tokenizers,
    and the kind of processor; the caller's random state stays as it is. `directory` appears whole or not at all.
    Raises `InputError` if it holds anything else, cannot be written, or Python came without its sources.
    """
    settings = Settings()
    if steps is not None:
        settings = replace(settings, bert=replace(settings.bert, steps=steps), gpt2=replace(settings.gpt2, steps=steps))
    if found := _cached(directory, settings):
        return found
    _check_replaceable(directory)
    started = time.perf_counter()
    report = progress or (lambda stage, done, total: None)
    documents = read_docstrings(report)
    held_out = [text for document in documents[::20] for text in document]
    texts = [text for k, document in enumerate(documents) if k % 20 for text in document]
    try:
        with output_directory(directory) as work, quiet.transformers():
            (work / "held_out.txt").write_text("\n\n".join(held_out) + "\n", encoding="utf-8")
            record = train_models(work, texts, held_out, settings, report)
            record |= {"seconds": time.perf_counter() - started, "settings": asdict(settings)}
            (work / "demo.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except InputError:
        # Another process may have put its own into place first; what it made is the same.
        if found := _cached(directory, settings):
            return found
        raise
    return _result(directory, record, cached=False)


def _cached(directory: Path, settings: Settings) -> DemoModels | None:
    """What an earlier call made with the same settings, None where anything of it is missing."""
    try:
        record = json.loads((directory / "demo.json").read_text(encoding="utf-8"))
        if record["settings"] != asdict(settings):
            return None
        found = _result(directory, record, cached=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    kept = [model / name for model in (found.bert, found.gpt2) for name in ("model.safetensors", "tokenizer.json")]
    return found if all(file.is_file() for file in [found.held_out, *kept]) else None


def _result(directory: Path, record: dict[str, Any], *, cached: bool) -> DemoModels:
    return DemoModels(
        bert=directory / "bert",
        gpt2=directory / "gpt2",
        held_out=directory / "held_out.txt",
        bert_perplexity=float(record["bert_perplexity"]),
        gpt2_perplexity=float(record["gpt2_perplexity"]),
        tokens=int(record["tokens"]),
        seconds=float(record["seconds"]),
        cached=cached,
    )


def _check_replaceable(directory: Path) -> None:
    """`InputError` if putting the models at `directory` would take away anything but older ones."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: exists and is not a directory", hint="choose another ‹cache›")
    present = {entry.name for entry in directory.iterdir()} if directory.exists() else set()
    if foreign := present - {"bert", "gpt2", "held_out.txt", "demo.json"}:
        raise InputError(
            f"{directory}: holds {sorted(foreign)[0]}, which the demo models would replace",
            hint="choose another ‹cache›",
        )
