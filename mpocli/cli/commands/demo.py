"""`mpocli demo`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mpocli.config.common import Json
from mpocli.config.modes import ALWAYS
from mpocli.config.option import Option

if TYPE_CHECKING:
    from mpocli.methods.demo import DemoReport


def command(
    out: Annotated[Path, Option("--out", "Where the MPO checkpoints go.", "DIR", short="-o"), ALWAYS] = Path(
        "mpocli-demo"
    ),
    cache: Annotated[
        Path | None,
        Option("--cache", "Where the demo models are kept. Default: the user's cache.", "DIR"),
        ALWAYS,
    ] = None,
    json: Json = False,
) -> None:
    """Make two tiny language models, decompose them, load them, predict.

    Needs no network and no account. The first run trains a BERT and a GPT-2
    for about a minute on the docstrings of Python's standard library; later
    runs find them in the cache.
    """
    from mpocli.cli import console
    from mpocli.hf import quiet
    from mpocli.methods import demo
    from mpocli.methods.decompose.run import run as decompose

    with quiet.transformers(), _stages() as progress:
        report = demo.run(cache or _default_cache(), out, decompose, progress=progress)
    console.report("demo", report, lambda: _show(report), json=json)


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mpocli" / "demo"


@contextmanager
def _stages() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage, one below the other."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from mpocli.cli import console

    if not console.err.is_terminal:
        begun: list[str] = []

        def say(stage: str, _done: int, _total: int) -> None:
            if stage not in begun:
                begun.append(stage)
                console.err.print(f"{stage} …")

        yield say
        return
    columns = TextColumn("{task.description:<34}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console.err) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield update


def _show(report: DemoReport) -> None:
    from mpocli.cli import console, tables, wording

    table = tables.table("model", "<made by", "parameters", "file", "perplexity")
    for k, arm in enumerate(report.arms):
        if k and arm.model != report.arms[k - 1].model:
            table.add_section()
        table.add_row(
            arm.model, arm.made_by, wording.count(arm.params), wording.size(arm.bytes), f"{arm.perplexity:.1f}"
        )
    tables.show(table)
    console.out.print("(perplexity per token on held-out docstrings; BERT's on masked tokens)\n", style="dim")
    for model, questions in zip(("bert", "gpt2"), report.questions, strict=True):
        for number, question in enumerate(questions):
            console.out.print(question, style="bold")
            for arm in report.arms:
                if arm.model == model:
                    console.out.print(f"  {arm.made_by:<11} {arm.predictions[number]}")
    console.err.print(f"\n{wording.written(report.out, report.seconds)}. Look closer:")
    for arm in report.arms:
        if arm.made_by.startswith("--trunc"):
            console.err.print(f"  mpocli inspect {arm.directory} --module '*.0.*' --spectrum")
    console.err.print("With a network, on a real model:")
    console.err.print("  mpocli decompose bert-base-uncased --trunc 256")
