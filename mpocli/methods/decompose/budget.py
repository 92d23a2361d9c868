"""Let the planner decide what decompose does with each weight, from calibration data where there is some."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpocli.config.decompose import DecomposeConfig
from mpocli.config.tasks import task_named
from mpocli.errors import InputError
from mpocli.hf.activations import Batch, Inputs
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.calibration import sequential
from mpocli.hf.loading import load_as_saved
from mpocli.hf.targets import Weight
from mpocli.methods.data.calibration import Batches, calibration_batches, fed, split_rows
from mpocli.methods.decompose.cores import Decomposer
from mpocli.methods.decompose.plan import WeightPlan
from mpocli.methods.device import device_of
from mpocli.methods.planner.compare import Compared, compare
from mpocli.methods.planner.fit_store import Solution, Workshop
from mpocli.methods.planner.norms import Norms, measure
from mpocli.methods.planner.planner import Planner, Shapes
from mpocli.methods.planner.sensitivity import sensitivities
from mpocli.methods.rewrite import Progress
from mpocli.mpo import SiteShape
from mpocli.mpo.gram import regularised
from mpocli.train.models import family_of

# With fewer tokens than this for each input, a Gram matrix is mostly a guess.
_FEW_TOKENS = 1.0
_HELD_OUT = 32  # samples to compare on


@dataclass(frozen=True)
class Decision:
    """The plans with the planner's decisions in them, and how they compare with others, where that was asked."""

    plans: list[WeightPlan]
    compared: tuple[Compared, ...] = ()


