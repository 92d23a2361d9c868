"""finetune: train a checkpoint on a task; of an MPO checkpoint the auxiliary cores alone, if nothing else is said."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from mpocli.errors import InputError, UsageError
from mpocli.hf.artifact import Checkpoint, write_trained
from mpocli.hf.stored import round_to, stored_dtypes
from mpocli.io.claim import discard, writes_output
from mpocli.io.files import OutputFile
from mpocli.io.manifest import Totals
from mpocli.io.output import check_output, output_directory
from mpocli.methods import overparam
from mpocli.methods.overparam import Overparam, OverparamReport
from mpocli.methods.task_data import DataOptions, TaskData, evaluate, prepare
from mpocli.methods.training.directory import begin, reports_beside, run_directory, training_directory
from mpocli.methods.training.routing import RoutingChanges, apply_routing, gradient_mask, router_report, traits
from mpocli.methods.training.student import check_finite, count_trainable, learning_schedule, load_student, roles_of
from mpocli.methods.training.teacher import distillation_of
from mpocli.modes import OF_CORES, OF_CORES_ALONE, check_model
from mpocli.train.best import KeepBest
from mpocli.train.processes import on_first, set_seed
from mpocli.train.segment import (
    METRICS,
    MetricsFile,
    Optimisation,
    SegmentTrainer,
    Steps,
    last_checkpoint,
    last_loss,
    train_segment,
)
from mpocli.train.updates import set_recompute, set_update

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class FinetuneConfig:
    """Options of `mpocli finetune`. `epochs` counts where `steps` is None; `update` None stands for auxiliary cores
    where there are any and no experts, and for everything otherwise. `raise_layers` names the roles whose dense
    matrices train at `mpo_lr`: the sceptic's arm beside `overparam`."""

    data: DataOptions
    optimisation: Optimisation = field(default_factory=Optimisation)
    update: Annotated[str | None, OF_CORES_ALONE] = None
    epochs: float = 3.0
    steps: int | None = None
    select: str = "last"
    teacher: str | None = None
    distill_weight: float = 0.5
    temperature: float = 2.0
    distill_hidden: bool = False
    recompute_weights: Annotated[bool, OF_CORES] = False
    overparam: Overparam | None = None
    raise_layers: tuple[str, ...] = ()
    routing: RoutingChanges = field(default_factory=RoutingChanges)
    device: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

    def recorded(self) -> dict[str, Any]:
        """The options for the manifest: names of files without their folders, nothing of the machine."""
        options = {**self.data.recorded(), **asdict(self.optimisation)}
        options |= {key: getattr(self, key) for key in ("update", "epochs", "steps", "select")}
        if self.teacher:
            options |= {"teacher": Path(self.teacher).name, "distill_weight": self.distill_weight}
            options |= {"temperature": self.temperature, "distill_hidden": self.distill_hidden}
        if self.overparam:
            options |= self.overparam.recorded()
        if self.raise_layers:
            options |= {"overparam": "none", "overparam_layers": self.raise_layers}
        options |= self.routing.given()
        for left_out in ("seed", "report_to", "log_steps", "save_steps"):
            del options[left_out]
        return options


@dataclass(frozen=True)
class FinetuneReport:
    """What a run did.

    `metrics` on the evaluation set after training and `metrics_before`, `{}` without one; `trainable_params` is what
    the optimiser holds (at the end, before folding); `seconds` the whole run, `step_seconds` the training alone; `loss`
    the last that was logged, of the training data, None without a step. `overparam` says what became an MPO meanwhile,
    None where nothing was to; `routers` what those of experts did in training. `is_writer` is false in all but the
    first process of several, which measures and writes nothing.
    """

    out: str
    seconds: float
    step_seconds: float
    steps: int
    resumed_from: int
    update: str
    metrics: dict[str, float]
    metrics_before: dict[str, float]
    test_metrics: dict[str, float]
    selected_step: int
    trainable_params: int
    trainable_by_role: dict[str, int]
    totals: Totals
    truncated: dict[str, int]
    loss: float | None = None
    overparam: OverparamReport | None = None
    routers: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    is_writer: bool = True


