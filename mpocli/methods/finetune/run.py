"""finetune: train a checkpoint on a task; of an MPO checkpoint the auxiliary cores alone, if nothing else is said."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mpocli.config.finetune import FinetuneConfig
from mpocli.config.of_model import check_model
from mpocli.errors import InputError, UsageError
from mpocli.hf.artifact import Checkpoint
from mpocli.io.claim import writes_output
from mpocli.io.totals import Totals
from mpocli.methods.data.scoring import evaluate
from mpocli.methods.finetune import overparam, overparam_train
from mpocli.methods.finetune.overparam import OverparamReport
from mpocli.methods.training.begin import begin
from mpocli.methods.training.fit import fit
from mpocli.methods.training.packed import settled_update
from mpocli.methods.training.routing import apply_routing, gradient_mask, router_report, traits
from mpocli.methods.training.run import TrainingRun, load
from mpocli.methods.training.schedule import warmed_up
from mpocli.methods.training.student import count_trainable, roles_of
from mpocli.methods.training.teacher import distillation_of
from mpocli.progress import Progress
from mpocli.train.loop.best import KeepBest
from mpocli.train.loop.metrics_file import METRICS, last_loss
from mpocli.train.loop.updates import set_recompute, set_update


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


@dataclass(frozen=True)
class _Trained:
    """What training was and did, beside the student that it left."""

    update: str
    metrics_before: dict[str, float]
    selected_step: int
    trainable_by_role: dict[str, int]
    loss: float | None
    overparam: OverparamReport | None
    routers: Mapping[str, dict[str, Any]]

    def more(self) -> dict[str, Any]:
        """For the manifest."""
        found: dict[str, Any] = {"overparam": asdict(self.overparam)} if self.overparam else {}
        return found | ({"routers": dict(self.routers)} if self.routers else {})


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
    setup = begin(model, config, out, overwrite=overwrite, resume=resume)
    _check_overparam(config, setup.checkpoint, model)
    check_model(config, model, _traits(setup.checkpoint, config))
    training = load(setup, holdout=config.select == "best", progress=progress, warn=warn)
    trained = train(training, config)
    written = training.write("finetune", recorded={"update": trained.update}, more=trained.more())
    return FinetuneReport(
        out=str(out),
        seconds=time.perf_counter() - started,
        step_seconds=training.step_seconds,
        steps=training.steps,
        resumed_from=setup.resumed_from,
        update=trained.update,
        metrics=written.metrics,
        metrics_before=trained.metrics_before,
        test_metrics=written.test_metrics,
        selected_step=trained.selected_step,
        trainable_params=sum(trained.trainable_by_role.values()),
        trainable_by_role=trained.trainable_by_role,
        totals=written.totals,
        truncated=training.data.truncated,
        loss=trained.loss,
        overparam=trained.overparam,
        routers=trained.routers,
        is_writer=written.is_writer,
    )


def train(run: TrainingRun, config: FinetuneConfig) -> _Trained:
    """Train all or a part of the student, in the end with the weights that are to be kept."""
    student, checkpoint, seed = run.student, run.checkpoint, config.optimisation.seed
    routing = apply_routing(student, config.routing)
    usual = "auxiliary" if checkpoint.is_mpo and routing is None else "all"
    update = settled_update(student, config.update, usual, run.warn if run.is_writer else lambda line: None)
    set_update(student, update)
    set_recompute(student, config.recompute_weights)
    teacher = distillation_of(config.distillation, run.data, checkpoint, trust_remote_code=config.trust_remote_code)
    raised = _raised(student, checkpoint, config)
    if config.overparam is not None:  # before the hours, not after
        overparam.check(student, checkpoint, config.overparam)
        overparam.check_steps(config.overparam, run.steps)
    best = _keep_best(run) if config.select == "best" else None
    expanded = None
    with run.underway(METRICS):
        before = run.measure_before()
        if config.overparam is not None:
            expanded = overparam_train.train(run, config.overparam, teacher)
        else:
            callbacks = [*gradient_mask(student, routing, seed), *([best] if best else [])]
            schedule = warmed_up(config.optimisation, run.steps)
            fit(run, schedule, callbacks=callbacks, distillation=teacher, rates=raised)
        return _Trained(
            update=update,
            metrics_before=before,
            routers=router_report(student),
            selected_step=best.restore(student) if best else run.steps,
            trainable_by_role=expanded.trainable_by_role if expanded else count_trainable(student)[1],
            loss=last_loss(run.directory / METRICS),
            overparam=expanded,
        )


def _traits(checkpoint: Checkpoint, config: FinetuneConfig) -> set[str]:
    """What a run trains that options may be about: a dense model's matrices can be made cores, or train like them."""
    made = config.overparam is not None or bool(config.raise_layers)
    return traits(checkpoint) | ({"cores"} if made else set())


def _check_overparam(config: FinetuneConfig, checkpoint: Checkpoint, model: str) -> None:
    if config.overparam is None:
        return
    if config.select == "best":
        raise UsageError("--select best: over-parameterised shapes change in between", hint="leave one of them out")
    if checkpoint.is_mpo:
        raise InputError(f"{model}: has MPOs already, and --overparam makes its own", hint="run mpocli merge first")
    if checkpoint.encodings:
        raise InputError(
            f"{model}: is sparse, and MPOs that are folded back would fill its zeros"
            if any(encoding.holds_zeros for encoding in checkpoint.encodings.values())
            else f"{model}: is stored in few bits, and MPOs that are folded back would not fit its grids",
            hint="over-parameterise first, then run mpocli sparsify or quantize",
        )


def _raised(student: Any, checkpoint: Checkpoint, config: FinetuneConfig) -> dict[str, float]:
    """The dense matrices that train at `mpo_lr`, as if they were cores."""
    if not config.raise_layers:
        return {}
    chosen = config.optimisation
    rate = chosen.lr if chosen.mpo_lr is None else chosen.mpo_lr
    groups = overparam.candidates(student, roles_of(student, checkpoint), config.raise_layers)
    return {f"{name}.weight": rate for members in groups.values() for name in members}


def _keep_best(run: TrainingRun) -> KeepBest:
    data = run.data

    def measure(model: Any) -> float:
        value = evaluate(model, data, run.options, split="held_out")[data.task.main_metric]
        return value if data.task.greater_is_better else -value

    return KeepBest(run.directory / "best", measure)
