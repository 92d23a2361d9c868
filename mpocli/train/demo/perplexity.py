"""Perplexity of a language model on texts, causal and masked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mpocli.errors import InputError


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
        chosen = choose_masked(ids.cpu(), special, fraction, generator).to(ids.device)
        masked = ids.masked_fill(chosen, tokenizer.mask_token_id)
        logits = model(input_ids=masked, attention_mask=torch.ones_like(ids)).logits[chosen]
        return functional.cross_entropy(logits.float(), ids[chosen], reduction="none")

    return _perplexity(model, windows, loss)


def choose_masked(ids: Tensor, special: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
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
