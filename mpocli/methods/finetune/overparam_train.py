"""Train chosen matrices as lossless MPOs, segment by segment, and fold them back to dense ones (OPF, ACL 2023)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from mpocli.config.overparam import Overparam
from mpocli.errors import InputError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.expand import expand
from mpocli.hf.replace import dense_shape, remove
from mpocli.methods.finetune.overparam import (
    Expanded,
    OverparamReport,
    check,
    interval,
    portion,
    scoring_steps,
    site_shape,
    top,
)
from mpocli.methods.training.fit import fit
from mpocli.methods.training.run import TrainingRun
from mpocli.methods.training.schedule import warmed_up
from mpocli.methods.training.state import drop_states, last_state, load_state, save_state
from mpocli.methods.training.student import count_trainable, has_head, load_student
from mpocli.mpo import MPO, SiteShape
from mpocli.nn.logits import rows_at_once
from mpocli.train.importance import GradientScores, mean_loss, zeroed_losses
from mpocli.train.loop.distill import Distillation
from mpocli.train.loop.optimizer_state import Moments, expand_moments, take_moments
from mpocli.train.loop.processes import on_first
from mpocli.train.loop.schedule import SegmentPlace
from mpocli.train.models import vocabulary_of

_SEGMENT, _SCORING = "segment", "scoring"


@dataclass(frozen=True)
class _Chain:
    """Where the chain of segments stands: steps done, what was expanded, scores so far, the optimiser's state."""

    number: int = 0
    step: int = 0
    expanded: tuple[Expanded, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    moments: Moments = field(default_factory=dict)


def train(run: TrainingRun, options: Overparam, distillation: Distillation | None = None) -> OverparamReport:
    """Train the student in place with over-parameterised matrices, and fold it back to the dense model it was.

    A chain of segments: every expansion ends one, and the next begins with a new optimiser that owns exactly the
    live tensors, whose state continues the old one's. A run that goes on does so from the newest state or checkpoint
    in its directory.
    """
    model = run.student
    groups = check(model, run.checkpoint, options)
    chain, score_steps = _Chain(), 0
    done = last_state(run.directory) if run.setup.goes_on else None
    if done is not None:
        chain, score_steps = _resumed(run, done)
    elif options.method == "svd":
        chain = _expanded(chain, model, groups, options, [name for members in groups.values() for name in members], {})
    elif options.method == "static":
        scores, score_steps = _static_scores(run, options, groups)
        chosen = top(groups, scores, options.top_n)
        chain = _expanded(replace(chain, scores=scores), model, groups, options, chosen, scores)
    if done is None:
        _save(run, chain, score_steps)
    budget = run.steps - score_steps
    every = interval(options, budget)
    while chain.step < budget:
        taken = [expanded.module for expanded in chain.expanded]
        splits_done = len({expanded.step for expanded in chain.expanded})
        expands = options.method == "dynamic" and splits_done < options.splits and chain.step + every < budget
        left = [name for members in groups.values() for name in members if name not in taken] if expands else []
        until = chain.step + every if expands else budget
        chain = _train_segment(run, chain, left, until, budget, distillation)
        if expands:
            scores = on_first(partial(dict, chain.scores))  # sums may differ in the last bit between devices
            chosen = top(groups, scores, portion(options, splits_done), taken)
            chain = _expanded(replace(chain, scores=scores), model, groups, options, chosen, scores)
        _save(run, chain, score_steps)
    return _folded(run, chain, options, score_steps)


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
        sites = site_shape(name, shape, options)
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


def _train_segment(
    run: TrainingRun, chain: _Chain, left: Sequence[str], until: int, total: int, distillation: Distillation | None
) -> _Chain:
    """Train from the chain's step until another one, adding up gradient scores of the candidates that are left."""
    counted = GradientScores(
        [f"{name}.weight" for name in left],
        {f"{name}.weight": value for name, value in chain.scores.items()},
    )
    trainer = fit(
        run,
        warmed_up(run.optimisation, total, chain.step),
        steps=until - chain.step,
        segment=f"{_SEGMENT}-{chain.number}",
        callbacks=[counted],
        distillation=distillation,
        place=SegmentPlace(chain.number, chain.step),
        moments=chain.moments,
        # A segment that scores is short; after a kill it is trained again from its beginning.
        checkpoints=not left,
        raw=True,
    )
    scores = {name.removesuffix(".weight"): value for name, value in counted.scores.items()}
    return replace(
        chain,
        number=chain.number + 1,
        step=until,
        scores=chain.scores | scores,
        moments=take_moments(run.student, trainer.optimizer),
    )


def _static_scores(
    run: TrainingRun, options: Overparam, groups: Mapping[str, Sequence[str]]
) -> tuple[dict[str, float], int]:
    """|L − L_{W=0}| of every candidate on a copy that was fine-tuned first, and the steps which that took."""
    trusted = run.setup.config.trust_remote_code
    if options.score_from is not None:
        found = Checkpoint.open(options.score_from, trust_remote_code=trusted)
        if found.is_mpo or (run.data.family == "encoder" and not has_head(found)):
            raise InputError(
                f"--score-from {options.score_from}: not a dense model that was fine-tuned on this task",
                hint="name one that mpocli finetune wrote, without --overparam's MPOs",
            )
        copy, steps = load_student(found, run.data, trust_remote_code=trusted), 0
    else:
        # What is new in it was told of when the model itself was loaded.
        copy = load_student(run.checkpoint, run.data, trust_remote_code=trusted, warn=lambda line: None)
        steps = scoring_steps(options, run.steps)
        fit(
            run,
            warmed_up(run.optimisation, steps),
            model=copy,
            segment=_SCORING,
            is_logged=False,
            shown=run.steps,
            raw=True,
        )
    copy.to(run.device)
    weights = {name: copy.get_submodule(name).weight for members in groups.values() for name in members}
    chosen = run.optimisation
    batches = run.data.sample(chosen.batch_size, options.score_batches, chosen.seed, run.device)
    return on_first(lambda: zeroed_losses(lambda: mean_loss(copy, batches), weights)), steps


@torch.no_grad()
def _folded(run: TrainingRun, chain: _Chain, options: Overparam, score_steps: int) -> OverparamReport:
    """Fold, and measure what that changed."""
    model = run.student
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


def _save(run: TrainingRun, chain: _Chain, score_steps: int) -> None:
    if not run.is_writer:
        return
    record = {
        "step": chain.step,
        "score_steps": score_steps,
        "scores": chain.scores,
        "expanded": [asdict(expanded) for expanded in chain.expanded],
    }
    save_state(run.directory, chain.number, dict(run.student.named_parameters()), chain.moments, record)
    drop_states(run.directory, {chain.number})
    for left in (f"{_SEGMENT}-{chain.number - 1}", _SCORING):
        shutil.rmtree(run.directory / left, ignore_errors=True)


@torch.no_grad()
def _resumed(run: TrainingRun, number: int) -> tuple[_Chain, int]:
    model = run.student
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
