"""A task's metrics from predictions and labels: fractions from 0 to 1, BLEU from 0 to 100, and perplexities."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpocli.config.tasks import Task
from mpocli.errors import NumericsError


def compute(task: Task, predictions: Sequence[Any], labels: Sequence[Any], *, suffix: str = "") -> dict[str, float]:
    """The metrics that `task` names, of one evaluation set; `suffix` goes after their names (`_mm`: MNLI's second set).

    `predictions` are class indices, scores or texts; `labels` the same, or for BLEU a list of references each.
    Correlations with something constant are 0, not NaN. F1 is that of class 1. BLEU is sacrebleu's default (13a,
    cased), on as many references as each sample has. Raises `NumericsError` where a predicted score is not finite.
    """
    assert len(predictions) == len(labels) > 0, (len(predictions), len(labels))
    measured = {name: _METRICS[name] for name in task.metrics if name in _METRICS}
    assert measured, f"{task.name} is measured by perplexity()"
    if task.kind == "text2text":
        return {f"bleu{suffix}": _bleu(predictions, labels)}
    guess, truth = np.asarray(predictions), np.asarray(labels)
    if task.kind == "regression":
        guess, truth = guess.astype(np.float64), truth.astype(np.float64)
        bad = int(np.count_nonzero(~np.isfinite(guess)))
        if bad:
            raise NumericsError(f"{bad} of {len(guess)} predicted scores are not finite", hint="lower ‹lr›")
    return {f"{name}{suffix}": metric(guess, truth) for name, metric in measured.items()}


def perplexity(total_nll: float, count: int) -> float:
    """exp(total_nll / count): per token or per word, as `count` is; `total_nll` in nats.

    Raises `NumericsError` where that is no finite float64 (above 1.8e308): infinity is no JSON, and a clamped number
    would look measured.

    >>> perplexity(0.0, 3)
    1.0
    """
    assert count > 0, count
    mean = total_nll / count
    try:
        value = math.exp(mean)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise NumericsError(
            f"the perplexity overflows: {total_nll:g} nats over {count} are {mean:g} each",
            hint="the model is broken: loosen the truncation or lower ‹lr›",
        )
    return value


def language_modelling(total_nll: float, tokens: int, words: int) -> dict[str, float]:
    """Perplexity per predicted token and per word, `words` as `lm_windows` counts them; raises `NumericsError`."""
    return {"perplexity": perplexity(total_nll, tokens), "word_perplexity": perplexity(total_nll, words)}


def _accuracy(guess: NDArray[Any], truth: NDArray[Any]) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(truth, guess))


def _f1(guess: NDArray[Any], truth: NDArray[Any]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(truth, guess, labels=[1], average="macro", zero_division=0.0))


def _matthews(guess: NDArray[Any], truth: NDArray[Any]) -> float:
    from sklearn.metrics import matthews_corrcoef

    if np.ptp(guess) == 0 or np.ptp(truth) == 0:
        return 0.0
    return float(matthews_corrcoef(truth, guess))


def _pearson(guess: NDArray[Any], truth: NDArray[Any]) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, guess, truth)


def _spearman(guess: NDArray[Any], truth: NDArray[Any]) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, guess, truth)


def _correlation(measure: Callable[..., Any], guess: NDArray[Any], truth: NDArray[Any]) -> float:
    if np.ptp(guess) == 0 or np.ptp(truth) == 0:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nearly constant input is announced, and handled below
        value = float(measure(guess, truth).statistic)
    return value if math.isfinite(value) else 0.0


def _bleu(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
    import sacrebleu

    lists = [[target] if isinstance(target, str) else list(target) for target in references]
    most = max(len(targets) for targets in lists)
    # sacrebleu wants the first reference of every sample, then the second: None where a sample has no more.
    streams: Any = [[targets[k] if k < len(targets) else None for targets in lists] for k in range(most)]
    # force: no advice about texts that look tokenised, which E2E's do.
    return float(sacrebleu.corpus_bleu(list(predictions), streams, force=True).score)


_METRICS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews_correlation": _matthews,
    "pearson": _pearson,
    "spearmanr": _spearman,
    "bleu": _bleu,
}
