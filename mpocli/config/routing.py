"""How a mixture of experts routes its tokens, and what training adds for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

from mpocli.config import bounds
from mpocli.config.bounds import finite
from mpocli.config.modes import ALWAYS, Condition, excludes
from mpocli.config.option import Declared, Option, members
from mpocli.config.page import ROUTER, SHARED
from mpocli.errors import InputError, UsageError

DEFAULT_MASK = 0.5
_SHARED = excludes("--baseline-moe", "--share none", why="there is no shared core to mask")
_CERTAIN = Condition("--mask-prob", test=lambda share: share is not None and float(share) in (0, 1))


@dataclass(frozen=True)
class RouterOptions:
    """How tokens are routed and what training adds for it.

    `switch` takes one expert a token, `topk` takes `top_k`. `capacity_factor` F drops what exceeds
    ⌈F·k·tokens/experts⌉ at an expert, None drops nothing. `jitter` multiplies the router's input by 1 ± jitter in
    training. `scale_by_prob` scales a single expert's output by its probability (Switch's own way, which changes the
    start). `balance_loss` and `z_loss` are factors in the training loss.
    """

    kind: Annotated[
        Literal["switch", "topk"], Option("--router", "switch: one expert a token; topk.", "HOW", ROUTER), ALWAYS
    ] = "switch"
    top_k: Annotated[
        int,
        Option("--top-k", "Experts a token. Default: 1, topk: 2.", "K", ROUTER, check=bounds.at_least(1), default=None),
        ALWAYS,
    ] = 1
    capacity_factor: Annotated[
        float | None,
        Option("--capacity-factor", "Drop beyond F·K·tokens/N an expert.", "F", ROUTER, check=finite),
        ALWAYS,
    ] = None
    jitter: Annotated[
        float, Option("--jitter", "Router inputs × 1 ± X in training.", "X", ROUTER, check=finite, share=True), ALWAYS
    ] = 0.0
    scale_by_prob: Annotated[
        bool, Option("--scale-by-prob", "Scale outputs by p: another start.", panel=ROUTER), ALWAYS
    ] = False
    balance_loss: Annotated[
        float, Option("--balance-loss", "Times Switch's loss.", "X", SHARED, check=finite), ALWAYS
    ] = 0.01
    z_loss: Annotated[float, Option("--z-loss", "Times the router's z-loss.", "X", SHARED, check=finite), ALWAYS] = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("switch", "topk"):
            raise InputError(f"kind {self.kind!r}: no such router", hint="switch or topk")
        if self.top_k < 1 or (self.kind == "switch" and self.top_k > 1):
            most = "one expert" if self.kind == "switch" else "one expert or more"
            raise InputError(
                f"top_k {self.top_k}: a {self.kind} router sends a token to {most}", hint="topk takes more"
            )
        if self.scale_by_prob and self.top_k > 1:
            raise InputError(
                f"scale_by_prob with top_k {self.top_k}: it is for one expert a token",
                hint="the gates of several sum to 1",
            )
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise InputError(f"capacity_factor {self.capacity_factor}", hint="above 0, or none to drop no token")
        if not 0 <= self.jitter < 1:
            raise InputError(f"jitter {self.jitter}", hint="at least 0, less than 1")
        for name in ("balance_loss", "z_loss"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} {getattr(self, name)}", hint="at least 0")

    @classmethod
    def from_options(cls, top_k: int | None, **given: Any) -> RouterOptions:
        """`UsageError` for what cannot be meant, in the words of the command line."""
        try:
            return cls(top_k=top_k or (2 if given["kind"] == "topk" else 1), **given)
        except InputError as error:
            message = error.message
            for member in members(cls):
                assert isinstance(member, Declared)
                message = re.sub(rf"\b{member.field}\b", member.option.name, message)
            raise UsageError(message, hint=error.hint) from error


@dataclass(frozen=True)
class RoutingConfig:
    """What `config.json` says of routing: the router's options, and the gradient mask of training.

    `mask_prob` = probability that a step's update of a shared central core is discarded (MPOE §3.2), drawn once for
    each core, or for each of its elements with `mask_elements`. `length_first` says that the model's layers have their
    tokens as (length, batch).
    """

    router: RouterOptions
    mask_prob: Annotated[
        float,
        Option(
            "--mask-prob",
            "Discard a shared core's update; 1 freezes. Default: 0.5.",
            "P",
            SHARED,
            check=bounds.share,
            default=None,
            share=True,
        ),
        _SHARED,
    ] = DEFAULT_MASK
    mask_elements: Annotated[
        bool,
        Option("--mask-elements", "Draw for every element.", panel=SHARED),
        _SHARED,
        excludes(_CERTAIN, why="nothing is drawn"),
    ] = False
    length_first: bool = False

    @classmethod
    def from_options(cls, mask_prob: float | None, **given: Any) -> RoutingConfig:
        return cls(mask_prob=DEFAULT_MASK if mask_prob is None else mask_prob, **given)

    def to_dict(self) -> dict[str, Any]:
        made = {**asdict(self.router), "mask_prob": self.mask_prob, "mask_elements": self.mask_elements}
        return made | ({"length_first": True} if self.length_first else {})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RoutingConfig:
        """Raises `InputError` for options that this mpocli does not know or that cannot be meant."""
        if not isinstance(data, Mapping):
            raise InputError("config.json: its `routing` is no JSON object", hint="restore the file")
        known = {field.name for field in fields(RouterOptions)}
        try:
            router = RouterOptions(**{name: value for name, value in data.items() if name in known})
            rest = {name: value for name, value in data.items() if name not in known}
            return cls(router, **rest)
        except TypeError as error:
            raise InputError(f"config.json: routing {dict(data)} cannot be read", hint="update mpocli") from error
