"""What a sparse model's masks are learnt from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from mpocli.config.bounds import at_least, finite
from mpocli.config.modes import needs
from mpocli.config.option import Option
from mpocli.config.page import PST

LEARNT = needs("--method pst", why="it learns no such thing")
TRAINED = needs("--train", why="nothing is trained")


@dataclass(frozen=True)
class Scoring:
    """What a mask is made from (PST, IJCAI 2022, §3): S = |W′| + α₁ A B + α₂ (R 1ᵀ + 1 Cᵀ) + F.

    `rank` of U V (0: none, the weight itself is trained), `score_rank` of A B, `structured` for R and C, `full` for F;
    `magnitude` says whether |W′| counts, and `attached` whether gradients pass to it.
    """

    rank: Annotated[
        int, Option("--weight-rank", "Of the update U V; 0: W itself.", "N", PST, check=at_least(0)), LEARNT, TRAINED
    ] = 8
    score_rank: Annotated[
        int, Option("--mask-rank", "Of the score A B; 0: none.", "N", PST, check=at_least(0)), LEARNT, TRAINED
    ] = 8
    beta: Annotated[float, Option("--weight-beta", "Scale of U V.", "X", PST, check=finite), LEARNT, TRAINED] = 1.0
    alpha1: Annotated[float, Option("--mask-alpha1", "Scale of A B.", "X", PST, check=finite), LEARNT, TRAINED] = 1.0
    alpha2: Annotated[
        float, Option("--mask-alpha2", "Scale of R + C; 0: none.", "X", PST, check=finite), LEARNT, TRAINED
    ] = 1.0
    structured: bool = True
    full: bool = False
    magnitude: bool = True
    attached: Annotated[
        bool, Option("--detach-magnitude", "No gradient through |W|.", panel=PST, negated=True), LEARNT, TRAINED
    ] = True

    @classmethod
    def from_options(cls, **given: Any) -> Scoring:
        return cls(**given, structured=given["alpha2"] != 0)

    @classmethod
    def of(cls, method: str) -> Scoring:
        """`pst` with its published defaults, `magnitude` and `movement` as baselines that train the weight itself."""
        if method == "magnitude":
            return cls(rank=0, score_rank=0, structured=False, attached=False)
        if method == "movement":
            return cls(rank=0, score_rank=0, structured=False, full=True, magnitude=False, attached=False)
        return cls()

    def recorded(self) -> dict[str, Any]:
        """All of it, for the manifest."""
        return asdict(self)