@writes_output
def run(
    model: str,
    config: FinetuneConfig,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> FinetuneReport:
    """Fine-tune a directory or hub model into a new directory `out`; returns what the run measured.

    While it lasts, `<out>.training` holds its checkpoints and `metrics.jsonl`; `resume` goes on from the newest. `warn`
    is told of a head that begins at random. Under `accelerate launch` or torchrun every process calls this, and the
    first one writes. Raises `InputError` for data or a model that cannot be used, `NumericsError` where training leaves
    the finite numbers (the last good checkpoint stays), `UsageError` for options that contradict one another.
    """
    started = time.perf_counter()
    begun = begin(model, config, out, overwrite=overwrite, resume=resume)
    checkpoint, device, state, training = begun.checkpoint, begun.device, begun.state, begun.training
    _check_overparam(config, checkpoint, model)
    check_model(config, model, _traits(checkpoint, config))
    done = last_checkpoint(training) if begun.goes_on else None
    data = prepare(checkpoint, config.data, needs_train=True, holdout=config.select == "best")
    schedule, steps = learning_schedule(config, len(data.train), state.num_processes)

    set_seed(config.optimisation.seed)
    new: list[str] = []
    student = load_student(checkpoint, data, trust_remote_code=config.trust_remote_code, warn=new.append)
    routing = apply_routing(student, config.routing)
    update = config.update or ("auxiliary" if checkpoint.is_mpo and routing is None else "all")
    set_update(student, update)
    set_recompute(student, config.recompute_weights)
    teacher = distillation_of(config, data, checkpoint)
    raised = _raised(student, checkpoint, config)
    if config.overparam is not None:  # before the hours, not after
        overparam.check(student, checkpoint, config.overparam)
        overparam.check_steps(config.overparam, steps)
    callbacks: list[Any] = [MetricsFile(training / METRICS), *([Steps(progress)] if progress else [])]
    callbacks += gradient_mask(student, routing, config.optimisation.seed)
    if config.select == "best":
        callbacks.append(_keep_best(training, data, config))
    state.wait_for_everyone()  # all have looked for an interrupted run before one begins
    with (
        reports_beside(out, config.optimisation.report_to),
        run_directory(
            training,
            begun.options,
            files=(METRICS,),
            begins=not begun.goes_on,
            writes=state.is_main_process,
        ),
    ):
        state.wait_for_everyone()
        tells = progress if state.is_main_process else None
        for line in new if state.is_main_process else ():
            warn(line)
        if tells and data.eval:
            tells(0, steps, "evaluating")
        before = on_first(lambda: evaluate(student, data, config.data))
        set_seed(config.optimisation.seed)
        trained_from = time.perf_counter()
        expanded = None
        if config.overparam is not None:
            how = overparam.Run(
                checkpoint=checkpoint,
                data=data,
                optimisation=config.optimisation,
                steps=steps,
                directory=training,
                device=device,
                writes=bool(state.is_main_process),
                progress=progress,
                distillation=teacher,
                trust_remote_code=config.trust_remote_code,
            )
            expanded = overparam.train(student, how, config.overparam, resume=begun.goes_on)
        else:
            trainer = SegmentTrainer(
                student,
                data.train,
                data.collator(config.optimisation.seed),
                config.optimisation,
                schedule,
                steps,
                training,
                device=device,
                callbacks=callbacks,
                distillation=teacher,
                next_token=data.family == "causal",
                rates=raised,
            )
            train_segment(trainer, done)
        step_seconds = time.perf_counter() - trained_from
        routed = router_report(student)
    state.wait_for_everyone()  # the best weights are written by the first
    selected = _take_best(student, callbacks[-1]) if config.select == "best" else steps
    trainable = expanded.trainable_by_role if expanded else count_trainable(student)[1]
    report = FinetuneReport(
        out=str(out),
        seconds=0.0,
        step_seconds=step_seconds,
        steps=steps,
        resumed_from=int(done.name.rpartition("-")[2]) if done else 0,
        update=update,
        metrics={},
        metrics_before=before,
        test_metrics={},
        selected_step=selected,
        trainable_params=sum(trainable.values()),
        trainable_by_role=trainable,
        totals=checkpoint.totals(),
        truncated=data.truncated,
        loss=last_loss(training / METRICS),
        overparam=expanded,
        routers=routed,
        is_writer=bool(state.is_main_process),
    )
    if report.is_writer:
        check_finite(student)
        # Measured is what is stored: rounded, where a tensor's dtype is half precision.
        round_to(student, stored_dtypes(student, checkpoint))
        if tells and data.eval:
            tells(steps, steps, "evaluating")
        after = evaluate(student, data, config.data)
        recorded = {**config.recorded(), "update": update}
        seed = config.optimisation.seed
        with output_directory(out) as work:
            if config.data.tokenizer:
                data.tokenizer.save_pretrained(work)
            more: dict[str, Any] = {"overparam": asdict(expanded)} if expanded else {}
            more |= {"routers": dict(routed)} if routed else {}
            totals = write_trained(work, student, checkpoint, "finetune", recorded, seed=seed, metrics=after, more=more)
            shutil.copyfile(training / METRICS, work / METRICS)
        discard(training)
        test = evaluate(student, data, config.data, split="test")
        seconds = time.perf_counter() - started
        report = replace(report, seconds=seconds, metrics=after, test_metrics=test, totals=totals)
    state.wait_for_everyone()
    return report


def _traits(checkpoint: Checkpoint, config: FinetuneConfig) -> set[str]:
    """What a run trains that options may be about: a dense model's matrices can be made cores, or train like them."""
    made = config.overparam is not None or bool(config.raise_layers)
    return traits(checkpoint) | ({"cores"} if made else set())


def _check_overparam(config: FinetuneConfig, checkpoint: Checkpoint, model: str) -> None:
    if config.overparam is None:
        return
    if checkpoint.is_mpo:
        raise InputError(f"{model}: has MPOs already, and --overparam makes its own", hint="run mpocli merge first")
    if checkpoint.encodings:
        raise InputError(
            f"{model}: is sparse, and MPOs that are folded back would fill its zeros",
            hint="over-parameterise first, then run mpocli sparsify",
        )


def _raised(student: Any, checkpoint: Checkpoint, config: FinetuneConfig) -> dict[str, float]:
    """The dense matrices that train at `mpo_lr`, as if they were cores."""
    if not config.raise_layers:
        return {}
    chosen = config.optimisation
    rate = chosen.lr if chosen.mpo_lr is None else chosen.mpo_lr
    groups = overparam.candidates(student, roles_of(student, checkpoint), config.raise_layers)
    return {f"{name}.weight": rate for members in groups.values() for name in members}


def _keep_best(training: Path, data: TaskData, config: FinetuneConfig) -> KeepBest:
    def measure(model: Any) -> float:
        value = evaluate(model, data, config.data, split="held_out")[data.task.main_metric]
        return value if data.task.greater_is_better else -value

    return KeepBest(training / "best", measure)


def _take_best(model: Any, best: KeepBest) -> int:
    if best.step is None:
        raise UsageError("--select best: nothing was evaluated", hint="train for one epoch at least")
    best.restore(model)
    return best.step


def summary(out: str, seeds: tuple[int, ...], reports: Sequence[FinetuneReport]) -> SeedsReport:
    """Mean and sample standard deviation of every metric over the seeds."""
    names = reports[0].metrics
    values = {name: [report.metrics[name] for report in reports] for name in names}
    before = [report.metrics_before for report in reports]
    return SeedsReport(
        out=out,
        seeds=seeds,
        metrics={name: statistics.mean(found) for name, found in values.items()},
        metrics_std={name: statistics.stdev(found) if len(found) > 1 else 0.0 for name, found in values.items()},
        metrics_before={name: statistics.mean(found[name] for found in before) for name in before[0]},
        trainable_params=reports[0].trainable_params,
        totals=reports[0].totals,
        runs=tuple(reports),
    )


@dataclass(frozen=True)
class SeedsReport:
    """Several runs that differ by their seed alone; `metrics` are means over them, `metrics_std` their spread."""

    out: str
    seeds: tuple[int, ...]
    metrics: dict[str, float]
    metrics_std: dict[str, float]
    metrics_before: dict[str, float]
    trainable_params: int
    totals: Totals
    runs: tuple[FinetuneReport, ...]


def run_seeds(
    model: str,
    config: FinetuneConfig,
    out: Path,
    seeds: tuple[int, ...],
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> tuple[FinetuneReport, ...]:
    """One run a seed, in `out/seed-<k>`. Finished ones are not run again by `resume`."""
    places = {seed: out / f"seed-{seed}" for seed in seeds}
    finished = {seed: place.with_name(f"{place.name}.report.json") for seed, place in places.items()}
    if not resume:
        for seed, place in places.items():  # before hours of training, not after
            check_output(place, None, overwrite=overwrite)
            if finished[seed].exists() and not overwrite:
                raise InputError(f"{finished[seed]}: exists", hint="--resume goes on, --overwrite begins anew")
    elif not any(finished[seed].is_file() or training_directory(places[seed]).is_dir() for seed in seeds):
        raise InputError(f"{out}: no interrupted runs to resume", hint="run without --resume")
    reports = []
    for seed, place in places.items():
        if resume and finished[seed].is_file() and place.is_dir():
            reports.append(_read_report(finished[seed]))
            continue
        one = replace(config, optimisation=replace(config.optimisation, seed=seed))
        begun = training_directory(place).exists()
        reports.append(
            run(model, one, place, overwrite=overwrite, resume=resume and begun, progress=progress, warn=warn)
        )
        if reports[-1].is_writer:
            record = OutputFile("--seeds", finished[seed], overwrite=True)
            record.write_text(json.dumps(asdict(reports[-1])))
    if reports[-1].is_writer:
        for path in finished.values():
            path.unlink(missing_ok=True)
    return tuple(reports)


def _read_report(path: Path) -> FinetuneReport:
    values = json.loads(path.read_text())
    found = values["overparam"]
    values["totals"] = Totals(**values["totals"])
    values["overparam"] = found and OverparamReport.from_dict(found)
    return FinetuneReport(**values)
