"""In which norm the error of each matrix counts: by what its inputs are, and by what its outputs do to the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpocli.config.budget import Budget
from mpocli.hf.activations import Batch
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.loading import load_as_saved
from mpocli.hf.moments import Moments, Store, collect
from mpocli.hf.probe import Probe
from mpocli.hf.weight import Weight
from mpocli.methods.data.calibration import fed
from mpocli.mpo.gram import FLOOR, regularised
from mpocli.progress import StepProgress

# With weights on both sides, errors find the directions that count least in both, where the errors of other layers
# arrive and what follows is no longer quadratic: that much of both matrices is replaced by the identity. Without it
# a GPT-2 of which every matrix has a tenth of its parameters has several times the perplexity, at lower errors.
_ROBUST = 0.3


@dataclass(frozen=True, eq=False)
class Norm:
    """tr(H D G Dᵀ) times `scale`; `inputs` makes the G of the reported error. None is the identity."""

    gram: Tensor | None = None
    output: Tensor | None = None
    scale: float = 1.0
    inputs: Callable[[], Tensor | None] = lambda: None
    unmeasured: str = ""  # why nothing is known of this matrix

    @cached_property
    def input_gram(self) -> Tensor | None:
        """Made when it is asked for: the plan is made in another norm."""
        return self.inputs()


class Norms:
    """The norm of every weight: none without calibration data, else from the moments of a streaming pass."""

    def __init__(self, budget: Budget, store: Store | None, weights: Sequence[Weight]) -> None:
        self.budget, self.store = budget, store
        tokens = [store.tokens(member.name) for weight in weights for member in weight.members] if store else []
        self.most_tokens = max(tokens, default=1)

    def of(self, weight: Weight) -> Norm:
        """Reads what it needs from disk."""
        if self.store is None:
            return Norm()
        vocabulary = weight.shape[0]
        gram: Tensor | None = None
        for member in weight.members:
            if member.name not in self.store:
                continue
            moments = self.store[member.name]
            if self.without_outputs:
                if member.kind != "embedding":
                    return self._of_layer(moments, weight)
                continue
            if member.kind == "embedding":
                part = self._of_table(moments, vocabulary, member.scale)
            elif len(weight.members) > 1:  # the head of a tied pair: all its outputs count the same
                part = self._of_head(moments, vocabulary)
            else:
                return self._of_layer(moments, weight)
            if part is not None:
                gram = part if gram is None else gram + part
        if gram is None:
            reached = any(member.name in self.store for member in weight.members)
            if reached and self.without_outputs:
                return Norm()
            why = "the loss does not depend on it" if reached else "no calibration token reaches it"
            return Norm(unmeasured=why)
        tokens = self.most_tokens
        return Norm(regularised(gram * tokens, tokens, least=self.robust, name=weight.name), None, 0.5)

    def _of_layer(self, moments: Moments, weight: Weight) -> Norm:
        assert moments.gram is not None

        second, tokens = moments.gram, moments.tokens

        def gram(least: float = FLOOR) -> Tensor:
            return regularised(second, tokens, least=least, name=weight.name)

        if moments.output_trace is None:
            plain = gram()
            return Norm(plain, None, 1.0, lambda: plain)
        if moments.output_trace == 0.0:
            return Norm(inputs=gram, unmeasured="the loss does not depend on it")
        share = 0.5 * moments.tokens / self.most_tokens
        if moments.output is None:
            mean = moments.output_trace / moments.tokens / weight.shape[0]
            return Norm(gram(self.robust), None, share * mean, gram)
        output = regularised(moments.output, moments.tokens, least=self.robust, name=weight.name)
        return Norm(gram(self.robust), output, share, gram)

    @property
    def without_outputs(self) -> bool:
        """Whether errors are judged by inputs alone."""
        return not self.budget.probes

    @property
    def robust(self) -> float:
        """The least part of a Gram matrix that is replaced by the identity."""
        return FLOOR if self.without_outputs else _ROBUST

    def _of_table(self, moments: Moments, vocabulary: int, scale: float) -> Tensor | None:
        """Rows of the vocabulary count the same: calibration text has seen too few of them to know better.

        `scale` is what the embedding multiplies its rows by, after the table and before the gradients.
        """
        if moments.output is None:
            return None
        return moments.output.double() * (scale**2 / (self.most_tokens * vocabulary))

    def _of_head(self, moments: Moments, vocabulary: int) -> Tensor | None:
        if moments.output_trace is None or moments.gram is None:
            return None
        return moments.gram.double() * (moments.output_trace / moments.tokens / vocabulary / self.most_tokens)


def measure(
    checkpoint: Checkpoint,
    budget: Budget,
    weights: Sequence[Weight],
    batches: Sequence[Batch],
    folder: Path,
    device: torch.device,
    seed: int,
    progress: StepProgress | None = None,
) -> tuple[Norms, Any]:
    """The norms of the chosen weights, and the model in evaluation mode, in float32.

    Raises what `collect` raises.
    """
    model = load_as_saved(checkpoint).to(device)
    names = [member.name for weight in weights for member in weight.members if _is_layer(model, member.name)]
    probe = Probe(seed) if budget.probes else None
    batches = fed(batches, model)
    store = collect(model, batches, names, folder, probe=probe, progress=progress)
    return Norms(budget, store, weights), model


def _is_layer(model: Any, name: str) -> bool:
    try:
        return getattr(model.get_submodule(name), "weight", None) is not None
    except AttributeError:
        return False
