"""One run of a command that trains: its student and data, what happens around the training, and the output."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from mpocli.config.data import DataOptions
from mpocli.config.optimisation import Optimisation
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.memory import keep_packed
from mpocli.hf.stored import round_to, stored_dtypes
from mpocli.hf.surroundings import write_trained
from mpocli.io.claim import discard
from mpocli.io.output import output_directory
from mpocli.io.totals import Totals
from mpocli.methods.data.scoring import evaluate
from mpocli.methods.data.task import TaskData, check_trained_head, prepare
from mpocli.methods.training.begin import RunSetup
from mpocli.methods.training.directory import reports_beside, run_directory
from mpocli.methods.training.schedule import Counted, steps_of
from mpocli.methods.training.student import check_finite, load_student
from mpocli.progress import Progress
from mpocli.train.loop.metrics_file import METRICS
from mpocli.train.loop.processes import on_first, set_seed


@dataclass(frozen=True)
class Written:
    """What a run's output amounts to, and its metrics; in all but the first process of several nothing was measured."""

    totals: Totals
    metrics: dict[str, float]
    test_metrics: dict[str, float]
    is_writer: bool


@dataclass
class TrainingRun:
    """What a verb trains: `student` on `data`, inside `underway`, with `fit`; `write` is the end of it.

    It takes `steps`, and has taken `step_seconds` so far; `new` tells of what the checkpoint lacks for its task.
    Under several processes all go through the same calls: the first one measures and writes.
    """

    setup: RunSetup
    data: TaskData
    student: Any
    steps: int
    new: tuple[str, ...]
    progress: Progress | None
    warn: Callable[[str], None]
    step_seconds: float = 0.0

    @property
    def checkpoint(self) -> Checkpoint:
        return self.setup.checkpoint

    @property
    def directory(self) -> Path:
        """Where the run keeps what it needs to be resumed; gone when the output is there."""
        return self.setup.directory

    @property
    def device(self) -> torch.device:
        return self.setup.device

    @property
    def optimisation(self) -> Optimisation:
        return self.setup.config.optimisation

    @property
    def options(self) -> DataOptions:
        """Those of the data."""
        assert self.setup.config.data is not None
        return self.setup.config.data

    @property
    def is_writer(self) -> bool:
        return bool(self.setup.state.is_main_process)

    @contextmanager
    def underway(self, *files: str) -> Iterator[None]:
        """The training: its directory is there, with empty `files` where the run does not go on. Raises `NumericsError`
        where the student does not come out finite; a failure leaves the directory if there is something to resume."""
        setup = self.setup
        setup.state.wait_for_everyone()  # all have looked for an interrupted run before one begins
        with (
            reports_beside(setup.out, self.optimisation.report_to),
            run_directory(setup.directory, setup.options, files=files, begins=not setup.goes_on, writes=self.is_writer),
        ):
            setup.state.wait_for_everyone()
            for line in self.new if self.is_writer else ():
                self.warn(line)
            yield
        setup.state.wait_for_everyone()
        check_finite(self.student)

    def measure_before(self) -> dict[str, float]:
        """The student's metrics as it came. What is random after that does not depend on the measuring."""
        self._tell(0)
        found = on_first(lambda: evaluate(self.student, self.data, self.options))
        set_seed(self.optimisation.seed)
        return found

    def write(
        self,
        command: str,
        *,
        metrics: dict[str, float] | None = None,
        recorded: Mapping[str, Any] | None = None,
        more: dict[str, Any] | None = None,
        beside: Callable[[Path], None] = lambda work: None,
        max_shard_bytes: int = 5 * 10**9,
    ) -> Written:
        """Round the student to what is stored of it, measure it, write it, and clear the training directory.

        `metrics` are given where they were measured already. The manifest gets the options, those that were `recorded`
        besides, and `more`; `beside` puts a verb's own files beside the weights.
        """
        round_to(self.student, stored_dtypes(self.student, self.checkpoint))
        found = Written(self.checkpoint.totals(), {}, {}, self.is_writer)
        if self.is_writer:
            if metrics is None:
                self._tell(self.steps)
                metrics = evaluate(self.student, self.data, self.options)
            with output_directory(self.setup.out) as work:
                if self.options.tokenizer:
                    self.data.tokenizer.save_pretrained(work)
                beside(work)
                totals = write_trained(
                    work,
                    self.student,
                    self.checkpoint,
                    command,
                    {**self.setup.config.recorded(), **(recorded or {})},
                    seed=self.optimisation.seed,
                    metrics=metrics,
                    more=more,
                    max_shard_bytes=max_shard_bytes,
                )
                if (self.directory / METRICS).is_file():
                    shutil.copyfile(self.directory / METRICS, work / METRICS)
            discard(self.directory)
            found = Written(totals, metrics, evaluate(self.student, self.data, self.options, split="test"), True)
        self.setup.state.wait_for_everyone()
        return found

    def _tell(self, done: int) -> None:
        if self.progress and self.data.eval:
            self.progress(done, max(1, self.steps), "evaluating")


def load(
    setup: RunSetup,
    *,
    steps: int | None = None,
    needs_train: bool = True,
    holdout: bool = False,
    makes_head: bool = True,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> TrainingRun:
    """Read a run's data and load its student. How many `steps` it trains its configuration says, or the caller.

    With `makes_head` a head that the checkpoint lacks begins at random, of which `warn` is told, and otherwise it is an
    `InputError`; `holdout` keeps a tenth of the training data apart. Weights of few bits stay packed.
    """
    config, checkpoint = setup.config, setup.checkpoint
    assert config.data is not None
    data = prepare(checkpoint, config.data, needs_train=needs_train, holdout=holdout)
    if steps is None:
        steps = steps_of(cast(Counted, config), len(data.train), setup.state.num_processes)
    if not makes_head:
        check_trained_head(checkpoint, data)
    set_seed(config.optimisation.seed)
    new: list[str] = []
    told = new.append if makes_head else None
    with keep_packed():  # constants of training, which need no values between its products
        student = load_student(checkpoint, data, trust_remote_code=config.trust_remote_code, warn=told)
    tells = progress if setup.state.is_main_process else None
    return TrainingRun(setup, data, student, steps, tuple(new), tells, warn)
