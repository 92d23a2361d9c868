"""eval: a task's metrics, size, memory and speed of a checkpoint, alone or beside another one."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpocli.config.data import DataOptions
from mpocli.errors import UsageError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.sparse_paths import PathChoice, PathReport
from mpocli.io.apart import check_apart
from mpocli.io.files import OutputFile
from mpocli.io.totals import Totals
from mpocli.methods.data.task import TaskData, prepare
from mpocli.methods.device import device_of
from mpocli.methods.evaluate.agreement import agreement, check_comparable
from mpocli.methods.evaluate.measurement import Arm, Measurement, Memory, Speed
from mpocli.methods.inputs import paths_read
from mpocli.progress import Progress
from mpocli.train.evaluate.predict import Run


@dataclass(frozen=True)
class EvalReport:
    """`agreement` with the baseline: the share of equal labels (of equal likeliest tokens, for a language model), and
    KL(baseline ‖ model) in nats per prediction; for scores their correlation and mean absolute difference. `paths`
    tells of the linear layers that are mostly zeros whether a sparse kernel computed them."""

    model: str
    task: str | None
    metrics: dict[str, float]
    samples: int
    totals: Totals
    speed: Speed | None
    baseline: Arm | None = None
    agreement: dict[str, float] = field(default_factory=dict)
    truncated: int = 0
    seconds: float = 0.0
    paths: tuple[PathReport, ...] = ()


def run(
    model: str,
    data: DataOptions | None,
    *,
    baseline: str | None = None,
    predictions: Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
    path: PathChoice = "auto",
    memory: Memory = "fast",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> EvalReport:
    """Evaluate a checkpoint; without `data` only sizes are told.

    `predictions` is written as JSON lines, one a sample, over a file that exists only with `overwrite`. `path` chooses
    the kernels of layers that are mostly zeros: the faster, dense ones, or sparse ones wherever there are. `memory` is
    how weights of few bits are held: unpacked once, or packed (`keep_packed`). Raises `InputError` for data or models
    that cannot be used, or do not go together, and `NumericsError` for predictions that are not finite.
    """
    started = time.perf_counter()
    place = device_of(device)
    checkpoint = Checkpoint.open(model, revision=revision, trust_remote_code=trust_remote_code)
    other = Checkpoint.open(baseline, trust_remote_code=trust_remote_code) if baseline else None
    if data is None:
        arm = Arm(str(baseline), {}, other.totals(), None) if other else None
        return EvalReport(model, None, {}, 0, checkpoint.totals(), None, arm, seconds=time.perf_counter() - started)
    written = None
    if predictions is not None:
        if data.task == "lm":
            raise UsageError("--predictions: a language model makes none on --task lm", hint="leave it out")
        reads = paths_read(checkpoint.source.directory, data)
        check_apart({"--predictions": predictions}, {**reads, "--baseline": other.source.directory if other else None})
        written = OutputFile("--predictions", predictions, overwrite=overwrite)
    prepared = prepare(checkpoint, data)
    own = Measurement(checkpoint, prepared, data, place, path, memory, trust_remote_code)
    beside: Measurement | None = None
    if other is not None:
        prepared_other = prepare(other, data)
        check_comparable(prepared, prepared_other, model, str(baseline))
        beside = Measurement(other, prepared_other, data, place, path, memory, trust_remote_code)
        beside.measure(progress, "baseline")
    own.measure(progress, "eval")
    found = agreement(own, beside, progress) if beside else {}
    if written is not None:
        _write_predictions(written, prepared, own.runs)
    return EvalReport(
        model=model,
        task=prepared.task.name,
        metrics=own.metrics,
        samples=sum(found.samples for found in prepared.eval),
        totals=checkpoint.totals(),
        speed=own.speed,
        baseline=beside.arm(str(baseline)) if beside else None,
        agreement=found,
        truncated=prepared.truncated.get("eval", 0),
        seconds=time.perf_counter() - started,
        paths=own.paths,
    )


def _write_predictions(file: OutputFile, data: TaskData, runs: Sequence[Run]) -> None:
    lines = []
    for found, run in zip(data.eval, runs, strict=True):
        if found.examples is None:
            continue
        names = data.label_names if data.task.kind == "classification" else ()
        pairs = found.examples.pairs or [None] * len(found.features)
        rows = zip(found.examples.texts, pairs, run.predictions, found.labels, strict=True)
        for index, (text, pair, prediction, label) in enumerate(rows):
            row: dict[str, Any] = {"text": text} if pair is None else {"text": text, "pair": pair}
            row |= {"prediction": prediction, "label": label}
            if names:
                row |= {"prediction_name": names[prediction], "label_name": names[label]}
                assert run.scores is not None
                row["logits"] = [round(value, 6) for value in run.scores[index].tolist()]
            lines.append(json.dumps(row, ensure_ascii=False))
    file.write_text("".join(f"{line}\n" for line in lines))
