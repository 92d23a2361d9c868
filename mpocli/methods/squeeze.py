"""squeeze: shrink an MPO checkpoint bond by bond, with a little fine-tuning after each, as long as it stays good."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from mpocli.errors import InputError, UsageError
from mpocli.hf.artifact import Checkpoint, write_trained
from mpocli.hf.shrink import mpo_modules, set_mpo
from mpocli.io.manifest import Totals
from mpocli.io.output import check_output, output_directory
from mpocli.methods.device import device_of
from mpocli.methods.run_directory import check_begun, run_directory, training_directory
from mpocli.methods.segment_state import last_state
from mpocli.methods.squeeze_choice import Bond, Order, Spectra, Step, Widths, at_once, best, candidates, groups
from mpocli.methods.squeeze_state import (
    RECORDS,
    Cut,
    Progressed,
    RoundRecord,
    load_round,
    save_round,
    write_records,
)
from mpocli.methods.student import check_finite, count_trainable, load_student, roles_of, round_to
from mpocli.methods.task_data import DataOptions, TaskData, check_trained_head, evaluate, prepare
from mpocli.mpo import MPO, BondCut, cut_bond, stored_error
from mpocli.nn import MPOModule
from mpocli.train.moments import cut_moments, take_moments
from mpocli.train.processes import on_first, processes, set_seed
from mpocli.train.segment import (
    Optimisation,
    Place,
    Schedule,
    SegmentTrainer,
    Steps,
    check_report_to,
    last_checkpoint,
    train_segment,
)
from mpocli.train.updates import set_recompute, set_update

# Batches of training data on which `--order sensitivity` measures the loss.
SENSITIVITY_BATCHES = 2
# Shorter rounds are trained again from their beginning after a kill; longer ones keep checkpoints.
_LONG_ROUND = 199
_SEGMENT = "segment"


@dataclass(frozen=True)
class SqueezeConfig:
    """Options of `mpocli squeeze`. At least one of `max_drop` and the targets says when to stop."""

    data: DataOptions
    optimisation: Optimisation = field(default_factory=Optimisation)
    max_drop: float | None = None
    reference: float | None = None
    target_params: int | None = None
    target_ratio: float | None = None
    target_bytes: int | None = None
    rounds: int | None = None
    finetune_steps: int = 100
    step: Step = Step(share=0.05)  # noqa: RUF009 (frozen)
    order: Order = "error"
    per_param: bool = False
    tie: str = "matrix"
    direct: bool = False
    patience: int = 0
    update: str = "auxiliary"
    layers: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    recompute_weights: bool = False
    device: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

    def recorded(self) -> dict[str, Any]:
        """The options for the manifest, nothing of the machine."""
        options = {**self.data.recorded(), **asdict(self.optimisation)}
        for left_out in ("seed", "report_to", "log_steps", "save_steps"):
            del options[left_out]
        names = ["max_drop", "reference", "target_params", "target_ratio", "target_bytes", "rounds", "finetune_steps"]
        names += ["order", "per_param", "tie", "direct", "patience", "update", "layers", "ignore"]
        step = f"{100 * self.step.share:g}%" if self.step.share else self.step.dims
        return options | {name: getattr(self, name) for name in names} | {"step": step}


@dataclass(frozen=True)
class SqueezeReport:
    """What a squeeze did: every round, the one that was kept (0: the model as it came), and why it ended.

    `stopped` is `target`, `max-drop`, `rounds` or `exhausted` (every bond is 1); `target_met` is None where there was
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


@dataclass(frozen=True)
class Watch:
    """Who is told: `step` of (done, total, line) within a round, `round` of every finished one."""

    step: Callable[[int, int, str], None] | None = None
    round: Callable[[RoundRecord], None] | None = None


