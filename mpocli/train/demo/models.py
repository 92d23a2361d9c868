"""Small real language models made on the spot: a BERT and a GPT-2 trained on Python's own docstrings.

Every Python installation carries about a megabyte of English prose in the docstrings of its standard library. The
two models learn from it in well under a minute on two CPU cores, without a network. They are tiny, but trained: their
spectra, perplexities and predictions are those of models that know something.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
import sysconfig
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
)

from mpocli.errors import InputError
from mpocli.hf import quiet
from mpocli.io.output import output_directory

Progress = Callable[[str, int, int], None]
Tick = Callable[[int], None]  # told the number of steps done; raises to stop


@dataclass(frozen=True)
class Schedule:
    """How long to train, on how many windows a step, and at what peak learning rate."""

    steps: int
    batch: int
    rate: float


@dataclass(frozen=True)
class Settings:
    """All that decides what the models become, apart from the installed Python; a change of any makes them anew."""

    version: int = 1
    seed: int = 2023
    vocabulary: int = 2048
    window: int = 64  # tokens, of training and of the position tables
    width: int = 128
    layers: int = 2
    heads: int = 4
    bert_mask: float = 0.4  # of a window's tokens, in training
    bert: Schedule = Schedule(1100, 8, 1.5e-3)  # at twice the rate it may learn no more than word frequencies
    gpt2: Schedule = Schedule(900, 8, 3e-3)


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


def build_demo_models(directory: Path, *, progress: Progress | None = None, steps: int | None = None) -> DemoModels:
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
            record = _make(work, texts, held_out, settings, report)
            record |= {"seconds": time.perf_counter() - started, "settings": asdict(settings)}
            (work / "demo.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except InputError:
        # Another process may have put its own into place first; what it made is the same.
        if found := _cached(directory, settings):
            return found
        raise
    return _result(directory, record, cached=False)


def evaluate_causal(
    model: Any, tokenizer: Any, texts: Iterable[str], *, window: int = 64, max_tokens: int = 8192
) -> float:
    """Perplexity per token of a causal language model on `texts`.

    The texts are joined, each after an end-of-text token if the tokenizer has one, and cut into windows of `window`
    tokens (fewer if the model takes fewer), until `max_tokens` are used. Raises `InputError` if they give no window.
    """
    start = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    windows = _windows([start + ids for ids in encoded], model, tokenizer, window, max_tokens)

    def loss(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")

    return _perplexity(model, windows, loss)


def evaluate_masked(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    window: int = 64,
    max_tokens: int = 8192,
    fraction: float = 0.15,
    seed: int = 0,
) -> float:
    """Perplexity per masked token of a masked language model on `texts`.

    The texts are joined, each with its special tokens, and cut as in `evaluate_causal`. In each window the same
    `fraction` of its tokens becomes the mask token, at places that only `seed` and the tokens decide. Raises
    `InputError` if there is no window or no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise InputError("the tokenizer has no mask token", hint="evaluate this model as a causal one")
    encoded = tokenizer(list(texts), verbose=False)["input_ids"]
    windows = _windows(encoded, model, tokenizer, window, max_tokens)
    special = torch.tensor(tokenizer.all_special_ids)
    generator = torch.Generator().manual_seed(seed)

    def loss(ids: Tensor) -> Tensor:
        chosen = _choose(ids.cpu(), special, fraction, generator).to(ids.device)
        masked = ids.masked_fill(chosen, tokenizer.mask_token_id)
        logits = model(input_ids=masked, attention_mask=torch.ones_like(ids)).logits[chosen]
        return functional.cross_entropy(logits.float(), ids[chosen], reduction="none")

    return _perplexity(model, windows, loss)


def read_docstrings(report: Progress) -> list[list[str]]:
    """The paragraphs of prose in each docstring of the standard library, none of them twice.

    Nothing is imported: the sources are parsed. Raises `InputError` if there are too few of them to learn from.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = list(_sources(root))
    documents: list[list[str]] = []
    seen: set[str] = set()
    for done, file in enumerate(files):
        report("reading docstrings", done, len(files))
        for docstring in _docstrings(file):
            paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", docstring))
            fresh = list(dict.fromkeys(text for text in paragraphs if _is_prose(text) and text not in seen))
            seen.update(fresh)
            if fresh:
                documents.append(fresh)
    report("reading docstrings", len(files), len(files))
    if len(seen) < 1000:
        raise InputError(
            f"{root}: only {len(seen)} paragraphs of docstrings in {len(files)} source files, of 1000 needed",
            hint="use a Python whose standard library comes as .py files",
        )
    return documents


def _sources(root: Path) -> Iterable[Path]:
    """The library's own source files in a fixed order, without tests, examples and what was installed into it."""
    skipped = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
    for parent, directories, names in os.walk(root):
        directories[:] = sorted(set(directories) - skipped)
        yield from (Path(parent, name) for name in sorted(names) if name.endswith(".py"))


