"""What the planner is asked for: a size or an error, the shapes it may use, and the text that decides."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from mpocli.config import text
from mpocli.config.bounds import at_least
from mpocli.config.calibration import CALIBRATED, Calibration
from mpocli.config.data import ROWS_OF_TASK, DataOptions
from mpocli.config.modes import Condition, excludes, needs
from mpocli.config.option import Option, group, recorded
from mpocli.config.page import PLAN
from mpocli.config.tasks import task_named
from mpocli.errors import InputError, UsageError
from mpocli.quant.sizes import BITS

BUDGETS = ("--ratio", "--ratio-bytes", "--max-bytes", "--max-error")
_BUDGETED = needs(*BUDGETS, why="there is no budget to plan for")
_ONE = "a plan has one budget"
_FIELDS = ("ratio", "ratio_bytes", "max_bytes", "max_error")
_WIDTHS = (16, *BITS)
_WORD = re.compile(r"[A-Za-z0-9_-]+")


def named_task(calibrate: str | None, task: str | None) -> tuple[str | None, str | None]:
    """(source, task): where a task's name stands for a text, the hub's rows of it; else what was given."""
    if calibrate is None or not _WORD.fullmatch(calibrate):
        return calibrate, task
    try:
        found = task_named(calibrate)
    except UsageError:
        return calibrate, task
    if task is not None and task_named(task) != found:
        return calibrate, task
    if not found.hub:
        raise UsageError(
            f"--calibrate {calibrate}: the hub has no rows of this task", hint=f"--task {found.name} --calibrate FILE"
        )
    return found.hub, found.name


_HUB_ROWS = Condition(
    "--calibrate", test=lambda name: named_task(name, None)[1] not in (None, "lm"), example="--calibrate sst2"
)
_OF_ROWS = needs(ROWS_OF_TASK, _HUB_ROWS, why="windows of a text take --seq-len")


def _bits(given: str, option: str) -> tuple[int, ...]:
    """`auto` or `8,4,2`, widest first; `UsageError` for other numbers."""
    words = [word.strip() for word in given.split(",")]
    if words == ["auto"]:
        return _WIDTHS
    if not all(word.isdecimal() and int(word) in _WIDTHS for word in words):
        raise UsageError(
            f"{option} {given!r}: the widths are {', '.join(map(str, _WIDTHS))}",
            hint=f"write {option} auto alone, for all of them, or {option} 8,4,3",
        )
    return tuple(width for width in _WIDTHS if str(width) in words)


def _folder(option: str, file: str) -> None:
    if not Path(file).absolute().parent.is_dir():
        raise InputError(f"{option} {file}: its folder does not exist", hint="make it, or name another file")


def with_task(
    calibration: Calibration | None, data: DataOptions | None
) -> tuple[Calibration | None, DataOptions | None]:
    """The same, where the rows that are looked at name their task, or nothing does: then it is one text."""
    if calibration is not None:
        source, task = named_task(calibration.source, (data.task if data else None) or None)
        calibration = replace(calibration, source=str(source))
        if task is not None:
            data = replace(data, task=task) if data else DataOptions(task)
    if data is not None and not data.task:
        data = replace(data, task="lm")
    return calibration, data


@dataclass(frozen=True)
class Budget:
    """One of `ratio`, `ratio_bytes`, `max_bytes` and `max_error`, and how to meet it.

    `ratio` = parameters kept of the selected matrices, `ratio_bytes` = bytes kept of what they have, headers counted,
    `max_bytes` = weight files of the whole output, `max_error` =
    the largest relative error of any matrix, weighted by its inputs where there is a calibration.
    """

    ratio: Annotated[
        float | None,
        Option("--ratio", "Keep this part of the selected matrices' parameters, as 0.5 or 50%.", "X", PLAN, share=True),
        excludes("--ratio-bytes", "--max-bytes", "--max-error", why=_ONE),
    ] = None
    max_bytes: Annotated[
        int | None,
        Option("--max-bytes", "Of all weight files written, as 300MB.", "SIZE", PLAN, parse=text.size),
        excludes("--ratio", "--ratio-bytes", "--max-error", why=_ONE),
    ] = None
    max_error: Annotated[
        float | None,
        Option(
            "--max-error",
            "Largest relative error of any matrix, in what it puts out where --calibrate says what goes in.",
            "X",
            PLAN,
            share=True,
        ),
        excludes("--ratio", "--ratio-bytes", "--max-bytes", why=_ONE),
    ] = None
    ratio_bytes: Annotated[
        float | None,
        Option(
            "--ratio-bytes",
            "Keep this part of the bytes that the selected matrices have, as 10%.",
            "X",
            PLAN,
            share=True,
        ),
        excludes("--ratio", "--max-bytes", "--max-error", why=_ONE),
    ] = None
    bits: Annotated[
        tuple[int, ...] | None,
        Option(
            "--bits",
            "Choose bits too: auto, or some of 16 (not rounded), 8, 4, 3, 2.",
            "N,…|auto",
            PLAN,
            parse=_bits,
        ),
        needs("--max-bytes", "--ratio-bytes", why="bits count in a budget of bytes"),
        excludes("--shapes paper", why="of chains with more than two cores none is rounded"),
    ] = None
    allocation: Annotated[
        Literal["global", "uniform"],
        Option("--allocation", "One budget for all matrices, or the same ratio for each.", "global|uniform", PLAN),
        _BUDGETED,
        needs("--ratio", of=("uniform",), why="it gives every matrix the same ratio"),
    ] = "global"
    sweeps: Annotated[
        int,
        Option("--sweeps", "Of weighted least squares, at most.", "N", PLAN, check=at_least(0)),
        _BUDGETED,
        excludes("--shapes svd", "--bits", why="SVDs have a closed form"),
    ] = 10
    shapes: Annotated[
        Literal["auto", "svd", "paper"],
        Option(
            "--shapes",
            "Every shape for every matrix, the truncated SVD, or the papers' with --sites.",
            "auto|svd|paper",
            PLAN,
        ),
        _BUDGETED,
    ] = "auto"
    weights: Annotated[
        Literal["fisher", "input"],
        Option(
            "--weights",
            "Judge errors by what they do to the loss, or to each matrix's outputs.",
            "fisher|input",
            PLAN,
        ),
        CALIBRATED,
        excludes("--max-error", why="the bound is on what each matrix puts out"),
    ] = "fisher"
    sequential: Annotated[
        bool,
        Option("--sequential", "Fit each block to the inputs that the compressed ones make.", panel=PLAN),
        CALIBRATED,
        excludes("--max-error", why="the bound is on errors for the dense model's inputs"),
        excludes("--bits", why="rounding looks at the dense model's inputs"),
    ] = False
    compare: Annotated[
        bool,
        Option(
            "--compare",
            "Measure plain SVD, whitened SVD and plain MPO of the same size too.",
            panel=PLAN,
            recorded=False,
        ),
        CALIBRATED,
        excludes("--bits", why="it compares numbers of parameters"),
    ] = False
    calibration: Annotated[
        Calibration | None,
        group(
            CALIBRATED,
            source=(_BUDGETED,),
            seq_len=(CALIBRATED, excludes(ROWS_OF_TASK, _HUB_ROWS, why="rows are cut by --max-length")),
        ),
    ] = None
    sensitivity: Annotated[
        str | None,
        Option(
            "--sensitivity",
            "Measure what truncating each matrix alone does to the loss; kept in FILE, and read from it.",
            "FILE",
            PLAN,
            check=_folder,
            recorded=lambda file: file is not None,
        ),
        CALIBRATED,
        excludes("--max-error", why="one bound holds for all"),
    ] = None
    data: Annotated[
        DataOptions | None,
        group(
            CALIBRATED,
            without=("train", "eval", "test", "limit", "eval_batch_size", "max_new_tokens"),
            label_column=(CALIBRATED, _OF_ROWS),
            max_length=(CALIBRATED, _OF_ROWS),
        ),
    ] = None

    def __post_init__(self) -> None:
        given = [name for name in _FIELDS if getattr(self, name) is not None]
        if len(given) != 1:
            options = " and ".join(f"--{name.replace('_', '-')}" for name in given) or "none"
            raise UsageError(
                f"a plan has one budget: {options} given",
                hint="choose one of --ratio, --ratio-bytes, --max-bytes and --max-error",
            )
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise UsageError(
                f"--ratio {self.ratio}: parameters kept of the selected matrices, between 0 and 1",
                hint="0.6 keeps 60 %",
            )
        if self.ratio_bytes is not None and not 0 < self.ratio_bytes < 1:
            raise UsageError(
                f"--ratio-bytes {self.ratio_bytes}: bytes kept of the selected matrices, between 0 and 1",
                hint="0.1 keeps 10 %",
            )
        if self.max_error is not None and not 0 < self.max_error < 1:
            raise UsageError(f"--max-error {self.max_error}: a relative error between 0 and 1", hint="such as 0.1")

    @classmethod
    def from_options(cls, calibration: Calibration | None, data: DataOptions | None, **given: Any) -> Budget | None:
        """None where no budget is asked for; a task may be named by the rows that are looked at."""
        if all(given[name] is None for name in _FIELDS):
            return None
        calibration, data = with_task(calibration, data)
        return cls(calibration=calibration, data=data, **given)

    @property
    def probes(self) -> bool:
        """Whether gradients of the outputs are looked at."""
        return self.calibration is not None and self.weights == "fisher" and self.max_error is None

    def recorded(self) -> dict[str, Any]:
        """For the manifest: of what is looked at nothing where nothing is."""
        looks = () if self.calibration else ("weights", "sequential", "sensitivity")
        names = {"shapes": "candidates", "source": "calibrate"}
        options = {names.get(name, name): value for name, value in recorded(self, (*looks, "data")).items()}
        return options | ({"task": self.data.task} if self.calibration and self.data else {})
