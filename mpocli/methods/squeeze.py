"""squeeze: shrink an MPO checkpoint bond by bond, with a little fine-tuning after each, as long as it stays good."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mpocli.errors import InputError, UsageError
from mpocli.hf.artifact import Checkpoint, write_trained
from mpocli.hf.stored import round_to, stored_dtypes
from mpocli.io.claim import discard, writes_output
from mpocli.io.manifest import Totals
from mpocli.io.output import output_directory
from mpocli.methods.squeeze_config import SqueezeConfig, check_options, target_params
from mpocli.methods.squeeze_rounds import Squeezer, Watch
from mpocli.methods.squeeze_state import RECORDS, RoundRecord, load_round, write_records
from mpocli.methods.task_data import TaskData, check_trained_head, evaluate, prepare
from mpocli.methods.training.directory import begin, reports_beside, run_directory
from mpocli.methods.training.state import last_state
from mpocli.methods.training.student import check_finite, count_trainable, load_student
from mpocli.train.processes import set_seed
from mpocli.train.updates import set_recompute, set_update


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
    begun = begin(model, config, out, overwrite=overwrite, resume=resume)
    checkpoint, device, state, training = begun.checkpoint, begun.device, begun.state, begun.training
    if not checkpoint.is_mpo:
        raise InputError(f"{model}: has no MPOs to squeeze", hint="run mpocli decompose, then mpocli finetune")
    if checkpoint.routing:
        raise InputError(
            f"{model}: its experts share cores, whose bonds are not cut", hint="squeeze first, then expand"
        )
    if checkpoint.encodings:
        raise InputError(
            f"{model}: {len(checkpoint.encodings)} of its tensors are sparse, and a cut bond would fill their zeros",
            hint="squeeze first, then run mpocli sparsify",
        )
    checkpoint.totals()  # names the module where files and config disagree, which loading would not
    data = prepare(checkpoint, config.data, needs_train=config.finetune_steps > 0 or config.order == "sensitivity")
    check_trained_head(checkpoint, data)
    if not data.eval:
        raise UsageError("squeeze needs --eval FILE: it decides on development data", hint="name the dev split")

    set_seed(config.optimisation.seed)
    student = _student(checkpoint, data, config, device)
    before = _totals(student, checkpoint)
    itemsize = min(weight.dtype.itemsize for weight in checkpoint.survey.weights if weight.entry is not None)
    target = target_params(config, before, itemsize)
    squeezer = Squeezer(student, config, checkpoint, data, training, target, before, device, watch)
    state.wait_for_everyone()
    with (
        reports_beside(out, config.optimisation.report_to),
        run_directory(
            training,
            begun.options,
            files=(RECORDS,),
            begins=not begun.goes_on,
            writes=state.is_main_process,
        ),
    ):
        state.wait_for_everyone()
        done = last_state(training) if begun.goes_on else None
        progressed = squeezer.begin() if done is None else load_round(training, done, student)
        if state.is_main_process and watch.round:
            for record in progressed.records:  # those of before the kill
                watch.round(record, data.task.main_metric)
        stopped = squeezer.stopped(progressed)
        while stopped is None:
            progressed, stopped = squeezer.round(progressed, writes=state.is_main_process)
        state.wait_for_everyone()
        if not progressed.kept:
            student = _student(checkpoint, data, config, device)
        elif progressed.kept != len(progressed.records) or stopped == "not-finite":
            load_round(training, progressed.kept, student)
        state.wait_for_everyone()
    kept = progressed.records[progressed.kept - 1] if progressed.kept else None
    report = SqueezeReport(
        out=str(out),
        seconds=0.0,
        rounds=progressed.records,
        kept_round=progressed.kept,
        stopped=stopped,
        target_met=None if target is None else (kept.params if kept else before.params) <= target,
        target_params=target,
        metric=data.task.main_metric,
        reference=squeezer.reference(progressed),
        metrics=kept.metrics if kept else progressed.before,
        metrics_before=progressed.before,
        test_metrics={},
        trainable_params=count_trainable(student)[0],
        totals_before=before,
        totals=before,
        resumed_from=done or 0,
        is_writer=bool(state.is_main_process),
    )
    if report.is_writer:
        check_finite(student)
        round_to(student, stored_dtypes(student, checkpoint))  # as it was measured
        recorded = {**config.recorded(), "kept_round": progressed.kept}
        with output_directory(out) as work:
            if config.data.tokenizer:
                data.tokenizer.save_pretrained(work)
            write_records(work / RECORDS, progressed.records)
            totals = write_trained(
                work,
                student,
                checkpoint,
                "squeeze",
                recorded,
                seed=config.optimisation.seed,
                metrics=report.metrics,
                more={"rounds": [asdict(record) for record in progressed.records]},
            )
        discard(training)
        test = evaluate(student, data, config.data, split="test")
        seconds = time.perf_counter() - started
        report = replace(report, seconds=seconds, test_metrics=test, totals=totals)
    state.wait_for_everyone()
    return report


def _student(checkpoint: Checkpoint, data: TaskData, config: SqueezeConfig, device: torch.device) -> Any:
    model = load_student(checkpoint, data, trust_remote_code=config.trust_remote_code).to(device)
    set_update(model, config.update)
    set_recompute(model, config.recompute_weights)
    return model


def _totals(model: Any, checkpoint: Checkpoint) -> Totals:
    """Of the model as it is loaded: a class with a head has parameters that the files of a bare body lack."""
    found = checkpoint.totals()
    more = sum(parameter.numel() for parameter in model.parameters()) - found.params
    params, dense, size = found.params + more, found.dense_params + more, more * checkpoint.reader.main_dtype.itemsize
    return Totals(params, dense, params / dense, found.bytes + size, found.dense_bytes + size)
