"""The presets: names, columns, and agreement with GLUE."""

from __future__ import annotations

import pytest

from mpocli.config.tasks import TASKS, task_named
from mpocli.errors import UsageError
from mpocli.train.evaluate.metrics import _METRICS

GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")


@pytest.mark.parametrize(
    ("alias", "name"),
    [("SST-2", "sst2"), ("sst-2", "sst2"), ("sts-b", "stsb"), ("STS_B", "stsb"), ("CoLA", "cola"), ("E2E-NLG", "e2e")],
)
def test_a_task_goes_by_every_usual_spelling(alias: str, name: str) -> None:
    assert task_named(alias) is TASKS[name]


def test_an_unknown_task_is_a_usage_error_with_the_nearest_names() -> None:
    with pytest.raises(UsageError) as caught:
        task_named("sst3")
    assert caught.value.exit_code == 2
    assert "sst3" in caught.value.message
    assert "sst2" in caught.value.hint


def test_an_unknown_task_like_nothing_lists_them_all() -> None:
    with pytest.raises(UsageError) as caught:
        task_named("!?")
    assert all(name in caught.value.hint for name in TASKS)


def test_every_task_has_a_main_metric_among_its_metrics_and_keys_that_scripts_know() -> None:
    known = {*_METRICS, "accuracy_mm", "perplexity", "word_perplexity"}
    for task in TASKS.values():
        assert task.main_metric in task.metrics
        assert set(task.metrics) <= known
        assert task.greater_is_better is (task.name != "lm")
        assert len(task.texts) in (0, 1, 2)
        assert task.needs_columns is (task.name == task.kind != "lm")


def test_the_nine_glue_tasks_have_a_hub_source_each() -> None:
    hub = {task.hub for task in TASKS.values() if task.hub.startswith("nyu-mll/glue:")}
    assert hub == {f"nyu-mll/glue:{name}" for name in GLUE}


def test_entailment_has_the_integers_of_the_hub() -> None:
    assert task_named("rte").labels.index("entailment") == 0
    assert task_named("qnli").labels.index("entailment") == 0
    assert task_named("wnli").labels.index("entailment") == 1
    assert task_named("mnli").labels == ("entailment", "neutral", "contradiction")
