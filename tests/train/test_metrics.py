"""Metrics against their definitions, written out in numpy."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter

import numpy as np
import pytest

from mpocli.config.tasks import task_named
from mpocli.errors import NumericsError
from mpocli.train.evaluate.metrics import compute, language_modelling, perplexity


def classes(seed: int, count: int = 200, flip: float = 0.3) -> tuple[list[int], list[int]]:
    """(predictions, labels), unbalanced, with some predictions flipped."""
    rng = np.random.default_rng(seed)
    truth = rng.random(count) < 0.3
    guess = truth ^ (rng.random(count) < flip)
    return guess.astype(int).tolist(), truth.astype(int).tolist()


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))


def ranks(x: np.ndarray) -> np.ndarray:
    """Average ranks by counting: how many are smaller, and half of the equal ones."""
    return np.array([(x < value).sum() + ((x == value).sum() + 1) / 2 for value in x])


def test_accuracy_f1_and_matthews_are_their_formulas() -> None:
    guess, truth = classes(0)
    g, t = np.array(guess), np.array(truth)
    tp, tn = int((g & t).sum()), int(((1 - g) & (1 - t)).sum())
    fp, fn = int((g & (1 - t)).sum()), int(((1 - g) & t).sum())
    found = compute(task_named("mrpc"), guess, truth)
    assert set(found) == {"accuracy", "f1"}
    assert math.isclose(found["accuracy"], (tp + tn) / len(truth))
    assert math.isclose(found["f1"], 2 * tp / (2 * tp + fp + fn))
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert math.isclose(compute(task_named("cola"), guess, truth)["matthews_correlation"], matthews)


def test_f1_is_that_of_class_1() -> None:
    assert compute(task_named("qqp"), [0, 0, 0, 1], [0, 0, 0, 0])["f1"] == 0.0
    assert compute(task_named("qqp"), [1, 1, 0], [1, 1, 0])["f1"] == 1.0
    assert math.isclose(compute(task_named("qqp"), [1, 1, 1, 0], [1, 0, 0, 0])["f1"], 0.5)


def test_pearson_and_spearman_are_their_formulas_with_ties() -> None:
    rng = np.random.default_rng(1)
    truth = np.round(rng.random(60) * 5, 1)
    guess = np.round(truth + rng.normal(size=60), 1)
    found = compute(task_named("stsb"), guess.tolist(), truth.tolist())
    assert math.isclose(found["pearson"], pearson(guess, truth), rel_tol=1e-12)
    assert math.isclose(found["spearmanr"], pearson(ranks(guess), ranks(truth)), rel_tol=1e-12)


@pytest.mark.parametrize("constant", [0, 1])
def test_constant_predictions_correlate_by_zero_and_warn_of_nothing(constant: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compute(task_named("cola"), [constant] * 4, [0, 1, 1, 0])["matthews_correlation"] == 0.0
        assert compute(task_named("cola"), [constant] * 4, [1] * 4)["matthews_correlation"] == 0.0
        assert compute(task_named("mrpc"), [constant] * 4, [0] * 4)["f1"] == 0.0
        scores = compute(task_named("stsb"), [2.5 + constant] * 3, [1.0, 2.0, 3.0])
        assert scores == {"pearson": 0.0, "spearmanr": 0.0}


def test_nearly_constant_and_single_scores_give_numbers_and_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near = compute(task_named("stsb"), [1.0, 1.0 + 1e-16, 1.0 + 3e-16], [1.0, 2.0, 3.0])
        single = compute(task_named("stsb"), [1.0], [1.0])
    assert all(math.isfinite(value) for value in (*near.values(), *single.values()))


def test_scores_that_are_not_finite_are_a_numerics_error_that_counts_them() -> None:
    with pytest.raises(NumericsError, match="1 of 3"):
        compute(task_named("stsb"), [1.0, math.nan, 2.0], [1.0, 2.0, 3.0])


def test_mnlis_second_set_has_names_of_its_own() -> None:
    mnli = task_named("mnli")
    assert compute(mnli, [0, 1, 2], [0, 1, 1]) == {"accuracy": 2 / 3}
    assert compute(mnli, [0, 1, 2], [0, 1, 2], suffix="_mm") == {"accuracy_mm": 1.0}


def ngrams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def bleu(samples: list[tuple[str, list[str]]]) -> float:
    """Corpus BLEU-4 of texts that are already tokenised, by Papineni et al. 2002."""
    right, made, length, closest = [0] * 4, [0] * 4, 0, 0
    for text, targets in samples:
        tokens, lists = text.split(), [target.split() for target in targets]
        length += len(tokens)
        closest += min((abs(len(other) - len(tokens)), len(other)) for other in lists)[1]
        for n in range(1, 5):
            found = ngrams(tokens, n)
            best: Counter[tuple[str, ...]] = Counter()
            for other in lists:
                best |= ngrams(other, n)
            right[n - 1] += sum((found & best).values())
            made[n - 1] += sum(found.values())
    brevity = min(1.0, math.exp(1 - closest / length))
    return 100 * brevity * math.exp(sum(math.log(r / m) for r, m in zip(right, made, strict=True)) / 4)


def test_bleu_counts_every_reference_of_a_sample_however_many() -> None:
    samples = [
        ("the mill is a cheap pub near the river", ["the mill is a pub near the river", "a cheap pub is the mill"]),
        ("blue spice is a coffee shop", ["blue spice is a coffee shop in the city centre"]),
        ("a family friendly place in the centre", ["it is a family friendly place", "a place", "in the city centre"]),
    ]
    found = compute(task_named("e2e"), [text for text, _ in samples], [targets for _, targets in samples])
    assert set(found) == {"bleu"}
    assert math.isclose(found["bleu"], bleu(samples), rel_tol=1e-9)
    first = [(text, targets[:1]) for text, targets in samples]
    single = compute(task_named("e2e"), [text for text, _ in first], [targets[0] for _, targets in first])
    assert math.isclose(single["bleu"], bleu(first), rel_tol=1e-9)
    assert single["bleu"] < found["bleu"]


def test_a_perfect_text_has_bleu_100_and_an_empty_one_0() -> None:
    target = "The Mill is a pub near the river."
    assert math.isclose(compute(task_named("e2e"), [target], [target])["bleu"], 100.0)
    assert compute(task_named("e2e"), [""], [target])["bleu"] == 0.0


def test_bleu_minds_the_case_as_sacrebleu_does_by_default() -> None:
    target = "The Mill is a pub near the river."
    assert compute(task_named("e2e"), [target.lower()], [target])["bleu"] < 99.0


def test_perplexity_is_the_exponential_of_the_mean_per_token_and_per_word() -> None:
    assert math.isclose(perplexity(10 * math.log(7.0), 10), 7.0)
    found = language_modelling(12 * math.log(4.0), tokens=12, words=6)
    assert math.isclose(found["perplexity"], 4.0)
    assert math.isclose(found["word_perplexity"], 16.0)


def test_a_perplexity_beyond_float64_is_a_numerics_error_and_the_largest_is_json() -> None:
    largest = perplexity(709.7, 1)
    assert json.loads(json.dumps(largest, allow_nan=False)) == largest
    for total in (709.8, math.inf, math.nan):
        with pytest.raises(NumericsError, match="over 1 are"):
            perplexity(total, 1)
