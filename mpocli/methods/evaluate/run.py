"""eval: a task's metrics, size, memory and speed of a checkpoint, alone or beside another one."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mpocli.config.data import DataOptions
from mpocli.errors import InputError, UsageError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.sparse_paths import PathChoice, PathReport, choose_paths
from mpocli.io.apart import check_apart
from mpocli.io.files import OutputFile
from mpocli.io.manifest import Totals
from mpocli.methods.data.task import TaskData, check_trained_head, prepare, run_set, score_set
from mpocli.methods.device import device_of
from mpocli.methods.evaluate.harness import HarnessReport
from mpocli.methods.inputs import paths_read
from mpocli.methods.memory import peak_memory, reset_peak_memory
from mpocli.methods.training.student import load_student
from mpocli.nn.logits import kl
from mpocli.train.evaluate.predict import Run, window_logits
from mpocli.train.models import vocabulary_of

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Speed:
    """p50 of the seconds a batch takes, real tokens per second, and the peak of the process's memory in bytes while
    this model was loaded and run (of the device's, on a GPU)."""

    batch_seconds_p50: float
    tokens_per_second: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Arm:
    """One checkpoint's figures."""

    model: str
    metrics: dict[str, float]
    totals: Totals
    speed: Speed | None
    paths: tuple[PathReport, ...] = ()


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
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> EvalReport:
    """Evaluate a checkpoint; without `data` only sizes are told.

    `predictions` is written as JSON lines, one a sample: text, prediction, label; a file that exists only with
    `overwrite`. `path` chooses the kernels of layers
    that are mostly zeros: the faster, dense ones, or sparse ones wherever there are. Raises `InputError` for data or
    models that cannot be used, or that do not go together, and `NumericsError` for predictions that are not finite.
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
    own = _Measured(checkpoint, prepared, data, place, path, trust_remote_code)
    beside: _Measured | None = None
    if other is not None:
        prepared_other = prepare(other, data)
        _check_comparable(prepared, prepared_other, model, str(baseline))
        beside = _Measured(other, prepared_other, data, place, path, trust_remote_code)
        beside.measure(progress, "baseline")
    own.measure(progress, "eval")
    agreement = _agreement(own, beside, progress) if beside else {}
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
        agreement=agreement,
        truncated=prepared.truncated.get("eval", 0),
        seconds=time.perf_counter() - started,
        paths=own.paths,
    )


class _Measured:
    """A checkpoint being measured: loaded, run over every set, and let go."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        data: TaskData,
        options: DataOptions,
        device: torch.device,
        path: PathChoice,
        trust_remote_code: bool,
    ) -> None:
        self.checkpoint, self.data, self.options, self.device = checkpoint, data, options, device
        self.path, self.trust_remote_code = path, trust_remote_code
        self.runs: list[Run] = []
        self.metrics: dict[str, float] = {}
        self.speed: Speed | None = None
        self.paths: tuple[PathReport, ...] = ()

    def load(self) -> Any:
        data = self.data
        check_trained_head(self.checkpoint, data)
        model = load_student(self.checkpoint, data, trust_remote_code=self.trust_remote_code)
        return model.to(self.device).eval()

    def measure(self, progress: Progress | None, what: str) -> None:
        reset_peak_memory(self.device)
        model = self.load()
        rows = _rows_per_call(self.data, self.options.eval_batch_size)
        self.paths = tuple(choose_paths(model, rows, precision=self.options.precision, path=self.path))
        for found in self.data.eval:

            def tell(done: int, total: int) -> None:
                if progress:
                    progress(done, total, what)

            self.runs.append(run_set(model, self.data, found, self.options, progress=tell))
            self.metrics |= score_set(self.data, found, self.runs[-1])
        seconds = [value for run in self.runs for value in run.seconds]
        tokens = sum(size for run in self.runs for size in run.sizes)
        self.speed = Speed(statistics.median(seconds), tokens / sum(seconds), peak_memory(self.device))

    def arm(self, name: str) -> Arm:
        return Arm(name, self.metrics, self.checkpoint.totals(), self.speed, self.paths)


def _rows_per_call(data: TaskData, batch_size: int) -> int:
    """Rows that a linear layer is typically given: the tokens of a batch; where texts are written, one of each."""
    texts = [
        found.windows.ids if found.windows else [row["input_ids"] for row in found.features] for found in data.eval
    ]
    lengths = [len(ids) for found in texts for ids in found]
    length = 1 if data.task.kind == "text2text" else statistics.median_low(lengths)
    return min(batch_size, len(lengths)) * length


