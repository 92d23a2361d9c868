"""Sparse training (PST, IJCAI 2022; gradual magnitude and movement pruning as baselines) of one checkpoint."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from mpocli.hf.artifact import write_trained
from mpocli.hf.encoded import encodings_of
from mpocli.hf.packing import set_encodings
from mpocli.hf.replace import dense_shape, local_name
from mpocli.hf.roles import role_of
from mpocli.hf.stored import round_to, stored_dtypes
from mpocli.io.claim import discard
from mpocli.io.encodings.base import Encoding
from mpocli.io.encodings.bitmask import Bitmask
from mpocli.io.manifest import Totals
from mpocli.io.output import output_directory
from mpocli.methods.sparsify_config import SparsifyConfig
from mpocli.methods.sparsify_plan import Target
from mpocli.methods.sparsify_write import SparseTensor, described
from mpocli.methods.task_data import evaluate, prepare
from mpocli.methods.training.directory import Begun, reports_beside, run_directory
from mpocli.methods.training.student import check_finite, learning_schedule, load_student
from mpocli.methods.training.teacher import distillation_of
from mpocli.nn import MPOModule
from mpocli.nn.masked import MaskedWeight
from mpocli.train.processes import on_first, set_seed
from mpocli.train.segment import METRICS, MetricsFile, SegmentTrainer, Steps, last_checkpoint, train_segment
from mpocli.train.sparsity import Place, SparsitySteps, fold_masks, put_masks, train_only

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Trained:
    """What sparse training did; `trainable_by_kind` counts update, score, head, auxiliary and other parameters."""

    tensors: tuple[SparseTensor, ...]
    totals: Totals
    metrics: dict[str, float]
    metrics_before: dict[str, float]
    test_metrics: dict[str, float]
    trainable_by_kind: dict[str, int]
    dense_and_scores: int
    steps: int
    step_seconds: float
    resumed_from: int
    truncated: dict[str, int]
    is_writer: bool


def run(
    begun: Begun,
    config: SparsifyConfig,
    targets: Sequence[Target],
    out: Path,
    *,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Train with masks whose sparsity follows the schedule, make the masked weights the weights, and write them."""
    checkpoint, state, training = begun.checkpoint, begun.state, begun.training
    options, seed = config.data, config.optimisation.seed
    assert options is not None
    done = last_checkpoint(training) if begun.goes_on else None
    data = prepare(checkpoint, options, needs_train=True)
    learning, steps = learning_schedule(config, len(data.train), state.num_processes)
    set_seed(seed)
    new: list[str] = []
    student = load_student(checkpoint, data, trust_remote_code=config.trust_remote_code, warn=new.append)
    teacher = distillation_of(config, data, checkpoint)
    dense = sum(parameter.numel() for parameter in student.parameters())
    sparse_before = encodings_of(student)
    places = [_place(student, target, sparse_before) for target in targets]
    state.wait_for_everyone()  # all have looked for an interrupted run before one begins
    with (
        reports_beside(out, config.optimisation.report_to),
        run_directory(
            training, begun.options, files=(METRICS,), begins=not begun.goes_on, writes=state.is_main_process
        ),
    ):
        state.wait_for_everyone()
        tells = progress if state.is_main_process else None
        for line in new if state.is_main_process else ():
            warn(line)
        if tells and data.eval:
            tells(0, steps, "evaluating")
        before = on_first(lambda: evaluate(student, data, options))
        masked = put_masks(
            student, places, config.scoring, config.pattern, together=config.scope == "global", seed=seed
        )
        kinds = _kinds(student, masked, is_classifier=data.family == "encoder")
        _freeze(student, kinds, config)
        trainable = _counted(student, kinds)
        callbacks: list[Any] = [SparsitySteps(masked, config.schedule(steps)), MetricsFile(training / METRICS)]
        callbacks += [Steps(progress)] if progress else []
        score_lr = config.optimisation.lr if config.score_lr is None else config.score_lr
        set_seed(seed)
        began = time.perf_counter()
        trainer = SegmentTrainer(
            student,
            data.train,
            data.collator(seed),
            config.optimisation,
            learning,
            steps,
            training,
            device=begun.device,
            callbacks=callbacks,
            distillation=teacher,
            next_token=data.family == "causal",
            raw=True,
            rates={name: score_lr for name, kind in kinds.items() if kind == "score"},
        )
        train_segment(trainer, done)
        step_seconds = time.perf_counter() - began
    state.wait_for_everyone()
    check_finite(student)
    fold_masks(student, places)
    # Measured is what is stored: rounded, where a tensor's dtype is half precision. The model in training is float32.
    dtypes = stored_dtypes(student, checkpoint)
    round_to(student, dtypes)
    trained = Trained(
        tensors=tuple(
            described(target, student.get_parameter(place.name).detach(), config.storage, dtypes[place.name].itemsize)
            for target, place in _pairs(targets, places)
        ),
        totals=checkpoint.totals(),
        metrics={},
        metrics_before=before,
        test_metrics={},
        trainable_by_kind=trainable,
        dense_and_scores=dense + sum(target.numel for target in targets),
        steps=steps,
        step_seconds=step_seconds,
        resumed_from=int(done.name.rpartition("-")[2]) if done else 0,
        truncated=data.truncated,
        is_writer=bool(state.is_main_process),
    )
    if trained.is_writer:
        if tells and data.eval:
            tells(steps, steps, "evaluating")
        after = evaluate(student, data, options)
        sparse = {place.name: Bitmask(target.shape, str(config.pattern)) for target, place in _pairs(targets, places)}
        kept = sparse_before | sparse
        set_encodings(student, kept if config.storage == "bitmask" else {})
        with output_directory(out) as work:
            if options.tokenizer:
                data.tokenizer.save_pretrained(work)
            totals = write_trained(
                work,
                student,
                checkpoint,
                "sparsify",
                config.recorded(),
                seed=seed,
                metrics=after,
                more={"trainable_params": trainable},
                max_shard_bytes=config.max_shard_bytes,
            )
            shutil.copyfile(training / METRICS, work / METRICS)
        discard(training)
        test = evaluate(student, data, options, split="test")
        trained = replace(trained, totals=totals, metrics=after, test_metrics=test)
    state.wait_for_everyone()
    return trained


