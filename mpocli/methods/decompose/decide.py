"""Let the planner decide what decompose does with each weight, from calibration data where there is some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mpocli.config.budget import Budget
from mpocli.config.decompose import DecomposeConfig
from mpocli.config.tasks import task_named
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.loading import load_as_saved
from mpocli.hf.weight import Weight
from mpocli.io.checkpoint import dtype_wanted
from mpocli.methods.decompose.calibrated import calibrate, measured_sensitivities
from mpocli.methods.decompose.plan import WeightPlan
from mpocli.methods.device import device_of
from mpocli.methods.planner.bits_planner import BitsPlanner, Formats
from mpocli.methods.planner.compare import Compared, compare
from mpocli.methods.planner.fit_store import ChosenForm, FitStore
from mpocli.methods.planner.planner import Planner, Shapes
from mpocli.methods.planner.refit import refit
from mpocli.mpo import SiteShape
from mpocli.progress import Progress
from mpocli.train.models import family_of

SizeOf = Callable[[Sequence[WeightPlan]], int]


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
    size_of: SizeOf,
    *,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> Decision:
    """Let the planner decide; cores and sums are kept in `folder`, and `size_of` gives the exact bytes of the weight
    files that plans lead to.

    Raises what `Planner.plan` and `calibrate` raise.
    """
    assert config.budget is not None
    budget = in_bytes(checkpoint, config, plans, size_of)
    device = device_of(config.device)
    chosen = [plan.weight for plan in plans if plan.sites is not None]
    calibrated = calibrate(checkpoint, config, chosen, folder / "moments", device, progress, warn)

    def exact_bytes(shapes: Shapes) -> int:
        return size_of([_shaped(plan, shapes.get(plan.weight.name)) for plan in plans])

    cores = folder / "cores"
    cores.mkdir()
    fits = FitStore(checkpoint, budget, calibrated.norms, cores, device, config.dtype, config.sites)
    if budget.sensitivity is not None:
        fits = replace(fits, sensitivity=measured_sensitivities(fits, calibrated, config, chosen, progress))
    if not calibrated.held_out and not budget.sequential:
        calibrated = replace(calibrated, model=None)  # planning takes its memory
    if budget.bits is not None:
        return _with_bits(plans, fits, size_of, progress)
    found = Planner(fits, exact_bytes, progress).plan(chosen)
    if budget.sequential and calibrated.model is not None:
        refit(calibrated.model, calibrated.batches, fits, found, chosen, progress)
    compared: tuple[Compared, ...] = ()
    if calibrated.held_out:
        one_sided = not checkpoint.config.is_encoder_decoder
        causal = one_sided and family_of(task_named("lm"), checkpoint.config) == "causal"
        # One that was refitted has been compressed.
        model = load_as_saved(checkpoint).to(device) if budget.sequential else calibrated.model
        compared = compare(fits, model, chosen, found, calibrated.held_out, causal=causal, progress=progress)
    return Decision([_decided(plan, found.get(plan.weight.name)) for plan in plans], compared)


def _with_bits(plans: Sequence[WeightPlan], fits: FitStore, size_of: SizeOf, progress: Progress | None) -> Decision:
    """Bits are a property of what is chosen."""
    assert fits.budget.bits is not None and fits.budget.max_bytes is not None

    def exact_bytes(formats: Formats) -> int:
        made = [replace(plan, sites=None, format=formats.get(plan.weight.name)) for plan in plans]
        return size_of(made)

    planner = BitsPlanner(fits, fits.budget.bits, fits.budget.max_bytes, exact_bytes, progress)
    found = planner.plan([plan.weight for plan in plans if plan.sites is not None])
    decided = []
    for plan in plans:
        one = found.get(plan.weight.name, plan.reason)
        if isinstance(one, str):
            decided.append(replace(plan, sites=None, reason=one))
        else:
            decided.append(replace(plan, sites=one.format.sites, bonds=one.format.bonds, form=one, format=one.format))
    return Decision(decided)


def in_bytes(checkpoint: Checkpoint, config: DecomposeConfig, plans: Sequence[WeightPlan], size_of: SizeOf) -> Budget:
    """The budget, where it is a part of the selected matrices' bytes as one of the whole files."""
    budget = config.budget
    assert budget is not None
    if budget.ratio_bytes is None:
        return budget
    chosen = [plan.weight for plan in plans if plan.sites is not None]
    dense = sum(_nbytes(checkpoint, weight, config.dtype) for weight in chosen)
    whole = size_of([replace(plan, sites=None) for plan in plans])
    return replace(budget, ratio_bytes=None, max_bytes=whole - dense + int(budget.ratio_bytes * dense))


def _nbytes(checkpoint: Checkpoint, weight: Weight, dtype: str | None) -> int:
    """What a matrix has in the files now, or would in another dtype."""
    assert weight.key is not None
    wanted = dtype_wanted(weight.dtype, dtype)
    if wanted == weight.dtype:
        return sum(part.nbytes for part in checkpoint.reader.parts(weight.key))
    return int(weight.dense_params * wanted.itemsize)


def _shaped(plan: WeightPlan, shape: tuple[SiteShape, tuple[int, ...]] | None) -> WeightPlan:
    sites, bonds = shape if shape is not None else (None, None)
    return replace(plan, sites=sites, bonds=bonds)


def _decided(plan: WeightPlan, found: ChosenForm | str | None) -> WeightPlan:
    if found is None:
        return plan
    if isinstance(found, str):
        return replace(plan, sites=None, reason=found)
    return replace(plan, sites=found.sites, bonds=found.bonds, form=found)