def _check_comparable(a: TaskData, b: TaskData, model: str, baseline: str) -> None:
    if a.family != b.family:
        raise InputError(f"{model} does the task as {a.family}, {baseline} as {b.family}", hint="compare equal kinds")
    if a.label_names != b.label_names:
        raise InputError(
            f"{model} has {len(a.label_names)} labels, {baseline} {len(b.label_names)} or others",
            hint="compare checkpoints of one task",
        )


def _agreement(own: _Measured, other: _Measured, progress: Progress | None) -> dict[str, float]:
    data = own.data
    if data.task.kind == "lm":
        return _token_agreement(own, other, progress)
    if data.task.kind == "text2text":
        pairs = [pair for a, b in zip(own.runs, other.runs, strict=True) for pair in zip(a.texts, b.texts, strict=True)]
        return {"equal_texts": sum(a == b for a, b in pairs) / len(pairs)}
    ours = torch.cat([run.scores for run in own.runs if run.scores is not None]).double()
    theirs = torch.cat([run.scores for run in other.runs if run.scores is not None]).double()
    if data.task.kind == "regression":
        from mpocli.train.evaluate.metrics import compute

        correlation = compute(data.task, ours.tolist(), theirs.tolist())
        return {"pearson": correlation["pearson"], "mean_abs_difference": float((ours - theirs).abs().mean())}
    equal = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    return {"labels": float(equal), "kl_nats": float(kl(theirs, ours).mean())}


def _token_agreement(own: _Measured, other: _Measured, progress: Progress | None) -> dict[str, float]:
    """Both models once more, side by side: logits over a vocabulary are too large to keep.

    Without a divergence where one of them has more logits than the tokenizer has tokens, and the other has not.
    """
    equal = total = 0
    divergence = 0.0
    ours, theirs = own.load(), other.load()
    sizes = {vocabulary_of(model.config) for model in (ours, theirs)}
    for found, counterpart in zip(own.data.eval, other.data.eval, strict=True):
        windows, others = found.windows, counterpart.windows
        if windows is None or others is None or windows.ids != others.ids:
            return {}  # another tokenizer: nothing to compare token by token

        def tell(done: int, count: int) -> None:
            if progress:
                progress(done, count, "comparing")

        said = [
            window_logits(
                model,
                measured.data.vocabulary,
                windows,
                measured.data.family,
                Run(),
                batch_size=own.options.eval_batch_size,
                precision=own.options.precision,
                width=max(sizes),
                progress=tell if measured is own else None,
            )
            for model, measured in ((ours, own), (theirs, other))
        ]
        for (a, targets), (b, _) in zip(*said, strict=True):
            equal += int((a.argmax(-1) == b.argmax(-1)).sum())
            total += len(targets)
            if len(sizes) == 1:
                divergence += float(kl(b, a).double().sum())
    told = {"tokens": equal, "kl_nats": divergence} if len(sizes) == 1 else {"tokens": equal}
    return {name: value / total for name, value in told.items()}


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


def check_gates(
    report: EvalReport | HarnessReport, fail_below: Sequence[tuple[str, float]], max_drop: Sequence[tuple[str, float]]
) -> list[str]:
    """What a report misses of the gates, one line each. Raises `InputError` for a metric that it does not have.

    `fail_below` compares a metric with a number, `max_drop` with the baseline's. For perplexities, where less is
    better, a drop is a rise, and `fail_below` is a bound from above.
    """
    missed = []
    less_is_better = report.less_is_better if isinstance(report, HarnessReport) else ()
    for name, least in fail_below:
        value, better = _metric(report.metrics, name), _sign(name, less_is_better)
        if better * value < better * least:
            missed.append(f"{name} is {value:.4f}, {'at least' if better > 0 else 'at most'} {least:g} was asked for")
    for name, most in max_drop:
        if report.baseline is None:
            raise InputError("--max-drop compares with a baseline", hint="add --baseline MODEL")
        value, before, better = (
            _metric(report.metrics, name),
            _metric(report.baseline.metrics, name),
            _sign(name, less_is_better),
        )
        if better * (before - value) > most:
            missed.append(f"{name} went from {before:.4f} to {value:.4f}, a change of {most:g} was allowed")
    return missed


def _metric(metrics: dict[str, float], name: str) -> float:
    if name not in metrics:
        raise InputError(f"no metric {name!r} was measured", hint=f"there are {', '.join(metrics) or 'none'}")
    return metrics[name]


def _sign(name: str, less_is_better: Collection[str] = ()) -> int:
    return -1 if "perplexity" in name or name in less_is_better else 1
