"""Options of over-parameterised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from mpocli.config import common, text
from mpocli.config.bounds import at_least
from mpocli.config.modes import excludes, needs
from mpocli.config.option import Option, recorded
from mpocli.config.page import OVER
from mpocli.errors import UsageError

_EXPANDED = ("--overparam static", "--overparam dynamic", "--overparam svd")
_STATIC, _DYNAMIC = "--overparam static", "--overparam dynamic"


@dataclass(frozen=True)
class Overparam:
    """Options of `finetune --overparam`.

    `top_n` matrices of every group become MPOs (`svd`: all of them), `dynamic` in `splits` portions, one every
    `every` steps (default: so that the last comes half way). `sites` is the papers' m, `shapes` overrule it by glob.
    `static` scores a copy that was fine-tuned: `score_from` a directory, else for `score_steps` of the run's own steps
    (default: a quarter of them). Losses are means over `score_batches` batches of training data. `none` expands
    nothing, and raises the learning rate of what would be.
    """

    method: Annotated[
        Literal["static", "dynamic", "svd", "none"],
        Option(
            "--overparam",
            "static, dynamic or svd: matrices of a dense MODEL train as lossless MPOs and are folded back. "
            "none: they stay dense, and train at --mpo-lr.",
            "HOW",
            OVER,
        ),
        needs("--mpo-lr", of=("none",), why="nothing would differ from plain fine-tuning"),
    ]
    top_n: Annotated[
        int,
        Option("--top-n", "Matrices of each kind; svd takes all.", "N", OVER, check=at_least(1)),
        needs(_STATIC, _DYNAMIC),
    ] = 4
    splits: Annotated[
        int,
        Option("--splits", "dynamic: in so many portions. Default: 2.", "N", OVER, check=at_least(1), default=None),
        needs(_DYNAMIC),
    ] = 2
    every: Annotated[
        int | None,
        Option(
            "--every",
            "dynamic: one portion after so many. Default: the last half way.",
            "STEPS",
            OVER,
            check=at_least(1),
        ),
        needs(_DYNAMIC),
    ] = None
    sites: Annotated[
        common.Sites,
        {"help": "First and last split it, 1×1 between.", "panel": OVER},
        needs(_STATIC, _DYNAMIC),
    ] = 5
    layers: Annotated[
        tuple[str, ...],
        Option("--layers", "Of which roles.", "ROLE,…", OVER, parse=text.roles, default="attention,ffn"),
        needs("--overparam"),
    ] = ("attention", "ffn")
    score_from: Annotated[
        str | None,
        Option("--score-from", "static: fine-tuned on this task, to be scored.", "MODEL", OVER, reads=True),
        needs(_STATIC),
    ] = None
    score_steps: Annotated[
        int | None,
        Option(
            "--score-steps",
            "static: else train a copy for so many of the steps. Default: a quarter.",
            "N",
            OVER,
            check=at_least(1),
        ),
        needs(_STATIC),
        excludes("--score-from", why="no copy is trained"),
    ] = None
    score_batches: Annotated[
        int,
        Option("--score-batches", "static: to take losses on.", "N", OVER, check=at_least(1)),
        needs(_STATIC),
    ] = 8
    shapes: Annotated[common.SiteShapes, {"panel": OVER}, needs(*_EXPANDED)] = ()

    @classmethod
    def from_options(
        cls, method: Literal["static", "dynamic", "svd", "none"] | None, top_n: int, splits: int | None, **given: Any
    ) -> Overparam | None:
        """`UsageError` for more portions than matrices."""
        portions = min(2, top_n) if splits is None else splits
        if portions > top_n:
            raise UsageError(
                f"--splits {portions}: more portions than --top-n {top_n}", hint="choose --splits 1 to --top-n"
            )
        return None if method is None else cls(method, top_n, portions, **given)

    def recorded(self) -> dict[str, Any]:
        """For the manifest."""
        options = recorded(self)
        return {"overparam": options.pop("method"), **{f"overparam_{name}": value for name, value in options.items()}}
