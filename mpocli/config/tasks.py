"""What a task is: its columns, its labels and its metrics, for GLUE, BoolQ, E2E and anything that is named."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from mpocli.errors import UsageError

Kind = Literal["classification", "regression", "lm", "text2text"]
Names = tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """Where a task's texts and labels stand in a file, and how predictions are judged.

    `texts` holds one or two fields, each with the column names it goes by: GLUE's own files first, then the hub's.
    `labels` are the class names in the order of their integers, `()` where the data decides; `file_columns` are the
    columns of files that come without a header line; `hub` is a source that `read_examples` takes as it is, and
    `eval_splits` the hub's splits with labels to evaluate on (MNLI has two, the second gives `accuracy_mm`).
    """

    name: str
    kind: Kind
    texts: tuple[Names, ...]
    label: Names
    labels: Names
    metrics: Names
    main_metric: str
    greater_is_better: bool = True
    hub: str = ""
    eval_splits: Names = ("validation",)
    file_columns: Names = ()
    score_range: tuple[float, float] | None = None
    skips_broken_rows: bool = False

    @property
    def needs_columns(self) -> bool:
        """Whether the user has to say which columns are meant."""
        return not self.texts


_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = (("sentence1",), ("sentence2",))

_TASKS = (
    Task(
        "cola",
        "classification",
        (("sentence",),),
        ("label",),
        ("unacceptable", "acceptable"),
        ("matthews_correlation", "accuracy"),
        "matthews_correlation",
        hub="nyu-mll/glue:cola",
        file_columns=("source", "label", "mark", "sentence"),
    ),
    Task(
        "sst2",
        "classification",
        (("sentence",),),
        ("label",),
        ("negative", "positive"),
        ("accuracy",),
        "accuracy",
        hub="nyu-mll/glue:sst2",
    ),
    Task(
        "mrpc",
        "classification",
        (("#1 String", "sentence1"), ("#2 String", "sentence2")),
        ("Quality", "label"),
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
        "f1",
        hub="nyu-mll/glue:mrpc",
    ),
    Task(
        "stsb",
        "regression",
        _PAIR,
        ("score", "label"),
        (),
        ("pearson", "spearmanr"),
        "spearmanr",
        hub="nyu-mll/glue:stsb",
        score_range=(0.0, 5.0),
    ),
    Task(
        "qqp",
        "classification",
        (("question1",), ("question2",)),
        ("is_duplicate", "label"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        "accuracy",
        hub="nyu-mll/glue:qqp",
        # GLUE's own train.tsv has two dozen rows that line breaks tore apart; every published figure is without them.
        skips_broken_rows=True,
    ),
    Task(
        "mnli",
        "classification",
        (("sentence1", "premise"), ("sentence2", "hypothesis")),
        ("gold_label", "label"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy", "accuracy_mm"),
        "accuracy",
        hub="nyu-mll/glue:mnli",
        eval_splits=("validation_matched", "validation_mismatched"),
    ),
    Task(
        "qnli",
        "classification",
        (("question",), ("sentence",)),
        ("label",),
        _ENTAILMENT,
        ("accuracy",),
        "accuracy",
        hub="nyu-mll/glue:qnli",
    ),
    Task("rte", "classification", _PAIR, ("label",), _ENTAILMENT, ("accuracy",), "accuracy", hub="nyu-mll/glue:rte"),
    Task(
        "wnli",
        "classification",
        _PAIR,
        ("label",),
        ("not_entailment", "entailment"),
        ("accuracy",),
        "accuracy",
        hub="nyu-mll/glue:wnli",
    ),
    Task(
        "boolq",
        "classification",
        (("question",), ("passage",)),
        ("answer", "label"),
        ("false", "true"),
        ("accuracy",),
        "accuracy",
        hub="google/boolq",
    ),
    Task("lm", "lm", (("text",),), (), (), ("perplexity", "word_perplexity"), "perplexity", greater_is_better=False),
    Task(
        "e2e",
        "text2text",
        (("mr", "MR", "meaning_representation"),),
        ("ref", "REF", "human_reference"),
        (),
        ("bleu",),
        "bleu",
    ),
    Task("classification", "classification", (), (), (), ("accuracy",), "accuracy"),
    Task("regression", "regression", (), (), (), ("pearson", "spearmanr"), "spearmanr"),
    Task("text2text", "text2text", (), (), (), ("bleu",), "bleu"),
)
TASKS = {task.name: task for task in _TASKS}
_ALIASES = {"e2enlg": "e2e", "languagemodeling": "lm", "languagemodelling": "lm"}


def task_named(name: str) -> Task:
    """The preset of that name; upper case, hyphens and underscores do not matter (`SST-2`, `sts-b`).

    Raises `UsageError` for a name that is none of them, with the nearest ones.

    >>> task_named("STS-B").kind
    'regression'
    """
    key = "".join(letter for letter in name.lower() if letter.isalnum())
    key = _ALIASES.get(key, key)
    if key in TASKS:
        return TASKS[key]
    near = get_close_matches(key, TASKS, n=3)
    known = f"{' or '.join(near)}?" if near else f"one of {', '.join(TASKS)}"
    raise UsageError(f"--task {name}: no such task", hint=known)
