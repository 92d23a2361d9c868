"""squeeze: shrink an MPO checkpoint bond by bond, with a little fine-tuning after each, as long as it stays good."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpocli.config.squeeze import SqueezeConfig, check_options
from mpocli.errors import InputError, UsageError
from mpocli.hf.artifact import Checkpoint
from mpocli.io.claim import writes_output
from mpocli.io.totals import Totals
from mpocli.methods.squeeze.rounds import Squeezer, Watch
from mpocli.methods.squeeze.state import RECORDS, Progressed, RoundRecord, load_round, write_records
from mpocli.methods.squeeze.target import target_params
from mpocli.methods.training.begin import begin
from mpocli.methods.training.run import TrainingRun, load
from mpocli.methods.training.state import last_state
from mpocli.methods.training.student import count_trainable, load_student
from mpocli.train.loop.updates import set_recompute, set_update


@dataclass(frozen=True)
class SqueezeReport:
    """What a squeeze did: every round, the one that was kept (0: the model as it came), and why it ended.

    `stopped` is `target`, `max-drop`, `rounds`, `exhausted` (every bond is 1) or `not-finite` (a round's training left
    the finite numbers, and the rounds before it stand); `target_met` is None where there was
    no target. `metrics` are of what is stored. `is_writer` is false in all but the first process of several.
    """

    out: str
    seconds: float
    rounds: tuple[RoundRecord, ...]
    kept_round: int
    stopped: str
    target_met: bool | None
    target_params: int | None
    metric: str
    reference: float
    metrics: dict[str, float]
    metrics_before: dict[str, float]
    test_metrics: dict[str, float]
    trainable_params: int
    totals_before: Totals
    totals: Totals
    resumed_from: int
    is_writer: bool = True


@writes_output
def run(
    model: str,
    config: SqueezeConfig,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    watch: Watch | None = None,
) -> SqueezeReport:
    """Dimension squeezing (MPOP, ACL 2021, Alg. 2) of a fine-tuned MPO checkpoint into a new directory `out`.

    Each round cuts the bond (or tied bonds) next to a central core that costs least, fine-tunes for some steps and
    evaluates; the last model inside the allowed drop is written. `config.direct` cuts to the target at once and
    trains one round instead. While it lasts, `<out>.training` holds the newest round, from which `resume` goes on.
    Raises `UsageError` and `InputError` for what cannot be squeezed, `NumericsError` where training leaves the
    finite numbers.
    """
    started = time.perf_counter()
    watch = watch or Watch()
    check_options(config)
    setup = begin(model, config, out, overwrite=overwrite, resume=resume)
    _check(setup.checkpoint, config, model)
    needs_train = config.finetune_steps > 0 or config.order == "sensitivity"
    training = load(setup, steps=config.finetune_steps, needs_train=needs_train, makes_head=False, progress=watch.step)
    done = train(training, config, watch)
    kept = done.kept
    written = training.write(
        "squeeze",
        metrics=kept.metrics if kept else done.progressed.before,
        recorded={"kept_round": done.progressed.kept},
        more={"rounds": [asdict(record) for record in done.progressed.records]},
        beside=lambda work: write_records(work / RECORDS, done.progressed.records),
    )
    return SqueezeReport(
        out=str(out),
        seconds=time.perf_counter() - started,
        rounds=done.progressed.records,
        kept_round=done.progressed.kept,
        stopped=done.stopped,
        target_met=None if done.target is None else (kept.params if kept else done.totals_before.params) <= done.target,
        target_params=done.target,
        metric=training.data.task.main_metric,
        reference=done.reference,
        metrics=kept.metrics if kept else done.progressed.before,
        metrics_before=done.progressed.before,
        test_metrics=written.test_metrics,
        trainable_params=count_trainable(training.student)[0],
        totals_before=done.totals_before,
        totals=written.totals,
        resumed_from=done.resumed_from,
        is_writer=written.is_writer,
    )


def _check(checkpoint: Checkpoint, config: SqueezeConfig, model: str) -> None:
    if not checkpoint.is_mpo:
        raise InputError(f"{model}: has no MPOs to squeeze", hint="run mpocli decompose, then mpocli finetune")
    if checkpoint.routing:
        raise InputError(
            f"{model}: its experts share cores, whose bonds are not cut", hint="squeeze first, then expand"
        )
    if checkpoint.encodings:
        sparse = sum(encoding.holds_zeros for encoding in checkpoint.encodings.values())
        rounded = len(checkpoint.encodings) - sparse
        if rounded:
            raise InputError(
                f"{model}: {rounded} of its tensors are stored in few bits, and a cut bond would not fit their grids",
                hint="squeeze first, then run mpocli quantize; mpocli merge makes a dense checkpoint",
            )
        raise InputError(
            f"{model}: {sparse} of its tensors are sparse, and a cut bond would fill their zeros",
            hint="squeeze first, then run mpocli sparsify",
        )
    checkpoint.totals()  # names the module where files and config disagree, which loading would not
    if not config.data.eval:
        raise UsageError("squeeze needs --eval FILE: it decides on development data", hint="name the dev split")


@dataclass(frozen=True)
class _Squeezed:
    """All rounds, why there was no further one, and what they were measured by."""

    progressed: Progressed
    stopped: str
    target: int | None
    reference: float
    totals_before: Totals
    resumed_from: int

    @property
    def kept(self) -> RoundRecord | None:
        """The last round inside the allowed drop, None where the model is as it came."""
        return self.progressed.records[self.progressed.kept - 1] if self.progressed.kept else None


def train(run: TrainingRun, config: SqueezeConfig, watch: Watch) -> _Squeezed:
    """Squeeze the student round by round, in the end to the one that is kept."""
    checkpoint, metric = run.checkpoint, run.data.task.main_metric
    run.student = _ready(run.student, run, config)
    before = _totals(run.student, checkpoint)
    itemsize = min(weight.dtype.itemsize for weight in checkpoint.survey.weights if weight.entry is not None)
    target = target_params(config, before, itemsize)
    squeezer = Squeezer(run, config, target, before, watch)
    with run.underway(RECORDS):
        done = last_state(run.directory) if run.setup.goes_on else None
        progressed = squeezer.begin() if done is None else load_round(run.directory, done, run.student)
        if run.is_writer and watch.round:
            for record in progressed.records:  # those of before the kill
                watch.round(record, metric)
        stopped = squeezer.stopped(progressed)
        while stopped is None:
            progressed, stopped = squeezer.round(progressed)
        if not progressed.kept:
            came = load_student(checkpoint, run.data, trust_remote_code=config.trust_remote_code)
            run.student = _ready(came, run, config)
        elif progressed.kept != len(progressed.records) or stopped == "not-finite":
            load_round(run.directory, progressed.kept, run.student)
        return _Squeezed(progressed, stopped, target, squeezer.reference(progressed), before, done or 0)


def _ready(model: Any, run: TrainingRun, config: SqueezeConfig) -> Any:
    model = model.to(run.device)
    set_update(model, config.update)
    set_recompute(model, config.recompute_weights)
    return model


def _totals(model: Any, checkpoint: Checkpoint) -> Totals:
    """Of the model as it is loaded: a class with a head has parameters that the files of a bare body lack."""
    found = checkpoint.totals()
    more = sum(parameter.numel() for parameter in model.parameters()) - found.params
    params, dense, size = found.params + more, found.dense_params + more, more * checkpoint.reader.main_dtype.itemsize
    return Totals(params, dense, params / dense, found.bytes + size, found.dense_bytes + size)