def run(
    model: str,
    config: SqueezeConfig,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    watch: Watch = Watch(),
) -> SqueezeReport:
    """Dimension squeezing (MPOP, ACL 2021, Alg. 2) of a fine-tuned MPO checkpoint into a new directory `out`.

    Each round cuts the bond (or tied bonds) next to a central core that costs least, fine-tunes for some steps and
    evaluates; the last model inside the allowed drop is written. `config.direct` cuts to the target at once and
    trains one round instead. While it lasts, `<out>.training` holds the newest round, from which `resume` goes on.
    Raises `UsageError` and `InputError` for what cannot be squeezed, `NumericsError` where training leaves the
    finite numbers.
    """
    started = time.perf_counter()
    _check_options(config)
    device = device_of(config.device)
    state = processes(device)
    if state.num_processes > 1:
        device = state.device
    checkpoint = Checkpoint.open(model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    if resume and not training_directory(out).exists() and (out / "config.json").is_file():
        raise InputError(f"{out}: this run is finished, there is nothing to resume", hint="--overwrite begins anew")
    check_output(out, checkpoint.source.directory, overwrite=overwrite)
    if not checkpoint.is_mpo:
        raise InputError(f"{model}: has no MPOs to squeeze", hint="run mpocli decompose, then mpocli finetune")
    before = checkpoint.totals()
    target = _target_params(config, checkpoint, before)
    check_report_to(config.optimisation.report_to)
    training = training_directory(out)
    options = {**config.recorded(), "seed": config.optimisation.seed, "input_sha256": checkpoint.reader.sha256}
    options["processes"] = state.num_processes
    goes_on = check_begun(training, options, resume=resume, overwrite=overwrite)
    data = prepare(checkpoint, config.data, needs_train=config.finetune_steps > 0 or config.order == "sensitivity")
    check_trained_head(checkpoint, data)
    if not data.eval:
        raise UsageError("squeeze needs --eval FILE: it decides on development data", hint="name the dev split")

    set_seed(config.optimisation.seed)
    student = load_student(checkpoint, data, trust_remote_code=config.trust_remote_code).to(device)
    set_update(student, config.update)
    set_recompute(student, config.recompute_weights)
    squeezer = _Squeezer(student, config, checkpoint, data, training, target, before, device, watch)
    state.wait_for_everyone()
    with run_directory(
        training,
        options,
        files=(RECORDS,),
        begins=not goes_on,
        writes=state.is_main_process,
        worth_keeping=lambda: last_state(training) is not None,
    ):
        state.wait_for_everyone()
        done = last_state(training) if goes_on else None
        progressed = squeezer.begin() if done is None else load_round(training, done, student)
        stopped = None
        while stopped is None:
            progressed, stopped = squeezer.round(progressed, writes=state.is_main_process)
        state.wait_for_everyone()
        if not progressed.kept:
            student = load_student(checkpoint, data, trust_remote_code=config.trust_remote_code)
        elif progressed.kept != len(progressed.records):
            load_round(training, progressed.kept, student)
        state.wait_for_everyone()
    kept = progressed.records[progressed.kept - 1] if progressed.kept else None
    params = kept.params if kept else before.params
    report = SqueezeReport(
        out=str(out),
        seconds=0.0,
        rounds=progressed.records,
        kept_round=progressed.kept,
        stopped=stopped,
        target_met=None if target is None else params <= target,
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
        metrics = report.metrics
        if checkpoint.stored_dtype != torch.float32:  # measured is what is stored
            round_to(student, checkpoint.stored_dtype)
            metrics = evaluate(student, data, config.data)
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
                metrics=metrics,
                more={"rounds": [asdict(record) for record in progressed.records]},
            )
        shutil.rmtree(training, ignore_errors=True)
        test = evaluate(student, data, config.data, split="test")
        seconds = time.perf_counter() - started
        report = replace(report, seconds=seconds, metrics=metrics, test_metrics=test, totals=totals)
    state.wait_for_everyone()
    return report


def _check_options(config: SqueezeConfig) -> None:
    targets = (config.target_params, config.target_ratio, config.target_bytes)
    if config.max_drop is None and all(target is None for target in targets):
        raise UsageError(
            "nothing says when to stop",
            hint="pass --max-drop 0.01, --target-ratio 0.5, --target-params or --target-bytes",
        )
    if config.direct and all(target is None for target in targets):
        raise UsageError("--direct truncates to a target, and --max-drop is none", hint="pass --target-params N")
    if config.direct and config.order == "sensitivity":
        raise UsageError("--direct ranks by spectra alone", hint="use --order error or entropy")


def _target_params(config: SqueezeConfig, checkpoint: Checkpoint, before: Totals) -> int | None:
    """The most parameters that all targets together allow; `UsageError` where there is nothing to do."""
    limits = {}
    if config.target_params is not None:
        limits[f"--target-params {config.target_params:,}"] = config.target_params
    if config.target_ratio is not None:
        limits[f"--target-ratio {config.target_ratio:g}"] = int(config.target_ratio * before.dense_params)
    if config.target_bytes is not None:
        # What is in the files beside the cores stays; headers change by some bytes.
        too_many = max(0, before.bytes - config.target_bytes)
        kept = before.params - math.ceil(too_many / checkpoint.stored_dtype.itemsize)
        limits[f"--target-bytes {config.target_bytes:,}"] = kept if too_many else before.params
    if not limits:
        return None
    option = min(limits, key=limits.__getitem__)
    if limits[option] >= before.params:
        raise UsageError(
            f"{option}: the checkpoint has {before.params:,} parameters ({before.ratio:.3f} of dense, "
            f"{before.bytes:,} bytes) already",
            hint="choose less",
        )
    return limits[option]


class _Squeezer:
    """One squeeze: the model that shrinks, and everything that stays."""

    def __init__(
        self,
        model: Any,
        config: SqueezeConfig,
        checkpoint: Checkpoint,
        data: TaskData,
        directory: Path,
        target: int | None,
        before: Totals,
        device: torch.device,
        watch: Watch,
    ) -> None:
        self.model, self.config, self.data, self.directory = model, config, data, directory
        self.target, self.before, self.device, self.watch = target, before, device, watch
        self.roles = roles_of(model, checkpoint)
        self.modules = _chosen(mpo_modules(model), self.roles, config)
        self.tied = groups(self.modules, self.roles, config.tie)
        self.start = {name: module.sites.num_params(module.bond_dims) for name, module in self.modules.items()}

    def begin(self) -> Progressed:
        if self.watch.step:
            self.watch.step(0, max(1, self.config.finetune_steps), "evaluating")
        return Progressed((), {}, 0, on_first(lambda: evaluate(self.model, self.data, self.config.data)))

    def reference(self, state: Progressed) -> float:
        """The metric that the drop is measured from."""
        found = self.config.reference
        return state.before[self.data.task.main_metric] if found is None else found

    def params(self) -> int:
        """Of the whole model, now."""
        now = sum(module.sites.num_params(module.bond_dims) for module in self.modules.values())
        return self.before.params - sum(self.start.values()) + now

    def round(self, state: Progressed, *, writes: bool) -> tuple[Progressed, str | None]:
        """Cut, train, evaluate, save. Returns the state after it, and why there is no next round, None if there is."""
        config, number = self.config, len(state.records) + 1
        stopped = self._stop(state)
        if stopped is not None:
            return state, stopped
        # One process chooses: sums that differ in the last bit must not lead to different models.
        to = on_first(self._choice)
        if not to:
            return state, "exhausted"
        cuts = self._cut(to, state)
        moments = state.moments
        if config.finetune_steps:
            moments = self._train(number, state)
        metrics = on_first(lambda: evaluate(self.model, self.data, config.data))
        params = self.params()
        drop = self.reference(state) - metrics[self.data.task.main_metric]
        drop = drop if self.data.task.greater_is_better else -drop
        record = RoundRecord(number, cuts, params, params / self.before.dense_params, metrics, drop)
        inside = config.max_drop is None or drop <= config.max_drop
        state = Progressed((*state.records, record), moments, number if inside else state.kept, state.before)
        if writes:
            save_round(self.directory, self.model, state)
            shutil.rmtree(self.directory / f"{_SEGMENT}-{number}", ignore_errors=True)
        if self.watch.round:
            self.watch.round(record)
        return state, self._stop(state)

    def _stop(self, state: Progressed) -> str | None:
        outside = len(state.records) - state.kept
        if outside > self.config.patience:
            return "max-drop"
        if self.target is not None and self.params() <= self.target and not outside:
            return "target"
        if self.config.direct and state.records:
            return "target" if not outside else "max-drop"
        if self.config.rounds is not None and len(state.records) >= self.config.rounds:
            return "rounds"
        return None

    def _choice(self) -> dict[Bond, int]:
        config = self.config
        widths, spectra = Widths(self.modules), Spectra(self.modules)
        save = None if self.target is None else max(1, self.params() - self.target)
        if config.direct:
            assert save is not None
            how: Any = {"per_param": config.per_param, "save": save}
            return at_once(self.tied, widths, spectra, config.step, config.order, **how)
        found = candidates(self.tied, widths, spectra, config.step, save=save)
        if not found:
            return {}
        chosen = best(found, config.order, spectra, widths, per_param=config.per_param, loss_after=self._loss_after)
        return chosen.to

    def _cut(self, to: Mapping[Bond, int], state: Progressed) -> tuple[Cut, ...]:
        """Cut the bonds for good; the optimiser's state follows."""
        cuts = []
        for bond, width in to.items():
            before = self.modules[bond.module].to_mpo()
            after, cut = cut_bond(before, bond.bond, width)
            set_mpo(self.model, bond.module, after)
            cut_moments(state.moments, bond.module, cut)
            cuts.append(self._recorded(bond, cut, before, after))
        return tuple(cuts)

    def _recorded(self, bond: Bond, cut: BondCut, before: MPO, after: MPO) -> Cut:
        true, _ = stored_error(before.to(dtype=torch.float64).to_matrix(), after)
        role = self.roles.get(bond.module)
        return Cut(bond.module, role, bond.bond, cut.before, cut.after, cut.error_bound, true)

    @torch.no_grad()
    def _loss_after(self, to: Mapping[Bond, int]) -> float:
        """The mean loss on a fixed sample of the training data with these bonds cut, which are then restored."""
        kept: dict[str, MPO] = {}
        for bond, width in to.items():
            mpo = self.modules[bond.module].to_mpo()
            kept.setdefault(bond.module, mpo)
            set_mpo(self.model, bond.module, cut_bond(mpo, bond.bond, width)[0])
        size = self.config.optimisation.batch_size
        collator = self.data.collator(self.config.optimisation.seed)
        sample = [self.data.train[k] for k in self._sample(size * SENSITIVITY_BATCHES)]
        was_training = self.model.training
        self.model.eval()
        losses = []
        for first in range(0, len(sample), size):
            batch = {key: value.to(self.device) for key, value in collator(sample[first : first + size]).items()}
            losses.append(float(self.model(**batch)["loss"]))
        self.model.train(was_training)
        for name, mpo in kept.items():
            set_mpo(self.model, name, mpo)
        return sum(losses) / len(losses)

    def _sample(self, count: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.config.optimisation.seed)
        order: list[int] = torch.randperm(len(self.data.train), generator=generator).tolist()
        return order[:count]

    def _train(self, number: int, state: Progressed) -> Any:
        """Fine-tune for one round, a training segment of its own; the optimiser's state after it."""
        config, steps = self.config, self.config.finetune_steps
        segment = self.directory / f"{_SEGMENT}-{number}"
        long = steps > (config.optimisation.save_steps or _LONG_ROUND)
        # The optimiser has to warm up once; afterwards its state goes on.
        warmup = math.ceil(config.optimisation.warmup * steps) if number == 1 else 0
        callbacks = [Steps(self.watch.step)] if self.watch.step else []
        trainer = SegmentTrainer(
            self.model,
            self.data.train,
            self.data.collator(config.optimisation.seed),
            config.optimisation,
            Schedule(steps, warmup),
            steps,
            segment,
            device=self.device,
            callbacks=callbacks,
            next_token=self.data.family == "causal",
            place=Place(number, (number - 1) * steps),
            moments=state.moments,
            checkpoints=long,
        )
        train_segment(trainer, last_checkpoint(segment) if long else None)
        return take_moments(self.model, trainer.optimizer)


def _chosen(
    modules: Mapping[str, MPOModule], roles: Mapping[str, str | None], config: SqueezeConfig
) -> dict[str, MPOModule]:
    """The modules that may shrink; `UsageError` where none is left, or a glob matches nothing."""
    for glob in config.ignore:
        if not any(fnmatchcase(name, glob) for name in modules):
            raise UsageError(f"--ignore {glob!r} matches no MPO", hint="mpocli inspect lists their names")
    found = {
        name: module
        for name, module in modules.items()
        if (config.layers is None or roles.get(name) in config.layers)
        and not any(fnmatchcase(name, glob) for glob in config.ignore)
    }
    if not found:
        raise UsageError(f"--layers {','.join(config.layers or ())}: no MPO is left", hint="mpocli inspect lists them")
    return found
