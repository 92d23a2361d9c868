"""How much the loss depends on a matrix: by zeroing it, or by gradients that training computes anyway."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from mpocli.nn.evaluating import evaluating


@torch.no_grad()
def zeroed_losses(loss: Callable[[], float], weights: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """I_W = |L − L_{W=0}| for each weight (OPF, ACL 2023, Eq. 6). `loss` is called once more than there are weights;
    every weight is as before in the end."""
    whole = loss()
    scores = {}
    for name, weight in weights.items():
        kept = weight.detach().clone()
        weight.zero_()
        scores[name] = abs(whole - loss())
        weight.copy_(kept)
    return scores


def mean_loss(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """The mean of the model's own loss over some batches, without dropout."""
    with evaluating(model):
        losses = [float(model(**batch)["loss"]) for batch in batches]
    return sum(losses) / len(losses)


class GradientScores(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Adds up I_W = Σ_steps |⟨∂L/∂W, W⟩|, the first-order estimate of what zeroing W changes (OPF, Eq. 7).

    Of each step the inner product over the whole matrix, then its absolute value: with Σ|g∘W| every element would
    count as if it were zeroed alone. The gradients are those of the step that is taken: no pass is added.
    """

    def __init__(self, names: Sequence[str], scores: Mapping[str, float]) -> None:
        self.names = names
        self.sums: dict[str, Tensor] = {name: torch.tensor(scores.get(name, 0.0)) for name in names}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        held = dict(getattr(model, "module", model).named_parameters())
        for name in self.names:
            gradient = held[name].grad
            if gradient is not None:
                product = (gradient.detach() * held[name].detach()).sum().abs()
                self.sums[name] = self.sums[name].to(product.device) + product

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}) if state.global_step else {}
        self.sums |= {name: torch.tensor(value) for name, value in saved.items()}

    def state(self) -> dict[str, Any]:
        """The scores so far, for the checkpoint that an interrupt leaves."""
        return {"args": {}, "attributes": self.scores}

    @property
    def scores(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.sums.items()}
