"""Over-parameterised fine-tuning (OPF, ACL 2023): chosen matrices train as lossless MPOs, then fold back to dense."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from mpocli.errors import InputError, UsageError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.expand import expand, overparam_shape, svd_shape
from mpocli.hf.replace import dense_shape, remove
from mpocli.methods.task_data import TaskData
from mpocli.methods.training.state import drop_states, last_state, load_state, save_state
from mpocli.methods.training.student import count_trainable, has_head, load_student, roles_of
from mpocli.mpo import MPO, SiteShape
from mpocli.nn.logits import rows_at_once
from mpocli.train.importance import GradientScores, mean_loss, zeroed_losses
from mpocli.train.models import vocabulary_of
from mpocli.train.moments import Moments, expand_moments, take_moments
from mpocli.train.processes import on_first
from mpocli.train.segment import (
    METRICS,
    MetricsFile,
    Optimisation,
    Place,
    Schedule,
    SegmentTrainer,
    Steps,
    last_checkpoint,
    train_segment,
)

Method = Literal["static", "dynamic", "svd"]
METHODS = ("static", "dynamic", "svd")
_SEGMENT, _SCORING = "segment", "scoring"


@dataclass(frozen=True)
class Overparam:
    """Options of `finetune --overparam`.

    `top_n` matrices of every group become MPOs (`svd`: all of them), `dynamic` in `splits` portions, one every
    `every` steps (default: so that the last comes half way). `sites` is the papers' m, `shapes` overrule it by glob.
    `static` scores a copy that was fine-tuned: `score_from` a directory, else for `score_steps` of the run's own steps
    (default: a quarter of them). Losses are means over `score_batches` batches of training data.
    """

    method: Method
    top_n: int = 4
    splits: int = 2
    every: int | None = None
    sites: int = 5
    shapes: tuple[tuple[str, SiteShape], ...] = ()
    layers: tuple[str, ...] = ("attention", "ffn")
    score_from: str | None = None
    score_steps: int | None = None
    score_batches: int = 8

    def recorded(self) -> dict[str, Any]:
        """For the manifest."""
        options = {f"overparam_{key}": value for key, value in asdict(self).items() if key not in ("method", "shapes")}
        options["overparam_score_from"] = self.score_from and Path(self.score_from).name
        shapes = [f"{glob}={shape}" for glob, shape in self.shapes]
        return {"overparam": self.method, **options, "overparam_shapes": shapes}


@dataclass(frozen=True)
class Expanded:
    """One matrix that became an MPO: after which step, of which group, with what score (None: not scored)."""

    module: str
    group: str
    step: int
    score: float | None
    out_dims: tuple[int, ...]
    in_dims: tuple[int, ...]
    bond_dims: tuple[int, ...]
    params: int
    dense_params: int

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Expanded:
        """From JSON, which has lists."""
        dims = {key: tuple(data[key]) for key in ("out_dims", "in_dims", "bond_dims")}
        return cls(**{**data, **dims})


@dataclass(frozen=True)
class OverparamReport:
    """What over-parameterisation did.

    `scores` of every candidate (empty for `svd`), `training_params` of the whole model while the last segment trained
    (`trainable_by_role` of them in the optimiser), `deployed_params` after folding, and `fold_difference` = max |logit
    difference| of a batch before and after it, beside the largest logit.
    """

    method: str
    expanded: tuple[Expanded, ...]
    scores: dict[str, float]
    score_steps: int
    training_params: int
    trainable_by_role: dict[str, int]
    deployed_params: int
    fold_difference: float
    largest_logit: float

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> OverparamReport:
        """From JSON."""
        return cls(**{**data, "expanded": tuple(Expanded.from_dict(found) for found in data["expanded"])})


@dataclass(frozen=True)
class Run:
    """What the training of any method needs: the data and how to optimise, for so many steps."""

    checkpoint: Checkpoint
    data: TaskData
    optimisation: Optimisation
    steps: int
    directory: Path
    device: torch.device
    writes: bool
    progress: Callable[[int, int, str], None] | None = None
    distillation: Any = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class _Chain:
    """Where the chain of segments stands: steps done, what was expanded, scores so far, the optimiser's state."""

    number: int = 0
    step: int = 0
    expanded: tuple[Expanded, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    moments: Moments = field(default_factory=dict)


def candidates(model: Any, roles: Mapping[str, str | None], layers: Sequence[str]) -> dict[str, list[str]]:
    """The dense linear modules that may be expanded, by group: modules whose names differ by layer numbers alone.

    Tied weights are left out. Raises `UsageError` where there are none.
    """
    tied = {name.removesuffix(".weight") for pair in (model.all_tied_weights_keys or {}).items() for name in pair}
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        shape = dense_shape(module)
        if shape is None or shape[0] == "embedding" or roles.get(name) not in layers or name in tied:
            continue
        found.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), []).append(name)
    if not found:
        raise UsageError(f"--layers {','.join(layers)}: no matrix to over-parameterise", hint="name attention or ffn")
    return found


