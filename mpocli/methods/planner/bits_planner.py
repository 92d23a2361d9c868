"""Decide the format of every matrix, shape, bond and bits, under one budget of bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mpocli.errors import UsageError
from mpocli.hf.weight import Weight
from mpocli.methods.planner.fit_store import FitStore
from mpocli.methods.planner.formats import Format
from mpocli.methods.planner.parallel import over_weights
from mpocli.methods.planner.rounded import Option, RoundedForm, make, options
from mpocli.mpo.allocation import Curve, allocate
from mpocli.progress import Progress

Formats = dict[str, Format]
# Rounds in which what headers leave of the budget is offered again.
_ROUNDS = 8


@dataclass
class BitsPlanner:
    """Makes a plan for chosen weights within `limit` bytes of weight files.

    `exact_bytes` gives the size of the output's weight files when weights have these formats and others stay wide.
    """

    fits: FitStore
    bits: Sequence[int]
    limit: int
    exact_bytes: Callable[[Formats], int]
    progress: Progress | None = None
    _options: dict[str, list[Option]] = field(default_factory=dict)
    _reasons: dict[str, str] = field(default_factory=dict)
    _made: dict[str, RoundedForm] = field(default_factory=dict)

    def plan(self, weights: Sequence[Weight]) -> dict[str, RoundedForm | str]:
        """The form of every weight by name, or the reason to keep it wide. Raises `UsageError` for a budget that
        cannot be met."""
        self._for_all("measuring", self._measure, weights)
        chosen = self._share()
        by_name = {weight.name: weight for weight in weights}
        self._for_all("rounding", lambda weight: self._make(weight, chosen[weight.name]), [by_name[n] for n in chosen])
        for name in by_name:
            if name not in self._made:
                self._reasons.setdefault(name, "making it smaller costs more than elsewhere")
        return {name: self._made.get(name) or self._reasons[name] for name in by_name}

    def _measure(self, weight: Weight) -> None:
        found = options(self.fits, weight, self.bits)
        if isinstance(found, str):
            self._reasons[weight.name] = found
        else:
            self._options[weight.name] = found

    def _make(self, weight: Weight, chosen: Format) -> None:
        self._made[weight.name] = make(self.fits, weight, chosen)

    def _share(self) -> Formats:
        """The formats of the least sum of losses whose files have at most the budget's bytes."""
        names = list(self._options)
        curves = [Curve.of([(option.nbytes, option.loss) for option in self._options[name]]) for name in names]
        by_size = [{(one.nbytes, one.loss): one.format for one in self._options[name]} for name in names]

        def formats(room: int) -> Formats:
            picked = zip(names, curves, by_size, allocate(curves, room, "bytes"), strict=True)
            found = {name: known[curve.options[k]] for name, curve, known, k in picked}
            return {name: one for name, one in found.items() if one.grids != (None,)}

        smallest = sum(curve.sizes[0] for curve in curves)
        room = self.limit - self.exact_bytes({}) + sum(curve.sizes[-1] for curve in curves)
        best: Formats | None = None
        for _ in range(_ROUNDS):
            if room < smallest:
                break
            found = formats(room)
            spare = self.limit - self.exact_bytes(found)
            if spare >= 0:
                if found == best:
                    break
                best = found
            room += spare if spare < 0 else spare // 2
        if best is None:
            self._refuse(formats(smallest))
        return best or {}

    def _refuse(self, smallest: Formats) -> None:
        raise UsageError(
            f"a budget of {self.limit:,} bytes: what is not selected and the smallest formats of the rest take "
            f"{self.exact_bytes(smallest):,}",
            hint="raise it, allow fewer bits with --bits, or select more with --layers",
        )

    def _for_all(self, what: str, do: Callable[[Weight], None], weights: Sequence[Weight]) -> None:
        over_weights(weights, do, lambda weight: weight, self.fits.device, what, self.progress)