def _docstrings(file: Path) -> Iterable[str]:
    try:
        with warnings.catch_warnings(action="ignore"):  # old sources have invalid escapes
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def _is_prose(text: str) -> bool:
    """Whether a paragraph is English sentences, rather than a table, a signature or a doctest."""
    letters = sum(c.isalpha() or c in " ,." for c in text)
    return len(text) >= 20 and text.isascii() and text[0].isupper() and text[-1] in ".:" and letters > 0.93 * len(text)


def _make(work: Path, texts: list[str], held_out: list[str], settings: Settings, report: Progress) -> dict[str, Any]:
    """Train and save the tokenizers and the models. Returns what `demo.json` says of them."""
    stage = "training the tokenizers"
    report(stage, 0, 2)
    wordpiece = _wordpiece(texts, settings)
    report(stage, 1, 2)
    bytepair = _bytepair(texts, settings)
    report(stage, 2, 2)

    # Only the CPU's generator is forked and seeded: torch.manual_seed would reach the caller's GPUs too.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(settings.seed)
        bert, gpt2 = _bert(wordpiece, settings), _gpt2(bytepair, settings)
    special = torch.tensor(wordpiece.all_special_ids)
    bert_ids = torch.tensor([i for ids in wordpiece(texts, verbose=False)["input_ids"] for i in ids])
    gpt2_texts = bytepair(texts, verbose=False)["input_ids"]
    gpt2_ids = torch.tensor([i for ids in gpt2_texts for i in [bytepair.eos_token_id, *ids]])

    def masked_loss(ids: Tensor, generator: torch.Generator) -> Tensor:
        chosen = _choose(ids, special, settings.bert_mask, generator)
        hidden = bert.bert(ids.masked_fill(chosen, wordpiece.mask_token_id)).last_hidden_state
        return functional.cross_entropy(bert.cls(hidden[chosen]), ids[chosen])

    def causal_loss(ids: Tensor, generator: torch.Generator) -> Tensor:
        logits = gpt2(ids, use_cache=False).logits[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def train_bert(tick: Tick) -> float:
        _train(bert, bert_ids, masked_loss, settings.bert, settings, tick)
        return evaluate_masked(bert, wordpiece, held_out)

    def train_gpt2(tick: Tick) -> float:
        _train(gpt2, gpt2_ids, causal_loss, settings.gpt2, settings, tick)
        return evaluate_causal(gpt2, bytepair, held_out)

    bert_perplexity, gpt2_perplexity = _side_by_side(
        [
            ("training BERT", settings.bert.steps, train_bert),
            ("training GPT-2", settings.gpt2.steps, train_gpt2),
        ],
        report,
    )
    for name, model, tokenizer in (("bert", bert, wordpiece), ("gpt2", gpt2, bytepair)):
        model.save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
    return {"bert_perplexity": bert_perplexity, "gpt2_perplexity": gpt2_perplexity, "tokens": len(gpt2_ids)}


def _side_by_side(jobs: list[tuple[str, int, Callable[[Tick], float]]], report: Progress) -> list[float]:
    """What each job (stage, total, function) returns, each run in a thread of its own with one torch thread.

    Two trainings on a core each are as fast as one after the other on both, and only slower on a busy machine, where
    threads that wait for each other at every product come to a standstill. Nor do results depend on the cores.
    """
    done = [0] * len(jobs)
    stop = threading.Event()

    def work(number: int) -> float:
        def tick(step: int) -> None:
            done[number] = step
            if stop.is_set():
                raise InterruptedError("the other training, or its report, failed")

        torch.set_num_threads(1)
        return jobs[number][2](tick)

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(work, number) for number in range(len(jobs))]
        pending = set(futures)
        try:
            while pending:
                finished, pending = wait(pending, timeout=0.2)
                for future in finished:
                    future.result()
                for (stage, total, _), step in zip(jobs, done, strict=True):
                    report(stage, step, total)
        finally:
            stop.set()
            torch.set_num_threads(threads)
    return [future.result() for future in futures]


def _wordpiece(texts: list[str], settings: Settings) -> BertTokenizerFast:
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


def _bytepair(texts: list[str], settings: Settings) -> GPT2TokenizerFast:
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


def _bert(tokenizer: BertTokenizerFast, settings: Settings) -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=4 * settings.width,
        max_position_embeddings=settings.window,
        initializer_range=0.05,
        hidden_dropout_prob=0.0,  # no run is long enough to learn its text by heart
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertForMaskedLM(config)
    _look_at_neighbours(model)
    return model


