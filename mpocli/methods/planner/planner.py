"""Decide the shape and the bonds of every matrix under one budget of parameters or bytes, or one bound on the error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mpocli.errors import UsageError
from mpocli.hf.targets import Weight
from mpocli.methods.planner.by_error import smallest_within
from mpocli.methods.planner.fit_store import Solution, Workshop
from mpocli.methods.planner.parallel import side_by_side
from mpocli.methods.planner.planned_weight import Case
from mpocli.mpo import SiteShape
from mpocli.mpo.budget import Curve, allocate
from mpocli.mpo.candidates import bonds_within, svd

Progress = Callable[[int, int, str], None]
Shapes = dict[str, tuple[SiteShape, tuple[int, ...]]]
# Elements of a matrix or of its second moments, up to which several are worked on at a time: 80 MB of float64.
_SIDE_BY_SIDE = 10**7


@dataclass
class Planner:
    """Makes a plan for chosen weights.

    `exact_bytes` gives the size of the output's weight files when weights have these site shapes and bonds.
    """

    shop: Workshop
    exact_bytes: Callable[[Shapes], int]
    progress: Progress | None = None
    _cases: list[Case] = field(default_factory=list)
    _whole: bool = False  # nothing has to be smaller

    def plan(self, weights: Sequence[Weight]) -> dict[str, Solution | str]:
        """The solution of every weight by name, or the reason to keep it dense.

        Raises `UsageError` for a budget that cannot be met.
        """
        budget = self.shop.budget
        self._cases = [Case(weight, self.shop) for weight in weights]
        if budget.max_error is not None:
            self._for_all("fitting", self._bound)
        elif budget.allocation == "uniform":
            self._uniformly()
        else:
            self._globally()
        return {case.weight.name: case.solution or case.reason for case in self._cases}

    def _bound(self, case: Case) -> None:
        assert self.shop.budget.max_error is not None
        found = smallest_within(self.shop, case.weight, self.shop.budget.max_error)
        case.solution, case.reason = (None, found) if isinstance(found, str) else (found, "")

    def _uniformly(self) -> None:
        """The same ratio for every matrix that can be judged, so that with the others it is the budget's."""
        assert self.shop.budget.ratio is not None
        for case in self._cases:
            case.reason = self.shop.norms.of(case.weight).unmeasured
        while True:
            cases = self._open()
            ratio = self._left_for(cases) / max(1, sum(case.weight.dense_params for case in cases))
            for case in cases:
                case.params = int(ratio * case.weight.dense_params)
                if case.params < case.least():
                    case.reason = f"no form of {case.params:,} parameters"
            if all(not case.reason for case in cases):
                break
        self._for_all("fitting", self._solve)

    def _open(self) -> list[Case]:
        return [case for case in self._cases if not case.reason]

    def _left_for(self, cases: Sequence[Case]) -> int:
        """Parameters of a ratio that are left when all other cases stay dense; `UsageError` where none are."""
        assert self.shop.budget.ratio is not None
        kept = self._dense - sum(case.weight.dense_params for case in cases)
        left = int(self.shop.budget.ratio * self._dense) - kept
        if left <= 0:
            why = next((case.reason for case in self._cases if case.reason), "nothing is selected")
            raise UsageError(
                f"--ratio {self.shop.budget.ratio}: of {self._dense:,} selected parameters {kept:,} stay as they are "
                f"({why})",
                hint="raise it, or choose other matrices with --layers",
            )
        return left

    # --- one budget for all -------------------------------------------------------------------------------------

    def _globally(self) -> None:
        self._for_all("measuring", Case.draw)
        self._share()
        if self.shop.budget.shapes == "auto":
            self._for_all("trying shapes for", Case.try_shapes)
            self._share()
        self._whole = all(case.stays_dense for case in self._open())
        self._for_all("fitting", self._solve)
        self._fit_bytes()
        self._spend_rest()

    def _share(self) -> None:
        """Give every open case its parameters."""
        cases = self._open()
        budget = self.shop.budget
        if budget.ratio is not None:
            self._give(cases, self._left_for(cases))
            return
        assert budget.max_bytes is not None
        params = sum(case.weight.dense_params for case in cases)
        over = self.exact_bytes({}) - budget.max_bytes
        while over > 0:  # names and shapes in the files' headers count too, and the last step may not fit
            params -= -(-over // self._itemsize)
            if params < sum(case.curve.params[0] for case in cases if case.curve):
                self._refuse_bytes(cases)
            self._give(cases, params)
            params = sum(case.params for case in cases)
            over = self.exact_bytes(self._shapes(cases)) - budget.max_bytes
        if not any(case.params for case in cases):
            self._give(cases, params)

    @property
    def _itemsize(self) -> int:
        """Of the smallest stored dtype among the open cases: what a parameter takes off a file at least."""
        return min((case.itemsize for case in self._open()), default=1)

    def _refuse_bytes(self, cases: Sequence[Case]) -> None:
        least = self.exact_bytes({case.weight.name: case.smallest_shape() for case in cases})
        raise UsageError(
            f"--max-bytes {self.shop.budget.max_bytes:,}: what is not selected and the smallest form of the rest take"
            f" {least:,} bytes",
            hint="raise it, or select more with --layers",
        )

    def _fit_bytes(self) -> None:
        """Take parameters off again where forms turned out larger in the files than expected."""
        limit = self.shop.budget.max_bytes
        while limit is not None and (over := self.exact_bytes(self._solved()) - limit) > 0:
            # A budget of parameters, from here on, for the cases that have a form.
            cases = [case for case in self._cases if case.solution is not None]
            before = {case.weight.name: case.params for case in cases}
            params = sum(case.solution.params for case in cases if case.solution) - -(-over // self._itemsize)
            if params < sum(case.curve.params[0] for case in cases if case.curve):
                self._refuse_bytes(cases)
            self._give(cases, params)
            self._for_all("fitting", self._solve, [case for case in cases if case.params != before[case.weight.name]])

    def _solved(self) -> Shapes:
        return {case.weight.name: (case.solution.sites, case.solution.bonds) for case in self._cases if case.solution}

    @property
    def _dense(self) -> int:
        return sum(case.weight.dense_params for case in self._cases)

    def _give(self, cases: Sequence[Case], params: int) -> None:
        curves = [case.curve for case in cases if case.curve is not None]
        for case, curve, option in zip(cases, curves, allocate(curves, params), strict=True):
            case.params = curve.params[option]

    def _shapes(self, cases: Sequence[Case]) -> Shapes:
        return {case.weight.name: case.expected_shape() for case in cases if not case.stays_dense}

    def _spend_rest(self) -> None:
        """What the fits left of the budget goes to the SVDs among them, rank by rank where it gains most."""
        budget = self.shop.budget
        if budget.ratio is not None:
            used = sum(case.solution.params if case.solution else case.weight.dense_params for case in self._cases)
            left = int(budget.ratio * self._dense) - used
        else:
            assert budget.max_bytes is not None
            room = budget.max_bytes - self.exact_bytes(self._solved())
            left = room // self._largest_itemsize
        cases = [case for case in self._cases if case.solution is not None and case.solution.name == "svd"]
        curves = []
        for case in cases:
            assert case.solution is not None and case.curve is not None
            now, step = case.solution.params, sum(case.weight.shape)
            more = [
                (size, loss)
                for size, loss in case.curve.options
                if now < size < case.weight.dense_params and (size - now) % step == 0
            ]
            curves.append(Curve.of([(now, case.solution.loss), *more]))
        if not curves or left <= 0:
            return
        given = allocate(curves, left + sum(curve.params[0] for curve in curves))
        while budget.max_bytes is not None and (over := self._bytes_with(cases, curves, given) - budget.max_bytes) > 0:
            # Wider bonds and later offsets may take more digits in the files' headers.
            left -= -(-over // self._largest_itemsize)
            if left <= 0:
                return
            given = allocate(curves, left + sum(curve.params[0] for curve in curves))
        wider = [case for case, option in zip(cases, given, strict=True) if option]
        for case, curve, option in zip(cases, curves, given, strict=True):
            if option:
                case.params, case.chain = curve.params[option], None
        self._for_all("widening", self._solve, wider)

    def _bytes_with(self, cases: Sequence[Case], curves: Sequence[Curve], given: Sequence[int]) -> int:
        """Of the weight files, when these SVDs get these options of theirs."""
        shapes = self._solved()
        for case, curve, option in zip(cases, curves, given, strict=True):
            sites = svd(*case.weight.shape).sites
            shapes[case.weight.name] = sites, bonds_within(sites, curve.params[option])
        return self.exact_bytes(shapes)

    @property
    def _largest_itemsize(self) -> int:
        return max((case.itemsize for case in self._cases), default=1)

    # --- one weight after another, or side by side ----------------------------------------------------------------

    def _solve(self, case: Case) -> None:
        case.solve("the budget leaves it whole" if self._whole else "making it smaller costs more than elsewhere")

    def _for_all(self, what: str, do: Callable[[Case], None], cases: Sequence[Case] | None = None) -> None:
        """`do` for every open case, or for these, announced."""
        cases = self._open() if cases is None else cases
        for number, case in enumerate(side_by_side(cases, do, alone=self._is_alone)):
            if self.progress is not None:
                self.progress(number, len(cases), f"{what} {case.weight.name}")

    def _is_alone(self, case: Case) -> bool:
        elements = max(*(size**2 for size in case.weight.shape), case.weight.dense_params)
        return self.shop.device.type != "cpu" or elements > _SIDE_BY_SIDE
