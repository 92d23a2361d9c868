"""A loss whose gradients say which outputs of a layer matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpocli.errors import InputError, NumericsError
from mpocli.hf.activations import Batch
from mpocli.hf.foreign import foreign
from mpocli.hf.padding import decoder_mask
from mpocli.nn.logits import drawn, slices


@dataclass(frozen=True)
class Probe:
    """A loss whose gradients say which outputs of a layer matter, with no labels needed.

    For logits: the negative log-likelihood of labels drawn from the model's own distribution, so that the second
    moments of gradients are the Fisher information, and a change D of a weight costs about ½ tr(H D G Dᵀ) of it in
    Kullback-Leibler divergence (K-FAC: Martens and Grosse 2015, §3). For a model without a head, or with a single
    output: inner products with standard normal vectors, whose gradients' second moments are the Gauss-Newton matrix
    of ½ the squared change of the output. Sums over tokens; padding does not count. Each sample draws from a seed of
    its own, so that the batches which samples come in change nothing.
    """

    seed: int = 0

    def backward(self, outputs: Any, batch: Batch, first: int) -> None:
        """Run the gradients of the loss back from a model's outputs on the samples `first` and following.

        Raises `NumericsError` for logits that are not finite.
        """
        logits = outputs.get("logits")
        if logits is not None and logits.shape[-1] > 1:
            gradient: Callable[[Tensor, Batch, Sequence[torch.Generator]], Tensor] = self._sampled
            found = [logits]
        else:
            gradient = self._projected
            found = [outputs[key] for key in ("logits", "last_hidden_state", "pooler_output") if key in outputs]
        if not found:
            found = [value for value in outputs.values() if isinstance(value, Tensor) and value.requires_grad]
        if not found:
            raise InputError("the model's outputs hold nothing to take gradients of", hint="try ‹weights› input")
        generators = [
            torch.Generator().manual_seed(self.seed * 1_000_003 + first + k) for k in range(samples_of(batch))
        ]
        gradients = [gradient(tensor, batch, generators) for tensor in found]
        with foreign("the model's own code gives no gradients", hint="try ‹weights› input"):
            torch.autograd.backward(found, gradients)

    @torch.no_grad()
    def _sampled(self, logits: Tensor, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        """softmax(z) − e_label: of a few tokens at a time, since a vocabulary's logits fill the memory."""
        made, mask = torch.zeros_like(logits), token_mask(batch, logits)
        for k, generator in enumerate(generators):
            rows, kept = logits[k].reshape(-1, logits.shape[-1]), made[k].view(-1, logits.shape[-1])
            places = torch.arange(len(rows), device=logits.device)
            places = places if mask is None else places[mask[k].reshape(-1)]
            for part in slices(len(places), logits.shape[-1]):
                gradient, labels = drawn(rows[places[part]], generator)
                if not bool(torch.isfinite(gradient).all()):
                    raise NumericsError("the model's logits are not finite", hint="run the model in float32")
                gradient[torch.arange(len(labels)), labels] -= 1.0
                kept[places[part]] = gradient.to(kept)
        return made

    @torch.no_grad()
    def _projected(self, tensor: Tensor, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        if not tensor.dim() or len(tensor) != len(generators):  # not one for each sample
            return torch.randn(tensor.shape, generator=generators[0]).to(tensor)
        made, mask = torch.zeros_like(tensor), token_mask(batch, tensor)
        for k, generator in enumerate(generators):
            places = ... if mask is None else mask[k]
            made[k][places] = torch.randn(made[k][places].shape, generator=generator).to(tensor)
        return made


def samples_of(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def token_mask(batch: Batch, tensor: Tensor) -> Tensor | None:
    """True for the vectors of an output that stand for tokens; None where all count."""
    for mask in (decoder_mask(batch, None), batch.get("attention_mask")):
        if mask is not None and mask.dim() == 2 and tensor.shape[:-1] == mask.shape:
            return mask.to(tensor.device) != 0
    return None
