"""Options of `mpocli decompose`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from mpocli.config import bounds, common
from mpocli.config.bounds import at_least
from mpocli.config.budget import BUDGETS, Budget
from mpocli.config.modes import ALWAYS, OF_DENSE, Without, excludes, needs, of_role
from mpocli.config.option import Option, recorded
from mpocli.config.page import SIZE, WHICH

# Fields that say how far bonds are truncated: a plan has a budget instead.
TRUNCATION = (
    *("trunc", "emb_trunc", "attention_trunc", "ffn_trunc", "pooler_trunc", "rel_tol"),
    "when_larger",
)
_UNPLANNED = excludes(*BUDGETS, why="the planner chooses shapes and bonds")
_WHICH = {"panel": WHICH}


@dataclass(frozen=True)
class DecomposeConfig:
    """Options of `mpocli decompose`; `trunc` and its kin cap bond dimensions, None everywhere is lossless."""

    trunc: Annotated[
        int | None,
        Option("--trunc", "Cap on every bond dimension. Default: none, lossless.", "N", SIZE, check=at_least(1)),
        _UNPLANNED,
    ] = None
    emb_trunc: Annotated[
        int | None,
        Option("--emb-trunc", "The cap of embeddings.", "N", SIZE, check=at_least(1)),
        _UNPLANNED,
        of_role("embedding"),
    ] = None
    attention_trunc: Annotated[
        int | None,
        Option("--attention-trunc", "Of attention.", "N", SIZE, check=at_least(1)),
        _UNPLANNED,
        of_role("attention"),
    ] = None
    ffn_trunc: Annotated[
        int | None,
        Option("--ffn-trunc", "Of feed-forward layers.", "N", SIZE, check=at_least(1)),
        _UNPLANNED,
        of_role("ffn"),
    ] = None
    pooler_trunc: Annotated[
        int | None,
        Option("--pooler-trunc", "Of the pooler.", "N", SIZE, check=at_least(1)),
        _UNPLANNED,
        of_role("pooler"),
    ] = None
    rel_tol: Annotated[
        float | None,
        Option(
            "--rel-tol",
            "Largest relative Frobenius error of each matrix, before rounding to the stored dtype; a cap wins over it.",
            "X",
            SIZE,
            check=bounds.below_one,
            share=True,
        ),
        _UNPLANNED,
    ] = None
    budget: Budget | None = None
    sites: Annotated[
        common.Sites,
        _WHICH,
        OF_DENSE,
        needs(
            "--shapes paper",
            Without(BUDGETS),
            why="the planner chooses the shapes",
            hint="choose --shapes paper, or leave it out",
        ),
    ] = 5
    shapes: Annotated[
        common.SiteShapes,
        _WHICH,
        {
            "help": "Site dimensions, rows x columns, as '*query=3,4,4,4,4x4,4,4,4,3'. Repeatable.",
            "metavar": "GLOB=RxC",
        },
        OF_DENSE,
        _UNPLANNED,
    ] = ()
    layers: Annotated[
        common.Roles,
        _WHICH,
        {"help": "embedding, attention, ffn, pooler, head. Default: the first four.", "metavar": "ROLES"},
        ALWAYS,
    ] = None
    targets: Annotated[common.Targets, _WHICH, {"help": "Modules by name; '*' crosses dots. Repeatable."}] = ()
    ignore: Annotated[common.Ignored, _WHICH] = ()
    when_larger: Annotated[
        Literal["keep", "decompose"] | None,
        Option(
            "--when-larger",
            "A matrix whose MPO is larger than itself. Default: keep if anything is truncated, else decompose.",
            "keep|decompose",
            SIZE,
        ),
        OF_DENSE,
        _UNPLANNED,
    ] = None
    gauge: Annotated[
        Literal["canonical", "symmetric"],
        Option("--gauge", "Where the singular values sit in the cores.", "canonical|symmetric"),
        _UNPLANNED,
    ] = "canonical"
    dtype: common.StoredDType = None
    device: common.Device = "cpu"
    seed: Annotated[
        int,
        Option(
            "--seed",
            "Of the samples that are drawn; recorded in the manifest.",
            "N",
            recorded=False,
            check=bounds.seed(63),
        ),
        ALWAYS,
    ] = 0
    max_shard_bytes: common.ShardBytes = 5 * 10**9
    revision: common.Revision = None
    trust_remote_code: Annotated[common.TrustRemoteCode, {"recorded": True}] = False

    @classmethod
    def from_options(cls, budget: Budget | None, **given: Any) -> DecomposeConfig:
        if budget is not None and budget.data is not None:
            budget = replace(budget, data=replace(budget.data, seed=given["seed"]))
        return cls(budget=budget, **given)

    def cap(self, role: str | None) -> int | None:
        """The cap on the bonds of a matrix of this role."""
        own = {
            "embedding": self.emb_trunc,
            "attention": self.attention_trunc,
            "ffn": self.ffn_trunc,
            "pooler": self.pooler_trunc,
        }.get(role or "")
        return self.trunc if own is None else own

    @property
    def counts_bytes(self) -> bool:
        """Whether a plan is made for bytes, of a part of the matrices or with bits in it."""
        return self.budget is not None and (self.budget.bits is not None or self.budget.ratio_bytes is not None)

    @property
    def truncates(self) -> bool:
        caps = (self.trunc, self.emb_trunc, self.attention_trunc, self.ffn_trunc, self.pooler_trunc)
        return any(cap is not None for cap in caps) or bool(self.rel_tol)

    @property
    def keeps_larger(self) -> bool:
        """Whether a matrix whose MPO would be larger stays dense: by default where anything is truncated."""
        return self.truncates if self.when_larger is None else self.when_larger == "keep"

    def recorded(self) -> dict[str, Any]:
        """The options for the manifest: no machine-dependent ones."""
        return recorded(self, ("budget",)) | (self.budget.recorded() if self.budget else {})
