"""A teacher, and how much of it is learnt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from mpocli.config import bounds
from mpocli.config.modes import ALWAYS, needs
from mpocli.config.option import Option
from mpocli.config.page import TEACHER

_TAUGHT = needs("--teacher")


@dataclass(frozen=True)
class DistillationOptions:
    """`distill_weight` = the teacher's share of the loss; `distill_hidden`: hidden states are compared too."""

    teacher: Annotated[
        str, Option("--teacher", "Of the same task, to learn from.", "MODEL", TEACHER, reads=True), ALWAYS
    ]
    distill_weight: Annotated[
        float,
        Option("--distill-weight", "Its share of the loss.", "X", TEACHER, check=bounds.share, share=True),
        _TAUGHT,
    ] = 0.5
    temperature: Annotated[
        float, Option("--temperature", "Of both distributions.", "X", TEACHER, check=bounds.positive), _TAUGHT
    ] = 2.0
    distill_hidden: Annotated[bool, Option("--distill-hidden", "Hidden states too.", panel=TEACHER), _TAUGHT] = False

    @classmethod
    def from_options(cls, teacher: str | None, **given: Any) -> DistillationOptions | None:
        return None if teacher is None else cls(teacher, **given)