def top(
    groups: Mapping[str, Sequence[str]], scores: Mapping[str, float], count: int, taken: Sequence[str] = ()
) -> list[str]:
    """Of every group the `count` best that were not taken yet, the first of equals."""
    chosen = []
    for members in groups.values():
        left = [name for name in members if name not in taken]
        chosen += sorted(left, key=lambda name: -scores[name])[:count]
    return chosen


def train(model: Any, run: Run, options: Overparam, *, resume: bool) -> OverparamReport:
    """Train `model` in place with over-parameterised matrices, and fold it back to the dense model it was.

    A chain of segments: every expansion ends one, and the next begins with a new optimiser that owns exactly the
    live tensors, whose state continues the old one's. With `resume` it goes on from the newest state or checkpoint
    in `run.directory`.
    """
    groups = check(model, run.checkpoint, options)
    chain, score_steps = _Chain(), 0
    done = last_state(run.directory) if resume else None
    if done is not None:
        chain, score_steps = _resumed(run, done, model, options)
    elif options.method == "svd":
        chain = _expanded(chain, model, groups, options, [name for members in groups.values() for name in members], {})
    elif options.method == "static":
        scores, score_steps = _static_scores(run, options, groups)
        chosen = top(groups, scores, options.top_n)
        chain = _expanded(replace(chain, scores=scores), model, groups, options, chosen, scores)
    if done is None:
        _save(run, chain, score_steps, model)
    budget = run.steps - score_steps
    every = _interval(options, budget)
    while chain.step < budget:
        taken = [expanded.module for expanded in chain.expanded]
        splits_done = len({expanded.step for expanded in chain.expanded})
        expands = options.method == "dynamic" and splits_done < options.splits and chain.step + every < budget
        left = [name for members in groups.values() for name in members if name not in taken] if expands else []
        chain = _train_segment(run, model, chain, left, chain.step + every if expands else budget, budget)
        if expands:
            scores = on_first(partial(dict, chain.scores))  # sums may differ in the last bit between devices
            chosen = top(groups, scores, _portion(options, splits_done), taken)
            chain = _expanded(replace(chain, scores=scores), model, groups, options, chosen, scores)
        _save(run, chain, score_steps, model)
    return _folded(run, model, chain, options, score_steps)


def check_steps(options: Overparam, steps: int) -> None:
    """`UsageError` where a run of so many steps has no room for every portion, or for training after the scores."""
    if options.method == "static" and options.score_from is None and _scoring_steps(options, steps) >= steps:
        raise UsageError(
            f"--score-steps {_scoring_steps(options, steps)} of {steps} steps: none are left to train in",
            hint="lower --score-steps, or train for more steps",
        )
    if options.method != "dynamic":
        return
    last = options.splits * _interval(options, steps)
    if last >= steps:
        every = f"--every {options.every} with " if options.every else ""
        raise UsageError(
            f"{every}--splits {options.splits}: the last portion would come after step {last} of {steps}",
            hint=f"choose --every {(steps - 1) // options.splits} or less"
            if options.every and steps > options.splits
            else "lower --splits, or train for more steps",
        )


def _interval(options: Overparam, budget: int) -> int:
    """Steps between two portions."""
    return options.every or max(1, math.ceil(budget / (2 * options.splits)))


