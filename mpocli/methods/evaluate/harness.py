"""eval by EleutherAI's harness: its tasks, measured on a checkpoint and a baseline, in our report."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from mpocli.errors import InputError, MpoError
from mpocli.hf.artifact import Checkpoint
from mpocli.io.totals import Totals
from mpocli.methods.device import device_of


@dataclass(frozen=True)
class HarnessOptions:
    """What is passed on; None leaves it to the harness. `limit` counts samples of each task."""

    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 32
    max_length: int | None = None
    precision: str = "auto"
    device: str = "auto"
    tokenizer: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class HarnessArm:
    """One checkpoint's figures."""

    model: str
    metrics: dict[str, float]
    totals: Totals


@dataclass(frozen=True)
class HarnessReport:
    """`metrics` go by the metric's name, with several tasks by `task/metric`; `samples` over all tasks.
    `less_is_better` names the metrics of which that is so."""

    model: str
    tasks: tuple[str, ...]
    metrics: dict[str, float]
    samples: int
    totals: Totals
    baseline: HarnessArm | None = None
    less_is_better: tuple[str, ...] = ()
    seconds: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)


def run(model: str, options: HarnessOptions, *, baseline: str | None = None) -> HarnessReport:
    """Measure a model on the harness's tasks, and a baseline beside it.

    Raises `InputError` where the harness is not installed, knows no such task or fails.
    """
    started = time.perf_counter()
    if find_spec("lm_eval") is None:
        raise InputError("--lm-eval: EleutherAI's harness is not installed", hint="pip install lm_eval")
    checkpoint = Checkpoint.open(model, revision=options.revision, trust_remote_code=options.trust_remote_code)
    other = Checkpoint.open(baseline, trust_remote_code=options.trust_remote_code) if baseline else None
    found = _measured(model, options, options.revision)
    arm = None
    if other is not None:
        arm = HarnessArm(str(baseline), _metrics(_measured(str(baseline), options, None)), other.totals())
    passed_on = {"num_fewshot": options.num_fewshot, "limit": options.limit, "batch_size": options.batch_size}
    return HarnessReport(
        model=model,
        tasks=options.tasks,
        metrics=_metrics(found),
        samples=sum(int(count["effective"]) for count in found.get("n-samples", {}).values()),
        totals=checkpoint.totals(),
        baseline=arm,
        less_is_better=_less_is_better(found),
        seconds=time.perf_counter() - started,
        options=passed_on,
    )


def _measured(model: str, options: HarnessOptions, revision: str | None) -> Mapping[str, Any]:
    """The harness's own results. This process has imported mpocli, so that its `from_pretrained` knows MPOs."""
    import lm_eval

    arguments: dict[str, Any] = {"pretrained": model, "trust_remote_code": options.trust_remote_code}
    arguments |= {"revision": revision} if revision else {}
    arguments |= {"max_length": options.max_length} if options.max_length else {}
    arguments |= {"tokenizer": options.tokenizer} if options.tokenizer else {}
    dtypes = {"fp32": "float32", "bf16": "bfloat16"}
    arguments |= {"dtype": dtypes[options.precision]} if options.precision in dtypes else {}
    try:
        with redirect_stdout(sys.stderr):  # what it says is talk
            found = lm_eval.simple_evaluate(
                model="hf",
                model_args=arguments,
                tasks=list(options.tasks),
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                batch_size=options.batch_size,
                device=str(device_of(options.device)),
                log_samples=False,
            )
    except MpoError:
        raise
    except (Exception, SystemExit) as error:
        what = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"lm_eval on {model}: {type(error).__name__}: {what}",
            hint="see its messages above, or lm_eval --tasks list",
        ) from error
    if not found or not found.get("results"):
        raise InputError(
            f"lm_eval on {model}: no results for {', '.join(options.tasks)}", hint="see its messages above"
        )
    return dict(found)


def _named(found: Mapping[str, Any], task: str, key: str) -> str:
    """`acc` of `acc,none`; with a filter of its own or among several tasks as much more as tells it apart."""
    metric, _, filter_ = key.partition(",")
    name = metric if filter_ in ("", "none") else key
    return name if len(found["results"]) == 1 else f"{task}/{name}"


def _metrics(found: Mapping[str, Any]) -> dict[str, float]:
    return {
        _named(found, task, key): float(value)
        for task, results in found["results"].items()
        for key, value in results.items()
        if isinstance(value, int | float) and "," in key and "_stderr" not in key
    }


def _less_is_better(found: Mapping[str, Any]) -> tuple[str, ...]:
    better = found.get("higher_is_better") or {}
    return tuple(
        _named(found, task, key)
        for task, results in found["results"].items()
        for key in results
        if "," in key and "_stderr" not in key and (better.get(task) or {}).get(key.partition(",")[0]) is False
    )
