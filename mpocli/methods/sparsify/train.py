"""Sparse training (PST, IJCAI 2022; gradual magnitude and movement pruning as baselines) of one checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mpocli.config.sparsify import SparsifyConfig
from mpocli.errors import InputError
from mpocli.hf.encoded import encodings_of
from mpocli.hf.packing import set_encodings
from mpocli.hf.replace import dense_shape, local_name
from mpocli.hf.roles import role_of
from mpocli.hf.stored import stored_dtypes
from mpocli.io.encodings.base import Encoding
from mpocli.io.encodings.bitmask import Bitmask
from mpocli.methods.sparsify.plan import Target
from mpocli.methods.sparsify.write import SparseTensor, described
from mpocli.methods.training.fit import fit
from mpocli.methods.training.run import TrainingRun, Written
from mpocli.methods.training.schedule import warmed_up
from mpocli.methods.training.teacher import distillation_of
from mpocli.nn import MPOModule
from mpocli.nn.masked import MaskedWeight
from mpocli.nn.packed import is_packed
from mpocli.train.loop.metrics_file import METRICS
from mpocli.train.sparse.masks import MaskTarget, SparsitySteps, fold_masks, put_masks, train_only


@dataclass(frozen=True)
class Trained:
    """What sparse training did; `trainable_by_kind` counts update, score, head, auxiliary and other parameters."""

    metrics_before: dict[str, float]
    trainable_by_kind: dict[str, int]
    dense_and_scores: int
    tensors: tuple[SparseTensor, ...] = ()


def run(training: TrainingRun, config: SparsifyConfig, targets: Sequence[Target]) -> tuple[Trained, Written]:
    """Train with masks, write what is left, and describe it as it is stored."""
    trained, places = train(training, config, targets)
    student = training.student
    written = training.write(
        "sparsify", more={"trainable_params": trained.trainable_by_kind}, max_shard_bytes=config.max_shard_bytes
    )
    dtypes = stored_dtypes(student, training.checkpoint)
    tensors = tuple(
        described(target, student.get_parameter(place.name).detach(), config.storage, dtypes[place.name].itemsize)
        for target, place in zip(targets, places, strict=True)
    )
    return replace(trained, tensors=tensors), written


def train(run: TrainingRun, config: SparsifyConfig, targets: Sequence[Target]) -> tuple[Trained, list[MaskTarget]]:
    """Train with masks whose sparsity follows the schedule, and make the masked weights the weights."""
    student, optimisation = run.student, config.optimisation
    teacher = distillation_of(config.distillation, run.data, run.checkpoint, trust_remote_code=config.trust_remote_code)
    dense = sum(parameter.numel() for parameter in student.parameters())
    encoded_before = encodings_of(student)
    places = [_place(student, target, encoded_before) for target in targets]
    for place in places:
        if is_packed(student.get_parameter(place.name)):
            raise InputError(
                f"{place.name} is packed codes, and sparse training moves what it prunes",
                hint="leave it out with --ignore, or run mpocli merge first",
            )
    with run.underway(METRICS):
        before = run.measure_before()
        together = config.scope == "global"
        masked = put_masks(student, places, config.scoring, config.pattern, together=together, seed=optimisation.seed)
        kinds = _kinds(student, masked, is_classifier=run.data.family == "encoder")
        _freeze(student, kinds, config)
        trainable = _counted(student, kinds)
        score_lr = optimisation.lr if config.score_lr is None else config.score_lr
        fit(
            run,
            warmed_up(optimisation, run.steps),
            callbacks=[SparsitySteps(masked, config.schedule(run.steps))],
            distillation=teacher,
            rates={name: score_lr for name, kind in kinds.items() if kind == "score"},
            raw=True,
        )
    fold_masks(student, places)
    made = {
        place.name: Bitmask(target.shape, str(config.pattern)) for target, place in zip(targets, places, strict=True)
    }
    kept = {name: one for name, one in encoded_before.items() if config.storage == "bitmask" or not one.holds_zeros}
    set_encodings(student, kept | (made if config.storage == "bitmask" else {}))
    return Trained(before, trainable, dense + sum(target.numel for target in targets)), places


def _place(model: Any, target: Target, encodings: Mapping[str, Encoding]) -> MaskTarget:
    module = local_name(model, target.module) or target.module
    before = encodings.get(f"{module}.{target.leaf}")
    return MaskTarget(module, target.leaf, target.layout, is_sparse=before is not None and before.holds_zeros)


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
