"""Which tokens go to which experts, with what weight, and what an uneven load costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpocli.config.routing import RouterOptions
from mpocli.errors import InputError
from mpocli.nn.padding import spread

_SWITCH = RouterOptions()


@dataclass(frozen=True, eq=False)
class Routing:
    """Where T tokens go. A slot is one choice of one token, number token·k + choice.

    `experts`, `gates` (float32, with the router's gradient) and `kept` are (T, k); a gate is zero where the choice was
    dropped. `order` (S,) lists the kept slots expert by expert, `routed` the experts that have any, and `counts` how
    many each of these has: what groups tokens without a loop over them. A compiled graph has no such groups.
    """

    experts: Tensor
    gates: Tensor
    kept: Tensor
    order: Tensor
    routed: list[int]
    counts: list[int]

    @property
    def k(self) -> int:
        return self.experts.shape[1]

    @property
    def tokens(self) -> Tensor:
        """(S,) the token of each slot in `order`."""
        return self.order // self.k if self.k > 1 else self.order


@dataclass(eq=False)
class Shared:
    """What the routers of one model, or of one of its stacks, share during a forward pass: which tokens are padding,
    and their losses.

    Whoever owns the model calls `begin` before a forward pass and `end` after it. Gradient checkpointing routes again
    in the backward pass, after `end`: then the mask is still there, and neither losses nor statistics are counted
    twice.
    """

    mask: Tensor | None = None
    losses: list[Tensor] = field(default_factory=list)
    collecting: bool = False
    length_first: bool = False

    def begin(self, mask: Tensor | None = None) -> None:
        """`mask` (B, L), as long as this pass's inputs: zero or False where a token is padding. The model's layers
        may have them as (L, B), with `length_first`."""
        self.mask, self.losses, self.collecting = mask, [], True

    def end(self) -> Tensor | None:
        """The sum of the routers' losses, None where there is none (evaluation, both factors zero)."""
        losses, self.losses, self.collecting = self.losses, [], False
        # Layers may lie on several devices.
        return torch.stack([loss.to(losses[0].device) for loss in losses]).sum() if losses else None

    def __getstate__(self) -> dict[str, Any]:
        # The rest is of a pass, not of a model.
        return {"mask": None, "losses": [], "collecting": False, "length_first": self.length_first}


@dataclass(eq=False)
class Statistics:
    """Added up over forward passes, padding left out. Tensors, so that a pass does not wait for the device."""

    tokens: Tensor | None = None  # how many
    choices: Tensor | None = None  # (n,) choices of each expert, dropped ones too
    dropped: Tensor | None = None  # how many choices
    entropy: Tensor | None = None  # Σ over tokens of −Σ p ln p

    def add(self, tokens: Tensor, choices: Tensor, dropped: Tensor, entropy: Tensor) -> None:
        new = {"tokens": tokens, "choices": choices, "dropped": dropped, "entropy": entropy}
        for name, value in new.items():
            old = getattr(self, name)
            setattr(self, name, value if old is None else old.to(value.device) + value)

    def report(self) -> dict[str, Any]:
        """`tokens`; `load`, each expert's share of the choices; the router's mean `entropy_nats`; the share of choices
        `dropped`. Empty where no token was seen."""
        if self.tokens is None or self.choices is None or self.dropped is None or self.entropy is None:
            return {}
        tokens, choices = int(self.tokens), self.choices.tolist()
        if not tokens:
            return {}
        return {
            "tokens": tokens,
            "load": [choice / sum(choices) for choice in choices],
            "entropy_nats": float(self.entropy) / tokens,
            "dropped": int(self.dropped) / sum(choices),
        }


class Router(nn.Module):
    """p = softmax(W x + b) over n experts, in float32, and the k largest of each token.

    k = 1: the gate is p/stopgrad(p) = 1, which leaves the expert's output as it is and gives the router its gradient
    (MPOE's released code has it on the expert's input), or p with `scale_by_prob` (Switch, Fedus et al. 2021, Eq. 2).
    k ≥ 2: the k probabilities, renormalised to sum 1.

    One router serves all linear layers of a feed-forward network: its first ones call it with the same
    tensor, its last one calls `take`.
    """

    def __init__(
        self,
        features: int,
        experts: int,
        options: RouterOptions = _SWITCH,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= options.top_k <= experts:
            raise InputError(f"{options.top_k} experts a token of {experts}", hint="at most as many as there are")
        self.features, self.experts, self.options = features, experts, options
        self.weight = nn.Parameter(torch.empty(experts, features, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(experts, dtype=dtype, device=device))
        nn.init.normal_(self.weight, std=0.02, generator=generator)
        self.shared: Shared | None = None
        self.statistics = Statistics()
        # Between a network's first layer and its last one.
        self._input: Tensor | None = None
        self._routing: Routing | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_input": None, "_routing": None}

    def forward(self, x: Tensor) -> Routing:
        """The routing of x (…, features), kept for `take`; of the same tensor again, the same object."""
        if self._routing is None or self._input is not x:
            # Nothing of an earlier pass is alive while this one computes.
            self._input = self._routing = None
            with torch.autocast(x.device.type, enabled=False):
                self._routing = self._route(x)
            self._input = x
        return self._routing

    def take(self) -> Routing:
        """The routing for a network's last layer. It is handed out once, so that nothing outlives the pass."""
        routing, self._input, self._routing = self._routing, None, None
        if routing is None:
            raise RuntimeError("the last layer of a network of experts was called before its first one")
        return routing

    def _route(self, x: Tensor) -> Routing:
        tokens, real = x.reshape(-1, self.features).float(), self._real(x)
        if self.training and self.options.jitter:
            tokens = tokens * torch.empty_like(tokens).uniform_(1 - self.options.jitter, 1 + self.options.jitter)
        logits = F.linear(tokens, self.weight.float(), self.bias.float())
        probabilities = logits.softmax(-1)  # (T, n)
        top, experts = probabilities.topk(self.options.top_k, dim=-1)
        if self.options.top_k > 1:
            gates = top / top.sum(-1, keepdim=True)
        else:
            gates = top if self.options.scale_by_prob else top / top.detach()
        kept = torch.ones_like(experts, dtype=torch.bool)
        if self.options.capacity_factor is not None:
            kept = within_capacity(experts, real, self.experts, self.options.capacity_factor)
            gates = gates * kept
        self._account(logits, probabilities, experts, kept, real)
        slots = experts.reshape(-1)
        if torch.compiler.is_compiling():  # how many tokens an expert has is nothing that a graph can know
            return Routing(experts, gates, kept, slots, [], [])
        order = slots.argsort(stable=True)
        if self.options.capacity_factor is not None:
            order = order[kept.reshape(-1)[order]]
        counts = torch.bincount(slots[order], minlength=self.experts).tolist()
        routed = [expert for expert, count in enumerate(counts) if count]
        return Routing(experts, gates, kept, order, routed, [counts[expert] for expert in routed])

    def _real(self, x: Tensor) -> Tensor:
        """(T,) False where a token is padding."""
        if self.shared is None or self.shared.mask is None:
            return torch.ones(math.prod(x.shape[:-1]), dtype=torch.bool, device=x.device)
        mask = self.shared.mask
        real = spread(mask, x.shape[:-1], length_first=self.shared.length_first)
        if real is None:
            raise InputError(
                f"a padding mask of {tuple(mask.shape)} for a router's input of {tuple(x.shape)}",
                hint="one entry for each token of this pass; chunk_size_feed_forward must be 0",
            )
        return real.reshape(-1).to(x.device)

    def _account(self, logits: Tensor, probabilities: Tensor, experts: Tensor, kept: Tensor, real: Tensor) -> None:
        """Put down losses and statistics."""
        # (n,), dropped choices too
        choices = (F.one_hot(experts, self.experts) * real[:, None, None]).sum((0, 1))
        collecting = self.shared is None or self.shared.collecting
        if collecting and not torch.compiler.is_exporting():  # an exported graph keeps no account
            with torch.no_grad():
                entropy = torch.special.entr(probabilities).sum(-1)
                self.statistics.add(
                    real.sum(), choices, (~kept & real[:, None]).sum(), (entropy * real).sum(dtype=torch.float32)
                )
        options = self.options
        if self.shared is None or not (options.balance_loss or options.z_loss):
            return
        # A recomputation in the backward pass must run the same operations, whether or not their result is wanted.
        if self.training and torch.is_grad_enabled():
            loss = options.balance_loss * balance_loss(probabilities, choices, real)
            if options.z_loss:
                loss = loss + options.z_loss * z_loss(logits, real)
            if collecting:
                self.shared.losses.append(loss)

    def extra_repr(self) -> str:
        return f"{self.features} to {self.options.top_k} of {self.experts}, {self.options}"


def within_capacity(experts: Tensor, real: Tensor, count: int, factor: float) -> Tensor:
    """(T, k) booleans: which choices find a place at their expert, of ⌈factor·k·real tokens/count⌉ each.

    First choices come before second ones, and earlier tokens before later ones. Padding takes no place and is never
    dropped.

    >>> experts = torch.tensor([[1], [1], [1], [0]])
    >>> within_capacity(experts, torch.ones(4, dtype=torch.bool), 2, 1.0).squeeze(1)
    tensor([ True,  True, False,  True])
    """
    tokens, k = experts.shape
    real_tokens = real.sum() if torch.compiler.is_compiling() else int(real.sum())
    capacity = _ceil(factor * k * real_tokens / count)
    chosen = F.one_hot(experts.T.reshape(-1), count) * real.repeat(k)[:, None]  # (k·T, n), choice by choice
    place = (chosen.cumsum(0) * chosen).sum(-1)  # counted from 1; 0 for padding
    return (place <= capacity).reshape(k, tokens).T


def _ceil(value: float | Tensor) -> int | Tensor:
    """⌈value⌉ where 1.1·10 = 11.000000000000002 means 11."""
    if isinstance(value, Tensor):  # in float32, which is what dividing integers gives
        return torch.ceil(value - 1e-6 * value)
    return math.ceil(value - 1e-9 * abs(value))


def balance_loss(probabilities: Tensor, choices: Tensor, real: Tensor) -> Tensor:
    """n Σ_i f_i P_i (Switch, Fedus et al. 2021, Eq. 4-6, without α): 1 where all experts are used alike, at most n.

    f_i = share of the `choices` (n,) that went to expert i, all k of a token counted; P_i = mean of the
    `probabilities` (T, n) of the `real` (T,) tokens. The gradient is that of P.

    >>> float(balance_loss(torch.tensor([[0.75, 0.25]]), torch.tensor([1, 0]), torch.tensor([True])))
    1.5
    """
    share = choices / choices.sum().clamp_min(1)
    mean = (probabilities * real[:, None]).sum(0) / real.sum().clamp_min(1)
    return probabilities.shape[1] * (share * mean).sum()


def z_loss(logits: Tensor, real: Tensor) -> Tensor:
    """Mean of (ln Σ_i e^{logit_i})² over the `real` tokens (ST-MoE, Zoph et al. 2022, Eq. 5).

    >>> round(float(z_loss(torch.zeros(3, 2), torch.ones(3, dtype=torch.bool))), 6) == round(math.log(2) ** 2, 6)
    True
    """
    return (logits.logsumexp(-1).square() * real).sum() / real.sum().clamp_min(1)
