"""sparsify: prune a checkpoint once, or train it sparse, and store what is left of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mpocli.config.sparsify import CALIBRATED, SparsifyConfig, check_options
from mpocli.errors import UsageError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.loading import load_tokenizer
from mpocli.io.claim import writes_output
from mpocli.io.encodings.known import widened
from mpocli.io.output import check_output, output_directory
from mpocli.io.totals import Totals
from mpocli.methods.data.scoring import evaluate
from mpocli.methods.data.task import check_trained_head, prepare
from mpocli.methods.device import device_of
from mpocli.methods.inputs import paths_read
from mpocli.methods.skipped import Skipped
from mpocli.methods.sparsify import train as sparsify_train
from mpocli.methods.sparsify.calibrated import prune_by_activations
from mpocli.methods.sparsify.plan import plan
from mpocli.methods.sparsify.write import SparseTensor, add_metrics, given_pruner, magnitude_pruner, write_sparse
from mpocli.methods.training.begin import begin
from mpocli.methods.training.run import load
from mpocli.methods.training.student import load_student
from mpocli.progress import Progress


@dataclass(frozen=True)
class SparsifyReport:
    """What became sparse. `sparsity` = zeros / entries of the pruned tensors, counted on what is stored.

    `model_zeros` are those of the whole checkpoint, what was sparse before included.
    `tensors` one by one and `kept` those that were selected and could not be pruned; `metrics` on the evaluation set
    after and `metrics_before`, `{}` without one. `trainable_params` is what the optimiser held, by kind in
    `trainable_by_kind`, and `dense_and_scores` the parameters of the model and a score for every entry: what movement
    pruning trains. `bytes_expected` are those of all weights with the pruned ones as bitmask and values.
    """

    out: str
    seconds: float
    method: str
    pattern: str
    scope: str
    storage: str
    sparsity: float
    zeros: int
    entries: int
    model_zeros: int
    tensors: tuple[SparseTensor, ...]
    kept: tuple[Skipped, ...]
    totals_before: Totals
    totals: Totals
    bytes_expected: int
    metrics: dict[str, float]
    metrics_before: dict[str, float]
    test_metrics: dict[str, float]
    trainable_params: int = 0
    trainable_by_kind: dict[str, int] | None = None
    dense_and_scores: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    resumed_from: int = 0
    truncated: dict[str, int] | None = None
    warnings: tuple[str, ...] = ()
    architecture: str = "AutoModel"
    is_writer: bool = True
    widened: int = 0  # tensors in few bits of which the values are stored now


@writes_output
def run(
    model: str,
    config: SparsifyConfig,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> SparsifyReport:
    """Write a sparse checkpoint to a new directory `out`.

    With training data the model learns what to prune (PST, movement) or adapts to it (magnitude); while that lasts,
    `<out>.training` holds checkpoints, from which `resume` goes on. Without, it is pruned once. Raises `UsageError` and
    `InputError` for what cannot be pruned, `NumericsError` where a tensor or a loss is not finite.
    """
    started = time.perf_counter()
    check_options(config)
    if config.trains:
        return _train(model, config, out, overwrite=overwrite, resume=resume, progress=progress, warn=warn)
    if resume:
        raise UsageError("--resume: pruning at once leaves nothing to resume", hint="run without it")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            f"pruning at once takes one process, and {os.environ['WORLD_SIZE']} were launched",
            hint="run mpocli without torchrun or accelerate",
        )
    device = device_of(config.device)
    checkpoint = Checkpoint.open(model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    check_output(out, paths_read(checkpoint.source.directory, config), overwrite=overwrite)
    checkpoint.totals()  # names what files and config disagree about, before any work
    targets, kept = plan(checkpoint, config)
    before = _measure(checkpoint, config, "eval", progress)
    warnings: list[str] = []
    if config.method in CALIBRATED:
        pruned = prune_by_activations(checkpoint, config, targets, device, progress=progress, warn=warnings.append)
        prune = given_pruner(pruned)
    else:
        prune = magnitude_pruner(checkpoint, config, targets)
    with output_directory(out) as work:
        if config.data is not None and config.data.tokenizer:
            load_tokenizer(checkpoint.source.directory, config.data.tokenizer).save_pretrained(work)
        manifest, totals, tensors = write_sparse(work, checkpoint, config, targets, prune, progress=progress)
        written = Checkpoint.open(str(work), trust_remote_code=config.trust_remote_code)
        after, tested = (_measure(written, config, split, progress) for split in ("eval", "test"))
        if after:
            add_metrics(work, checkpoint, manifest, after)
    return replace(
        _report(str(out), config, checkpoint, tensors, tuple(kept), totals),
        seconds=time.perf_counter() - started,
        metrics=after,
        metrics_before=before,
        test_metrics=tested,
        warnings=tuple(warnings),
    )


def _train(
    model: str,
    config: SparsifyConfig,
    out: Path,
    *,
    overwrite: bool,
    resume: bool,
    progress: Progress | None,
    warn: Callable[[str], None],
) -> SparsifyReport:
    started = time.perf_counter()
    setup = begin(model, config, out, overwrite=overwrite, resume=resume)
    targets, kept = plan(setup.checkpoint, config)
    training = load(setup, progress=progress, warn=warn)
    trained, written = sparsify_train.run(training, config, targets)
    done = _report(str(out), config, setup.checkpoint, trained.tensors, tuple(kept), written.totals)
    return replace(
        done,
        seconds=time.perf_counter() - started,
        metrics=written.metrics,
        metrics_before=trained.metrics_before,
        test_metrics=written.test_metrics,
        trainable_params=sum(trained.trainable_by_kind.values()),
        trainable_by_kind=trained.trainable_by_kind,
        dense_and_scores=trained.dense_and_scores,
        steps=training.steps,
        step_seconds=training.step_seconds,
        resumed_from=setup.resumed_from,
        truncated=training.data.truncated,
        is_writer=written.is_writer,
    )


def _measure(checkpoint: Checkpoint, config: SparsifyConfig, split: str, progress: Progress | None) -> dict[str, float]:
    """On the evaluation or test set, where one is named. Raises `InputError` for a head that was never trained."""
    if config.data is None or not getattr(config.data, split):
        return {}
    if progress:
        progress(0, 1, "evaluating")
    data = prepare(checkpoint, config.data)
    check_trained_head(checkpoint, data)
    model = load_student(checkpoint, data, trust_remote_code=config.trust_remote_code).to(device_of(config.device))
    return evaluate(model, data, config.data, split=split)


def _report(
    out: str,
    config: SparsifyConfig,
    checkpoint: Checkpoint,
    tensors: tuple[SparseTensor, ...],
    kept: tuple[Skipped, ...],
    totals: Totals,
) -> SparsifyReport:
    zeros, entries = sum(t.zeros for t in tensors), sum(t.entries for t in tensors)
    before = checkpoint.totals()
    reader = checkpoint.reader
    # What is pruned again may have been packed already.
    held = {name: sum(part.nbytes for part in reader.parts(key)) for key, name in reader.encoded.items()}
    freed = sum(held.get(t.name, t.dense_bytes) for t in tensors)
    made = Checkpoint.open(out, trust_remote_code=config.trust_remote_code) if Path(out).is_dir() else checkpoint
    return SparsifyReport(
        out=out,
        seconds=0.0,
        method=config.method,
        pattern=str(config.pattern),
        scope=config.scope,
        storage=config.storage,
        sparsity=zeros / entries if entries else 0.0,
        zeros=zeros,
        entries=entries,
        model_zeros=zeros + _other_zeros(checkpoint, tensors),
        tensors=tensors,
        kept=kept,
        totals_before=before,
        totals=totals,
        bytes_expected=before.bytes - freed + sum(t.bytes for t in tensors),
        metrics={},
        metrics_before={},
        test_metrics={},
        architecture=made.architecture,
        widened=widened(checkpoint.encodings, made.encodings),
    )


def _other_zeros(checkpoint: Checkpoint, tensors: tuple[SparseTensor, ...]) -> int:
    """Zeros of what was sparse before and was not pruned now."""
    reader, pruned = checkpoint.reader, {tensor.name for tensor in tensors}
    others = [key for key, entry in reader.encoded.items() if entry not in pruned and key not in pruned]
    return sum(reader.zeros(key) or 0 for key in others)