def _pairs(targets: Sequence[Target], places: Sequence[Place]) -> zip[tuple[Target, Place]]:
    return zip(targets, places, strict=True)


def _place(model: Any, target: Target, sparse: Mapping[str, Encoding]) -> Place:
    module = local_name(model, target.module) or target.module
    return Place(module, target.leaf, target.layout, is_sparse=f"{module}.{target.leaf}" in sparse)


def _kinds(model: Any, masked: dict[str, MaskedWeight], *, is_classifier: bool) -> dict[str, str]:
    """What every parameter is: update (U, V), score, weight (masked), auxiliary, head or other."""
    of: dict[int, str] = {}
    for one in masked.values():
        of |= {id(parameter): "score" for parameter in one.score_parameters()}
        of |= {id(parameter): "update" for parameter in (one.u, one.v) if parameter is not None}
    for name, module in model.named_modules():
        if isinstance(module, MPOModule):
            own = module._parameters.items()
            cores = [p for leaf, p in own if leaf.startswith("core_") and leaf != f"core_{module.central}"]
            of |= {id(parameter): "auxiliary" for parameter in cores if parameter is not None}
        elif is_classifier and isinstance(module, nn.Module) and dense_shape(module) and role_of(name) == "head":
            of |= {id(parameter): "head" for parameter in module.parameters(recurse=False)}
    masked_weights = {f"{_owner(name)}.original" for name in masked}
    return {
        name: "weight" if name in masked_weights else of.get(id(parameter), "other")
        for name, parameter in model.named_parameters()
    }


def _owner(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{module}.parametrizations.{leaf}"


def _freeze(model: Any, kinds: dict[str, str], config: SparsifyConfig) -> None:
    """PST trains its update and scores, the auxiliary cores, and the task's head unless `faithful` (the published code
    never does); what is frozen gathers no gradients. The baselines train everything."""
    if config.method != "pst":
        return
    wanted = {"update", "score", "auxiliary"} | (set() if config.faithful else {"head"})
    # Without an update (rank 0) the weight itself is trained.
    wanted |= {"weight"} if config.scoring.rank == 0 else set()
    train_only(model, [name for name, kind in kinds.items() if kind in wanted])


def _counted(model: Any, kinds: dict[str, str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[kinds[name]] = counts.get(kinds[name], 0) + parameter.numel()
    return counts