def _scoring_steps(options: Overparam, steps: int) -> int:
    """Of a run's steps, those that train a copy for the scores."""
    return options.score_steps if options.score_steps is not None else max(1, steps // 4)


def _portion(options: Overparam, done: int) -> int:
    """How many of a group's `top_n` the next expansion takes: as even as whole numbers allow."""
    before = options.top_n * done // options.splits
    return options.top_n * (done + 1) // options.splits - before


def check(model: Any, checkpoint: Checkpoint, options: Overparam) -> dict[str, list[str]]:
    """The candidates by group; `UsageError` or `InputError` for layers and shapes that fit nothing."""
    groups = candidates(model, roles_of(model, checkpoint), options.layers)
    names = [name for members in groups.values() for name in members]
    for glob, _ in options.shapes:
        if not any(fnmatchcase(name, glob) for name in names):
            raise UsageError(f"--shape {glob!r} matches none of the {len(names)} matrices", hint=f"such as {names[0]}")
    for name in names:
        found = dense_shape(model.get_submodule(name))
        assert found is not None
        _shape(name, found[1], options).check_fits(found[1], f"module {name}")
    return groups


def _shape(name: str, shape: tuple[int, int], options: Overparam) -> SiteShape:
    for glob, given in options.shapes:
        if fnmatchcase(name, glob):
            return given
    return svd_shape(*shape) if options.method == "svd" else overparam_shape(*shape, options.sites)


def _expanded(
    chain: _Chain,
    model: Any,
    groups: Mapping[str, Sequence[str]],
    options: Overparam,
    chosen: Sequence[str],
    scores: Mapping[str, float],
) -> _Chain:
    """Expand the chosen matrices; their state in the optimiser goes to their cores."""
    group_of = {name: group for group, members in groups.items() for name in members}
    moments = dict(chain.moments)
    made = []
    for name in chosen:
        kind, shape = dense_shape(model.get_submodule(name)) or ("", (0, 0))
        sites = _shape(name, shape, options)
        mpo = expand(model, name, sites)
        expand_moments(moments, f"{name}.weight", name, mpo.cores, kind)
        made.append(
            Expanded(
                name,
                group_of[name],
                chain.step,
                scores.get(name),
                sites.out_dims,
                sites.in_dims,
                mpo.bond_dims,
                mpo.num_params,
                shape[0] * shape[1],
            )
        )
    return replace(chain, expanded=(*chain.expanded, *made), moments=moments)


def _train_segment(run: Run, model: Any, chain: _Chain, left: Sequence[str], until: int, total: int) -> _Chain:
    """Train from the chain's step until another one, adding up gradient scores of the candidates that are left."""
    first, steps = chain.step, until - chain.step
    chosen = run.optimisation
    segment = run.directory / f"{_SEGMENT}-{chain.number}"
    counted = GradientScores(
        [f"{name}.weight" for name in left],
        {f"{name}.weight": value for name, value in chain.scores.items()},
    )
    callbacks: list[Any] = [MetricsFile(run.directory / METRICS, first), counted]
    callbacks += [Steps(run.progress, first, total)] if run.progress else []
    trainer = SegmentTrainer(
        *(model, run.data.train, run.data.collator(chosen.seed), chosen),
        Schedule(total, math.ceil(chosen.warmup * total), first),
        steps,
        segment,
        device=run.device,
        callbacks=callbacks,
        distillation=run.distillation,
        next_token=run.data.family == "causal",
        place=Place(chain.number, first),
        moments=chain.moments,
        # A segment that scores is short; after a kill it is trained again from its beginning.
        checkpoints=not left,
        raw=True,
    )
    train_segment(trainer, last_checkpoint(segment))
    scores = {name.removesuffix(".weight"): value for name, value in counted.scores.items()}
    return replace(
        chain,
        number=chain.number + 1,
        step=until,
        scores=chain.scores | scores,
        moments=take_moments(model, trainer.optimizer),
    )


def _static_scores(run: Run, options: Overparam, groups: Mapping[str, Sequence[str]]) -> tuple[dict[str, float], int]:
    """|L − L_{W=0}| of every candidate on a copy that was fine-tuned first, and the steps which that took."""
    if options.score_from is not None:
        found = Checkpoint.open(options.score_from, trust_remote_code=run.trust_remote_code)
        if found.is_mpo or (run.data.family == "encoder" and not has_head(found)):
            raise InputError(
                f"--score-from {options.score_from}: not a dense model that was fine-tuned on this task",
                hint="name one that mpocli finetune wrote, without --overparam's MPOs",
            )
        copy, steps = load_student(found, run.data, trust_remote_code=run.trust_remote_code), 0
    else:
        # What is new in it was told of when the model itself was loaded.
        copy = load_student(run.checkpoint, run.data, trust_remote_code=run.trust_remote_code, warn=lambda line: None)
        steps = _scoring_steps(options, run.steps)
        chosen, directory = run.optimisation, run.directory / _SCORING
        trainer = SegmentTrainer(
            *(copy, run.data.train, run.data.collator(chosen.seed), chosen),
            Schedule(steps, math.ceil(chosen.warmup * steps)),
            steps,
            directory,
            device=run.device,
            callbacks=[Steps(run.progress, 0, run.steps)] if run.progress else [],
            next_token=run.data.family == "causal",
            raw=True,
        )
        train_segment(trainer, last_checkpoint(directory))
    copy.to(run.device)
    weights = {name: copy.get_submodule(name).weight for members in groups.values() for name in members}
    chosen = run.optimisation
    batches = run.data.sample(chosen.batch_size, options.score_batches, chosen.seed, run.device)
    return on_first(lambda: zeroed_losses(lambda: mean_loss(copy, batches), weights)), steps


@torch.no_grad()
def _folded(run: Run, model: Any, chain: _Chain, options: Overparam, score_steps: int) -> OverparamReport:
    """Fold, and measure what that changed."""
    training_params = sum(parameter.numel() for parameter in model.parameters())
    trainable = count_trainable(model)[1]
    (batch,) = run.data.sample(run.optimisation.batch_size, 1, run.optimisation.seed, run.device)
    samples, length = batch["input_ids"].shape
    rows = rows_at_once(samples, length, vocabulary_of(model.config))
    batch = {key: value[:rows] for key, value in batch.items()}
    model.to(run.device).eval()
    before = model(**batch)["logits"].float()
    remove(model)
    model.to(run.device)
    after = model(**batch)["logits"].float()
    return OverparamReport(
        method=options.method,
        expanded=chain.expanded,
        scores=chain.scores,
        score_steps=score_steps,
        training_params=training_params,
        trainable_by_role=trainable,
        deployed_params=sum(parameter.numel() for parameter in model.parameters()),
        fold_difference=float((after - before).abs().max()),
        largest_logit=float(before.abs().max()),
    )


# --- on disk ----------------------------------------------------------------------------------------------------------


def _save(run: Run, chain: _Chain, score_steps: int, model: Any) -> None:
    if not run.writes:
        return
    record = {
        "step": chain.step,
        "score_steps": score_steps,
        "scores": chain.scores,
        "expanded": [asdict(expanded) for expanded in chain.expanded],
    }
    save_state(run.directory, chain.number, dict(model.named_parameters()), chain.moments, record)
    drop_states(run.directory, {chain.number})
    for left in (f"{_SEGMENT}-{chain.number - 1}", _SCORING):
        shutil.rmtree(run.directory / left, ignore_errors=True)


@torch.no_grad()
def _resumed(run: Run, number: int, model: Any, options: Overparam) -> tuple[_Chain, int]:
    weights, moments, record = load_state(run.directory, number)
    expanded = tuple(Expanded.from_dict(found) for found in record["expanded"])
    for found in expanded:
        expand(model, found.module, SiteShape(found.out_dims, found.in_dims))
        made = model.get_submodule(found.module)
        if made.bond_dims != found.bond_dims:  # the matrix as it came has another rank than when it was expanded
            cores = tuple(weights[f"{found.module}.core_{k}"] for k in range(made.sites.sites))
            made.replace_cores(MPO(cores, made.shape))
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
    return _Chain(number, record["step"], expanded, record["scores"], moments), record["score_steps"]
