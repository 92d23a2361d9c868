"""Gates of a report: metrics that have to be reached, and drops that are allowed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mpocli.errors import InputError
from mpocli.methods.evaluate.harness import HarnessReport
from mpocli.methods.evaluate.run import EvalReport


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