def decide(
    checkpoint: Checkpoint,
    config: DecomposeConfig,
    plans: Sequence[WeightPlan],
    folder: Path,
    *,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> Decision:
    """Let the planner decide; cores and sums are kept in `folder`.

    Raises what `Planner.plan` and `collect` raise.
    """
    assert config.budget is not None
    device = device_of(config.device)
    chosen = [plan.weight for plan in plans if plan.sites is not None]
    norms, model = Norms(config.budget, None, chosen), None
    batches: Batches = []
    held_out: Batches = []
    if (calibration := config.budget.calibration) is not None:
        more = _HELD_OUT if config.budget.compare else 0
        drawn = calibration_batches(
            checkpoint,
            replace(calibration, samples=calibration.samples + more),
            config.budget.data,
            config.seed,
            warn=warn,
        )
        batches, held_out = split_rows(drawn, calibration.samples)
        if more and not held_out:
            raise InputError(
                f"--compare: {calibration.source} has no more than --samples {calibration.samples}",
                hint="lower --samples, so that some of the text is left to compare on",
            )

        def step(done: int, total: int) -> None:
            if progress:
                progress(done, total, "calibrating")

        norms, model = measure(
            checkpoint, config.budget, chosen, batches, folder / "moments", device, config.seed, step
        )
        batches, held_out = fed(batches, model), fed(held_out, model)
        _warn_of_few(norms, chosen, warn)

    else:
        warn("without --calibrate every parameter counts the same: some text makes a far better plan")

    def exact_bytes(shapes: Shapes) -> int:
        return size_of(checkpoint, config, [_shaped(plan, shapes.get(plan.weight.name)) for plan in plans])

    cores = folder / "cores"
    cores.mkdir()
    shop = Workshop(checkpoint, config.budget, norms, cores, device, config.dtype, config.sites)
    if config.budget.sensitivity is not None:
        shop = replace(shop, sensitivity=_sensitivities(shop, model, config, chosen, batches, progress))
    if not held_out and not config.budget.sequential:
        model = None  # planning takes its memory
    planner = Planner(shop, exact_bytes, progress)
    found = planner.plan(chosen)
    if config.budget.sequential and model is not None:
        _refit(model, batches, shop, found, chosen, progress)
    compared: tuple[Compared, ...] = ()
    if held_out:
        one_sided = not checkpoint.config.is_encoder_decoder
        causal = one_sided and family_of(task_named("lm"), checkpoint.config) == "causal"
        if config.budget.sequential:
            model = load_as_saved(checkpoint).to(device)  # the first one has been compressed
        compared = compare(shop, model, chosen, found, held_out, causal=causal, progress=progress)
    return Decision([_decided(plan, found.get(plan.weight.name)) for plan in plans], compared)


def _sensitivities(
    shop: Workshop,
    model: Any,
    config: DecomposeConfig,
    chosen: Sequence[Weight],
    batches: Batches,
    progress: Progress | None,
) -> dict[str, float]:
    budget = shop.budget
    assert budget.sensitivity is not None and budget.calibration is not None
    identity = {
        "weights_sha256": shop.checkpoint.reader.sha256,
        "text": Path(budget.calibration.source).name,
        "samples": budget.calibration.samples,
        "seq_len": budget.calibration.seq_len,
        "weights": budget.weights,
        "seed": config.seed,
        "tokens_sha256": _hash(batches),
    }
    rows, _ = split_rows(batches, _HELD_OUT)
    return sensitivities(Path(budget.sensitivity), identity, shop, model, chosen, rows, progress)


def _hash(batches: Batches) -> str:
    made = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            made.update(key.encode() + batch[key].numpy().tobytes())
    return made.hexdigest()


def size_of(checkpoint: Checkpoint, config: DecomposeConfig, plans: list[WeightPlan]) -> int:
    """The exact bytes of the weight files that these plans lead to."""
    _, totals = Decomposer(checkpoint, config, plans, reads=False).rewriting().dry_run(config.max_shard_bytes)
    return totals.bytes


def _shaped(plan: WeightPlan, shape: tuple[SiteShape, tuple[int, ...]] | None) -> WeightPlan:
    sites, bonds = shape if shape is not None else (None, None)
    return replace(plan, sites=sites, bonds=bonds)


def _decided(plan: WeightPlan, found: Solution | str | None) -> WeightPlan:
    if found is None:
        return plan
    if isinstance(found, str):
        return replace(plan, sites=None, reason=found)
    return replace(plan, sites=found.sites, bonds=found.bonds, solution=found)


def _warn_of_few(norms: Norms, chosen: Sequence[Weight], warn: Callable[[str], None]) -> None:
    assert norms.store is not None
    worst: tuple[float, str] | None = None
    few = seen = 0
    for weight in chosen:
        if weight.kind == "embedding" or weight.name not in norms.store:
            continue
        tokens, inputs = norms.store.tokens(weight.name), weight.shape[1]
        seen += 1
        few += tokens < _FEW_TOKENS * inputs
        if tokens < _FEW_TOKENS * inputs and (worst is None or tokens / inputs < worst[0]):
            worst = tokens / inputs, f"{tokens} tokens for the {inputs} inputs of {weight.name}"
    if worst is not None:
        warn(f"little calibration data for {few} of {seen} matrices ({worst[1]}): raise --samples or --seq-len")


def _refit(
    model: Any,
    batches: Sequence[Batch],
    shop: Workshop,
    found: dict[str, Solution | str],
    weights: Sequence[Weight],
    progress: Progress | None,
) -> None:
    """Fit the same shapes anew, block by block, to the inputs that the blocks before make once they are compressed."""
    by_name = {weight.name: weight for weight in weights}
    names = [
        name
        for name, solution in found.items()
        if isinstance(solution, Solution) and by_name[name].kind != "embedding" and len(by_name[name].members) == 1
    ]
    for name, solution in found.items():  # tables first: they stand before all blocks
        if isinstance(solution, Solution) and name not in names:
            _put(model.get_submodule(name), solution, by_name[name])
    done = 0

    def visit(name: str, module: nn.Module, inputs: Inputs) -> None:
        nonlocal done
        weight, solution = by_name[name], found[name]
        assert isinstance(solution, Solution) and inputs.gram is not None and weight.key is not None
        norm = shop.norms.of(weight)
        seen = regularised(inputs.gram, inputs.tokens, least=shop.norms.robust, name=name)
        again = shop.refitted(weight, replace(norm, gram=seen), solution)
        found[name] = again
        _put(module, again, weight)
        done += 1
        if progress:
            progress(done, len(names), f"fitting again {name}")

    sequential(model, batches, names, visit, gram=True)


def _put(module: nn.Module, solution: Solution, weight: Weight) -> None:
    matrix = weight.oriented(solution.mpo(weight.shape).to(dtype=torch.float32).to_matrix())
    with torch.no_grad():
        parameter: Any = module.weight
        parameter.copy_(matrix)