@torch.no_grad()
def _look_at_neighbours(model: Any, size: int = 16) -> None:
    """Let the heads of BERT's first layer start with their eyes on the words next to each position.

    From a usual initialisation BERT spends thousands of steps on the frequencies of the words before it finds out
    that neighbours matter. Here the first `size` dimensions hold sinusoids of the position, words stay nearly out of
    them, and the queries and keys read them so that each head begins at one distance. All of it is trained on.
    """
    embeddings, attention = model.bert.embeddings, model.bert.encoder.layer[0].attention
    positions, words = embeddings.position_embeddings.weight, embeddings.word_embeddings.weight
    frequencies = torch.logspace(math.log10(3), -1, size // 2)  # radians per position
    angles = torch.arange(len(positions))[:, None] * frequencies
    positions.zero_()
    positions[:, :size] = 0.05 * torch.cat([angles.sin(), angles.cos()], dim=1)
    words[:, :size] *= 0.1
    embeddings.token_type_embeddings.weight.zero_()
    queries = attention.self.query.weight.chunk(model.config.num_attention_heads)
    keys = attention.self.key.weight.chunk(model.config.num_attention_heads)
    for head, (query, key) in enumerate(zip(queries, keys, strict=True)):
        distance = (head // 2 + 1) * (-1) ** (head + 1)
        sin, cos = (frequencies * distance).sin().diag(), (frequencies * distance).cos().diag()
        query[:size, :size] += 2.5 * torch.eye(size)
        key[:size, :size] += 2.5 * torch.cat([torch.cat([cos, -sin], dim=1), torch.cat([sin, cos], dim=1)])
    for weight in (attention.self.value.weight, attention.output.dense.weight):
        weight.normal_(std=weight.shape[1] ** -0.5)  # keeps the size of what the heads bring


def _gpt2(tokenizer: GPT2TokenizerFast, settings: Settings) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        n_positions=settings.window,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own function, in one kernel
        initializer_range=0.05,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return GPT2LMHeadModel(config)


def _train(
    model: Any,
    stream: Tensor,
    loss: Callable[[Tensor, torch.Generator], Tensor],
    schedule: Schedule,
    settings: Settings,
    tick: Tick,
) -> None:
    """AdamW on `loss(ids, generator)`, ids (batch, window) from random places of `stream` (tokens,)."""
    generator = torch.Generator().manual_seed(settings.seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=schedule.rate, betas=(0.9, 0.98), fused=True)
    warmup = max(1, schedule.steps // 10)
    model.train()
    for step in range(schedule.steps):
        cooled = max(0, step - warmup) / max(1, schedule.steps - warmup)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate * min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * cooled)) / 2
        starts = torch.randint(len(stream) - settings.window, (schedule.batch, 1), generator=generator)
        optimizer.zero_grad()
        loss(stream[starts + torch.arange(settings.window)], generator).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tick(step + 1)
    model.eval()


def _choose(ids: Tensor, special: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Which of `ids` (windows, window) to mask: bool, the same number in each window, never special tokens."""
    maskable = ~torch.isin(ids, special)
    score = torch.rand(ids.shape, generator=generator) + maskable
    best = score.topk(max(1, round(fraction * ids.shape[1])), dim=1).indices
    return torch.zeros_like(maskable).scatter_(1, best, True) & maskable


def _windows(encoded: list[list[int]], model: Any, tokenizer: Any, window: int, max_tokens: int) -> Tensor:
    """The token ids of all texts, one after the other, cut into (windows, window)."""
    longest = getattr(model.config, "max_position_embeddings", None) or window
    window = min(window, longest, tokenizer.model_max_length)
    ids = torch.tensor([i for text in encoded for i in text][:max_tokens])
    if len(ids) < window:
        raise InputError(
            f"the texts give {len(ids)} tokens, fewer than the {window} of a window", hint="give more text"
        )
    return ids[: len(ids) // window * window].view(-1, window)


@torch.no_grad()
def _perplexity(model: Any, windows: Tensor, loss: Callable[[Tensor], Tensor]) -> float:
    """exp of the mean of what `loss` gives, over all windows, in evaluation mode."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        losses = torch.cat([loss(part.to(device)).double().cpu() for part in windows.split(16)])
    finally:
        model.train(training)
    return math.exp(losses.mean())


def _cached(directory: Path, settings: Settings) -> DemoModels | None:
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
        raise InputError(f"{directory}: exists and is not a directory", hint="choose another --cache")
    present = {entry.name for entry in directory.iterdir()} if directory.exists() else set()
    if foreign := present - {"bert", "gpt2", "held_out.txt", "demo.json"}:
        raise InputError(
            f"{directory}: holds {sorted(foreign)[0]}, which the demo models would replace",
            hint="choose another --cache",
        )
