"""Measure the README's fine-tuning table: dense, lossless MPO and compressed MPO, on SST-2 or STS-B.

    python tests/bench/table_finetune.py sst2 --data ../shared/data --model ../shared/models/minilm-l6 --work DIR

Every arm gets the same three learning rates on the first seed and runs the other seeds at its best. Results are
kept in DIR, so that a run that was stopped goes on; the table and the intervals are printed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from runs import bootstrap, mpocli, options, spread

TASKS: dict[str, dict[str, Any]] = {
    "sst2": {"folder": "sst2", "metric": "accuracy", "limit": 8000, "epochs": 2, "max_length": 64, "batch": 32},
    "stsb": {"folder": "stsb", "metric": "spearmanr", "limit": 4000, "epochs": 2, "max_length": 64, "batch": 16},
}
LEARNING_RATES = (1e-4, 2e-4, 5e-4)
SEEDS = (1, 2, 3)
# About 70 % of the parameters of every kind of matrix.
CAPS = ["--emb-trunc", "440", "--attention-trunc", "75", "--ffn-trunc", "125", "--pooler-trunc", "75"]
ARMS: dict[str, list[str] | None] = {"dense": None, "lossless MPO": [], "compressed MPO": CAPS}


class Table:
    def __init__(self, chosen: argparse.Namespace) -> None:
        self.options, self.task = chosen, TASKS[chosen.task]
        self.work: Path = chosen.work / chosen.task
        self.work.mkdir(parents=True, exist_ok=True)
        self.data: Path = chosen.data / self.task["folder"]

    def start(self, arm: str) -> Path:
        """The checkpoint that an arm begins with."""
        caps = ARMS[arm]
        if caps is None:
            return Path(self.options.model)
        place = self.work / arm.replace(" ", "-")
        if not (place / "mpo.json").is_file():
            mpocli("decompose", self.options.model, *caps, "-o", place, threads=2)
        return place

    def run(self, arm: str, rate: float, seed: int) -> dict[str, Any]:
        name = f"{arm.replace(' ', '-')}-lr{rate:g}-seed{seed}"
        record = self.work / f"{name}.json"
        if record.is_file():
            kept: dict[str, Any] = json.loads(record.read_text())
            return kept
        began, task, out = time.time(), self.task, self.work / name
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
        report = mpocli(
            *("finetune", self.start(arm), "--task", self.options.task, "-o", out, "--overwrite"),
            *("--train", self.data / "train.tsv", "--limit", task["limit"], "--eval", self.data / "dev.tsv"),
            *(
                "--epochs",
                task["epochs"],
                "--max-length",
                task["max_length"],
                "--batch-size",
                task["batch"],
                "--lr",
                rate,
            ),
            *("--seed", seed, "--precision", self.options.precision, "--save-steps", 100_000),
            threads=self.options.threads,
        )
        report["minutes"] = (time.time() - began) / 60
        predictions = self.work / f"{name}.predictions.jsonl"
        mpocli(
            *("eval", out, "--task", self.options.task, "--eval", self.data / "dev.tsv"),
            *("--max-length", task["max_length"], "--predictions", predictions),
            threads=self.options.threads,
        )
        record.write_text(json.dumps(report))
        print(f"{time.strftime('%H:%M:%S')} {name}: {report['metrics']}", flush=True)
        return report

    def measure(self) -> None:
        metric = self.task["metric"]
        for arm in ARMS:
            self.start(arm)
        with ThreadPoolExecutor(self.options.parallel) as pool:
            jobs = {(arm, rate): pool.submit(self.run, arm, rate, SEEDS[0]) for rate in LEARNING_RATES for arm in ARMS}
            tuned = {key: job.result() for key, job in jobs.items()}
            best = {arm: max(LEARNING_RATES, key=lambda rate: tuned[arm, rate]["metrics"][metric]) for arm in ARMS}
            rest = {(arm, seed): pool.submit(self.run, arm, best[arm], seed) for seed in SEEDS[1:] for arm in ARMS}
            runs = {arm: [tuned[arm, best[arm]], *(rest[arm, s].result() for s in SEEDS[1:])] for arm in ARMS}
        self.show(best, runs)

    def show(self, best: dict[str, float], runs: dict[str, list[dict[str, Any]]]) -> None:
        metric, task = self.task["metric"], self.task
        print(f"\n| arm | {metric} | lr | trained | total | step time |\n|---|---:|---:|---:|---:|---:|")
        dense_seconds = statistics.mean(run["step_seconds"] for run in runs["dense"])
        for arm, found in runs.items():
            values = [run["metrics"][metric] for run in found]
            seconds = statistics.mean(run["step_seconds"] for run in found)
            print(
                f"| {arm} | {spread(values)} | {best[arm]:g} | {found[0]['trainable_params']:,} | "
                f"{found[0]['totals']['params']:,} | {seconds / dense_seconds:.2f}× |"
            )
        for arm in runs:
            if arm != "dense":
                low, high = self.interval(arm, best)
                print(f"\n{arm} − dense: paired bootstrap 95 % interval [{low:+.3f}, {high:+.3f}]")
        minutes = sum(run["minutes"] for found in runs.values() for run in found)
        print(
            f"\n{task['limit']} training rows, {task['epochs']} epochs, length {task['max_length']}, "
            f"batch {task['batch']}, {runs['dense'][0]['steps']} steps, {self.options.precision}, learning rates "
            f"{', '.join(f'{rate:g}' for rate in LEARNING_RATES)} on seed 1, seeds {list(SEEDS)}; "
            f"{minutes:.0f} process-minutes for the rows shown, {platform.machine()}, {os.cpu_count()} cores, "
            f"{self.options.parallel} runs at a time"
        )

    def interval(self, arm: str, best: dict[str, float]) -> tuple[float, float]:
        """95 % of the difference to dense when the development rows are drawn anew, the same for all seeds."""

        def read(which: str, seed: int) -> list[dict[str, Any]]:
            name = f"{which.replace(' ', '-')}-lr{best[which]:g}-seed{seed}"
            lines = (self.work / f"{name}.predictions.jsonl").read_text().splitlines()
            return [json.loads(line) for line in lines]

        pairs = []
        for seed in SEEDS:
            pairs.append([np.array([(r["prediction"], r["label"]) for r in read(a, seed)]) for a in (arm, "dense")])
        return bootstrap(
            len(pairs[0][0]), lambda rows: float(np.mean([self.value(a[rows]) - self.value(b[rows]) for a, b in pairs]))
        )

    def value(self, rows: Any) -> float:
        if self.task["metric"] == "accuracy":
            return float((rows[:, 0] == rows[:, 1]).mean())
        from scipy.stats import spearmanr

        return float(spearmanr(rows[:, 0], rows[:, 1]).statistic)


if __name__ == "__main__":
    Table(options(__doc__, TASKS)).measure()
