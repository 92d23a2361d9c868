"""What calibration data says of the weights that are chosen, before a plan is made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mpocli.config.decompose import DecomposeConfig
from mpocli.errors import InputError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.weight import Weight
from mpocli.methods.data.calibration import Batches, calibration_batches, fed, split_rows
from mpocli.methods.planner.fit_store import FitStore
from mpocli.methods.planner.norms import Norms, measure
from mpocli.methods.planner.sensitivity import sensitivities
from mpocli.progress import Progress

# With fewer tokens than this for each input, a Gram matrix is mostly a guess.
_FEW_TOKENS = 1.0
_HELD_OUT = 32  # samples to compare on


@dataclass(frozen=True)
class Calibrated:
    """The norms of the weights; the dense model in evaluation mode, the samples that it saw, and those it did not.

    Without calibration data there are neither a model nor samples, and the norms are the identity.
    """

    norms: Norms
    model: Any = None
    batches: Batches = field(default_factory=list)
    held_out: Batches = field(default_factory=list)


def calibrate(
    checkpoint: Checkpoint,
    config: DecomposeConfig,
    chosen: Sequence[Weight],
    folder: Path,
    device: torch.device,
    progress: Progress | None,
    warn: Callable[[str], None],
) -> Calibrated:
    """The norms of the chosen weights from the samples that the budget names; sums are kept in `folder`.

    Raises what `calibration_batches` and `collect` raise, and `InputError` where no sample is left to compare on.
    """
    assert config.budget is not None
    calibration = config.budget.calibration
    if calibration is None:
        warn("without --calibrate every parameter counts the same: some text makes a far better plan")
        return Calibrated(Norms(config.budget, None, chosen))
    more = _HELD_OUT if config.budget.compare else 0
    wanted = replace(calibration, samples=calibration.samples + more)
    drawn = calibration_batches(checkpoint, wanted, config.budget.data, config.seed, warn=warn)
    batches, held_out = split_rows(drawn, calibration.samples)
    if more and not held_out:
        raise InputError(
            f"--compare: {calibration.source} has no more than --samples {calibration.samples}",
            hint="lower --samples, so that some of the text is left to compare on",
        )

    def step(done: int, total: int) -> None:
        if progress:
            progress(done, total, "calibrating")

    norms, model = measure(checkpoint, config.budget, chosen, batches, folder, device, config.seed, step)
    _warn_of_few(norms, chosen, warn)
    return Calibrated(norms, model, fed(batches, model), fed(held_out, model))


def measured_sensitivities(
    fits: FitStore,
    calibrated: Calibrated,
    config: DecomposeConfig,
    chosen: Sequence[Weight],
    progress: Progress | None,
) -> dict[str, float]:
    """How much more an error of each weight costs than its norm says, from the file that the budget names."""
    budget = fits.budget
    assert budget.sensitivity is not None and budget.calibration is not None
    identity = {
        "weights_sha256": fits.checkpoint.reader.sha256,
        "text": Path(budget.calibration.source).name,
        "samples": budget.calibration.samples,
        "seq_len": budget.calibration.seq_len,
        "weights": budget.weights,
        "seed": config.seed,
        "tokens_sha256": _hash(calibrated.batches),
    }
    rows, _ = split_rows(calibrated.batches, _HELD_OUT)
    return sensitivities(Path(budget.sensitivity), identity, fits, calibrated.model, chosen, rows, progress)


def _hash(batches: Batches) -> str:
    made = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            made.update(key.encode() + batch[key].numpy().tobytes())
    return made.hexdigest()


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
