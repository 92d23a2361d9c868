"""Decide the shape and the bonds of every matrix under one budget of parameters or bytes, or one bound on the error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mpocli.errors import UsageError
from mpocli.hf.weight import Weight
from mpocli.methods.planner.by_error import smallest_within
from mpocli.methods.planner.fit_store import ChosenForm, FitStore
from mpocli.methods.planner.parallel import over_weights
from mpocli.methods.planner.planned_weight import PlannedWeight
from mpocli.mpo import SiteShape
from mpocli.mpo.allocation import Curve, allocate
from mpocli.mpo.candidates import bonds_within, svd
from mpocli.progress import Progress

Shapes = dict[str, tuple[SiteShape, tuple[int, ...]]]


@dataclass
class Planner:
    """Makes a plan for chosen weights.

    `exact_bytes` gives the size of the output's weight files when weights have these site shapes and bonds.
    """

    fits: FitStore
    exact_bytes: Callable[[Shapes], int]
    progress: Progress | None = None
    _plans: list[PlannedWeight] = field(default_factory=list)
    _whole: bool = False  # nothing has to be smaller

    def plan(self, weights: Sequence[Weight]) -> dict[str, ChosenForm | str]:
        """The form of every weight by name, or the reason to keep it dense.

        Raises `UsageError` for a budget that cannot be met.
        """
        budget = self.fits.budget
        self._plans = [PlannedWeight(weight, self.fits) for weight in weights]
        if budget.max_error is not None:
            self._for_all("fitting", self._bound)
        elif budget.allocation == "uniform":
            self._uniformly()
        else:
            self._globally()
        return {planned.weight.name: planned.form or planned.reason for planned in self._plans}

    def _bound(self, planned: PlannedWeight) -> None:
        assert self.fits.budget.max_error is not None
        found = smallest_within(self.fits, planned.weight, self.fits.budget.max_error)
        planned.form, planned.reason = (None, found) if isinstance(found, str) else (found, "")

    def _uniformly(self) -> None:
        """The same ratio for every matrix that can be judged, so that with the others it is the budget's."""
        assert self.fits.budget.ratio is not None
        for planned in self._plans:
            planned.reason = self.fits.norms.of(planned.weight).unmeasured
        while True:
            plans = self._open()
            ratio = self._left_for(plans) / max(1, sum(planned.weight.dense_params for planned in plans))
            for planned in plans:
                planned.params = int(ratio * planned.weight.dense_params)
                if planned.params < planned.least():
                    planned.reason = f"no form of {planned.params:,} parameters"
            if all(not planned.reason for planned in plans):
                break
        self._for_all("fitting", self._solve)

    def _open(self) -> list[PlannedWeight]:
        return [planned for planned in self._plans if not planned.reason]

    def _left_for(self, plans: Sequence[PlannedWeight]) -> int:
        """Parameters of a ratio that are left when all other plans stay dense; `UsageError` where none are."""
        assert self.fits.budget.ratio is not None
        kept = self._dense - sum(planned.weight.dense_params for planned in plans)
        left = int(self.fits.budget.ratio * self._dense) - kept
        if left <= 0:
            why = next((planned.reason for planned in self._plans if planned.reason), "nothing is selected")
            raise UsageError(
                f"--ratio {self.fits.budget.ratio}: of {self._dense:,} selected parameters {kept:,} stay as they are "
                f"({why})",
                hint="raise it, or choose other matrices with --layers",
            )
        return left

    # --- one budget for all -------------------------------------------------------------------------------------

    def _globally(self) -> None:
        self._for_all("measuring", PlannedWeight.draw)
        self._share()
        if self.fits.budget.shapes == "auto":
            self._for_all("trying shapes for", PlannedWeight.try_shapes)
            self._share()
        self._whole = all(planned.stays_dense for planned in self._open())
        self._for_all("fitting", self._solve)
        self._fit_bytes()
        self._spend_rest()

    def _share(self) -> None:
        """Give every open planned its parameters."""
        plans = self._open()
        budget = self.fits.budget
        if budget.ratio is not None:
            self._give(plans, self._left_for(plans))
            return
        assert budget.max_bytes is not None
        params = sum(planned.weight.dense_params for planned in plans)
        over = self.exact_bytes({}) - budget.max_bytes
        while over > 0:  # names and shapes in the files' headers count too, and the last step may not fit
            params -= -(-over // self._itemsize)
            if params < sum(planned.curve.sizes[0] for planned in plans if planned.curve):
                self._refuse_bytes(plans)
            self._give(plans, params)
            params = sum(planned.params for planned in plans)
            over = self.exact_bytes(self._shapes(plans)) - budget.max_bytes
        if not any(planned.params for planned in plans):
            self._give(plans, params)

    @property
    def _itemsize(self) -> int:
        """Of the smallest stored dtype among the open plans: what a parameter takes off a file at least."""
        return min((planned.itemsize for planned in self._open()), default=1)

    def _refuse_bytes(self, plans: Sequence[PlannedWeight]) -> None:
        least = self.exact_bytes({planned.weight.name: planned.smallest_shape() for planned in plans})
        raise UsageError(
            f"--max-bytes {self.fits.budget.max_bytes:,}: what is not selected and the smallest form of the rest take"
            f" {least:,} bytes",
            hint="raise it, or select more with --layers",
        )

    def _fit_bytes(self) -> None:
        """Take parameters off again where forms turned out larger in the files than expected."""
        limit = self.fits.budget.max_bytes
        while limit is not None and (over := self.exact_bytes(self._solved()) - limit) > 0:
            # A budget of parameters, from here on, for the plans that have a form.
            plans = [planned for planned in self._plans if planned.form is not None]
            before = {planned.weight.name: planned.params for planned in plans}
            params = sum(planned.form.params for planned in plans if planned.form) - -(-over // self._itemsize)
            if params < sum(planned.curve.sizes[0] for planned in plans if planned.curve):
                self._refuse_bytes(plans)
            self._give(plans, params)
            self._for_all(
                "fitting", self._solve, [planned for planned in plans if planned.params != before[planned.weight.name]]
            )

    def _solved(self) -> Shapes:
        return {
            planned.weight.name: (planned.form.sites, planned.form.bonds) for planned in self._plans if planned.form
        }

    @property
    def _dense(self) -> int:
        return sum(planned.weight.dense_params for planned in self._plans)

    def _give(self, plans: Sequence[PlannedWeight], params: int) -> None:
        curves = [planned.curve for planned in plans if planned.curve is not None]
        for planned, curve, option in zip(plans, curves, allocate(curves, params, "parameters"), strict=True):
            planned.params = curve.sizes[option]

    def _shapes(self, plans: Sequence[PlannedWeight]) -> Shapes:
        return {planned.weight.name: planned.expected_shape() for planned in plans if not planned.stays_dense}

    def _spend_rest(self) -> None:
        """What the fits left of the budget goes to the SVDs among them, rank by rank where it gains most."""
        budget = self.fits.budget
        if budget.ratio is not None:
            used = sum(planned.form.params if planned.form else planned.weight.dense_params for planned in self._plans)
            left = int(budget.ratio * self._dense) - used
        else:
            assert budget.max_bytes is not None
            room = budget.max_bytes - self.exact_bytes(self._solved())
            left = room // self._largest_itemsize
        plans = [planned for planned in self._plans if planned.form is not None and planned.form.name == "svd"]
        curves = []
        for planned in plans:
            assert planned.form is not None and planned.curve is not None
            now, step = planned.form.params, sum(planned.weight.shape)
            more = [
                (size, loss)
                for size, loss in planned.curve.options
                if now < size < planned.weight.dense_params and (size - now) % step == 0
            ]
            curves.append(Curve.of([(now, planned.form.loss), *more]))
        if not curves or left <= 0:
            return
        given = allocate(curves, left + sum(curve.sizes[0] for curve in curves), "parameters")
        while budget.max_bytes is not None and (over := self._bytes_with(plans, curves, given) - budget.max_bytes) > 0:
            # Wider bonds and later offsets may take more digits in the files' headers.
            left -= -(-over // self._largest_itemsize)
            if left <= 0:
                return
            given = allocate(curves, left + sum(curve.sizes[0] for curve in curves), "parameters")
        wider = [planned for planned, option in zip(plans, given, strict=True) if option]
        for planned, curve, option in zip(plans, curves, given, strict=True):
            if option:
                planned.params, planned.chain = curve.sizes[option], None
        self._for_all("widening", self._solve, wider)

    def _bytes_with(self, plans: Sequence[PlannedWeight], curves: Sequence[Curve], given: Sequence[int]) -> int:
        """Of the weight files, when these SVDs get these options of theirs."""
        shapes = self._solved()
        for planned, curve, option in zip(plans, curves, given, strict=True):
            sites = svd(*planned.weight.shape).sites
            shapes[planned.weight.name] = sites, bonds_within(sites, curve.sizes[option])
        return self.exact_bytes(shapes)

    @property
    def _largest_itemsize(self) -> int:
        return max((planned.itemsize for planned in self._plans), default=1)

    # --- one weight after another, or side by side ----------------------------------------------------------------

    def _solve(self, planned: PlannedWeight) -> None:
        planned.solve("the budget leaves it whole" if self._whole else "making it smaller costs more than elsewhere")

    def _for_all(
        self, what: str, do: Callable[[PlannedWeight], None], plans: Sequence[PlannedWeight] | None = None
    ) -> None:
        """`do` for every open weight, or for these, announced."""
        plans = self._open() if plans is None else plans
        over_weights(plans, do, lambda planned: planned.weight, self.fits.device, what, self.progress)
