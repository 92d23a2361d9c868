"""Options of `mpocli eval`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from mpocli.config import common, data, text
from mpocli.config.bounds import at_least
from mpocli.config.modes import ALWAYS, excludes, needs
from mpocli.config.option import Option
from mpocli.config.page import DATA, GATES, HARNESS
from mpocli.errors import UsageError

Gate = tuple[str, float]

_TASKED = needs("--task")
_HARNESSED = needs("--lm-eval")
_DATA_OR_HARNESS = needs("--task", "--lm-eval", why="nothing is measured")


def _gate(written: str, option: str) -> Gate:
    """`accuracy=0.85`; metrics from 0 to 1 may be written as a share, as 85%."""
    name, _, number = written.partition("=")
    name = name.strip()
    try:
        value = float(number) if "perplexity" in name or name == "bleu" else text.share(number, option)
        if not math.isfinite(value):
            raise ValueError
    except (ValueError, UsageError):
        raise UsageError(f"{option} {written!r} cannot be read", hint=f"write it as {option} accuracy=0.85") from None
    return name, value


def _tasks(written: str, option: str) -> tuple[str, ...]:
    found = tuple(name.strip() for name in written.split(",") if name.strip())
    if not found:
        raise UsageError(f"{option} {written!r} names no task", hint=f"{option} hellaswag, for example")
    return found


@dataclass(frozen=True)
class EvalConfig:
    """What to measure, of a task or by the harness, beside which baseline, and the gates that it must pass."""

    task: Annotated[data.TaskName, excludes("--lm-eval", why="the harness has tasks of its own")] = None
    eval: Annotated[data.Evaluated, _TASKED] = ()
    baseline: Annotated[str | None, Option("--baseline", "Measure this one too, side by side.", "MODEL"), ALWAYS] = None
    predictions: Annotated[
        Path | None,
        Option("--predictions", "Write one JSON line per sample.", "FILE"),
        _TASKED,
        excludes("--task lm", why="a language model makes none"),
    ] = None
    fail_below: Annotated[
        tuple[Gate, ...],
        Option(
            "--fail-below",
            "Worst value that will do: the least, of perplexity the largest.",
            "METRIC=X",
            GATES,
            several=True,
            parse=_gate,
        ),
        _DATA_OR_HARNESS,
    ] = ()
    max_drop: Annotated[
        tuple[Gate, ...],
        Option(
            "--max-drop", "Most that it may be worse than --baseline.", "METRIC=X", GATES, several=True, parse=_gate
        ),
        needs("--baseline"),
        _DATA_OR_HARNESS,
    ] = ()
    text_columns: Annotated[data.TextColumns, _TASKED] = ()
    label_column: Annotated[data.LabelColumn, _TASKED] = None
    max_length: Annotated[
        int | None,
        Option(
            "--max-length",
            "Tokens per example, or per window. Default: 128; of --lm-eval the model's.",
            "N",
            DATA,
        ),
        _DATA_OR_HARNESS,
    ] = None
    tokenizer: Annotated[data.Tokenizer, _DATA_OR_HARNESS] = None
    batch_size: Annotated[
        int,
        Option("--batch-size", "Examples or windows per batch.", "N", DATA, check=at_least(1)),
        _DATA_OR_HARNESS,
    ] = 32
    max_new_tokens: Annotated[data.NewTokens, _TASKED] = 96
    precision: Annotated[data.PrecisionName, _DATA_OR_HARNESS] = "auto"
    device: Annotated[common.Device, _DATA_OR_HARNESS] = "auto"
    path: Annotated[
        Literal["auto", "dense", "sparse"],
        Option(
            "--path",
            "Layers that are mostly zeros: dense or sparse kernels, or auto: the faster, by a short measurement.",
            "NAME",
        ),
        _TASKED,
    ] = "auto"
    memory: Annotated[
        Literal["fast", "lean"],
        Option("--memory", "Rounded weights: unpacked once (fast), or packed in memory too (lean).", "NAME"),
        _TASKED,
    ] = "fast"
    lm_eval: Annotated[
        tuple[str, ...] | None,
        Option(
            "--lm-eval",
            "Tasks of EleutherAI's harness instead, where that is installed.",
            "TASK,…",
            HARNESS,
            parse=_tasks,
        ),
        ALWAYS,
    ] = None
    num_fewshot: Annotated[
        int | None, Option("--num-fewshot", "Examples in a prompt.", "N", HARNESS, check=at_least(0)), _HARNESSED
    ] = None
    limit: Annotated[
        int | None, Option("--limit", "Samples of each task.", "N", HARNESS, check=at_least(1)), _HARNESSED
    ] = None
    overwrite: Annotated[
        common.Overwrite, {"help": "Replace the file of --predictions if it exists."}, needs("--predictions")
    ] = False
    revision: common.Revision = None
    trust_remote_code: common.TrustRemoteCode = False

    @classmethod
    def from_options(cls, max_length: int | None, lm_eval: tuple[str, ...] | None, **given: Any) -> EvalConfig:
        """`UsageError` for examples too short to hold anything."""
        if max_length is not None:
            at_least(1 if lm_eval else 2)("--max-length", max_length)
        return cls(max_length=max_length, lm_eval=lm_eval, **given)

    def data_options(self) -> data.DataOptions | None:
        """The task's data, None where none is named; `UsageError` for data without an evaluation set."""
        if self.task is None:
            return None
        if not self.eval:
            raise UsageError("--eval is missing", hint="name the file to evaluate on")
        return data.DataOptions.from_options(
            self.task,
            eval=self.eval,
            text_columns=self.text_columns,
            label_column=self.label_column,
            max_length=128 if self.max_length is None else self.max_length,
            eval_batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
            tokenizer=self.tokenizer,
            precision=self.precision,
        )
