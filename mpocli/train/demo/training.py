"""The training of the demo models, side by side."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mpocli.progress import StageProgress
from mpocli.train.demo.architectures import new_bert, new_gpt2
from mpocli.train.demo.perplexity import choose_masked, evaluate_causal, evaluate_masked
from mpocli.train.demo.settings import Hyperparameters, Settings
from mpocli.train.demo.tokenizers import bytepair_tokenizer, wordpiece_tokenizer

_Tick = Callable[[int], None]  # told the number of steps done; raises to stop


def train_models(
    work: Path, texts: list[str], held_out: list[str], settings: Settings, report: StageProgress
) -> dict[str, Any]:
    """Train and save the tokenizers and the models. Returns what `demo.json` says of them."""
    stage = "training the tokenizers"
    report(stage, 0, 2)
    wordpiece = wordpiece_tokenizer(texts, settings)
    report(stage, 1, 2)
    bytepair = bytepair_tokenizer(texts, settings)
    report(stage, 2, 2)

    # Only the CPU's generator is forked and seeded: torch.manual_seed would reach the caller's GPUs too.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(settings.seed)
        bert, gpt2 = new_bert(wordpiece, settings), new_gpt2(bytepair, settings)
    special = torch.tensor(wordpiece.all_special_ids)
    bert_ids = torch.tensor([i for ids in wordpiece(texts, verbose=False)["input_ids"] for i in ids])
    gpt2_texts = bytepair(texts, verbose=False)["input_ids"]
    gpt2_ids = torch.tensor([i for ids in gpt2_texts for i in [bytepair.eos_token_id, *ids]])

    def masked_loss(ids: Tensor, generator: torch.Generator) -> Tensor:
        chosen = choose_masked(ids, special, settings.bert_mask, generator)
        hidden = bert.bert(ids.masked_fill(chosen, wordpiece.mask_token_id)).last_hidden_state
        return functional.cross_entropy(bert.cls(hidden[chosen]), ids[chosen])

    def causal_loss(ids: Tensor, generator: torch.Generator) -> Tensor:
        logits = gpt2(ids, use_cache=False).logits[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def train_bert(tick: _Tick) -> float:
        _train(bert, bert_ids, masked_loss, settings.bert, settings, tick)
        return evaluate_masked(bert, wordpiece, held_out)

    def train_gpt2(tick: _Tick) -> float:
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


def _side_by_side(jobs: list[tuple[str, int, Callable[[_Tick], float]]], report: StageProgress) -> list[float]:
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


def _train(
    model: Any,
    stream: Tensor,
    loss: Callable[[Tensor, torch.Generator], Tensor],
    chosen: Hyperparameters,
    settings: Settings,
    tick: _Tick,
) -> None:
    """AdamW on `loss(ids, generator)`, ids (batch, window) from random places of `stream` (tokens,)."""
    generator = torch.Generator().manual_seed(settings.seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=chosen.rate, betas=(0.9, 0.98), fused=True)
    warmup = max(1, chosen.steps // 10)
    model.train()
    for step in range(chosen.steps):
        cooled = max(0, step - warmup) / max(1, chosen.steps - warmup)
        for group in optimizer.param_groups:
            group["lr"] = chosen.rate * min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * cooled)) / 2
        starts = torch.randint(len(stream) - settings.window, (chosen.batch, 1), generator=generator)
        optimizer.zero_grad()
        loss(stream[starts + torch.arange(settings.window)], generator).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tick(step + 1)
    model.eval()
