"""Measure the README's over-parameterisation table: plain, raised rate, svd, static, dynamic on CoLA or STS-B.

    python tests/bench/table_overparam.py cola --data ../shared/data --model ../shared/models/minilm-l6 --work DIR

Every arm takes the same steps (the static one spends some of them on its scores) and the same three learning rates on
the first seed, and runs the other seeds at its best. Results are kept in DIR, so that a run that was stopped goes on.
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

from runs import mpocli, options, spread

TASKS: dict[str, dict[str, Any]] = {
    "cola": {
        "metric": "matthews_correlation",
        "limit": 4000,
        "steps": 375,
        "batch": 32,
        "max_length": 64,
        "rates": (2e-5, 5e-5, 1e-4),
    },
    "stsb": {
        "metric": "spearmanr",
        "limit": 4000,
        "steps": 375,
        "batch": 16,
        "max_length": 64,
        "rates": (5e-5, 1e-4, 2e-4),
    },
}
SEEDS = (1, 2, 3)
RAISE = 4  # the sceptic's arm: the same matrices, dense, at so many times the rate
ARMS: dict[str, list[str]] = {
    "plain": [],
    "plain, raised rate": ["--overparam", "none"],
    "svd": ["--overparam", "svd"],
    "static": ["--overparam", "static", "--top-n", "3"],
    "dynamic": ["--overparam", "dynamic", "--top-n", "3", "--splits", "3"],
}


class Table:
    def __init__(self, chosen: argparse.Namespace) -> None:
        self.options, self.task = chosen, TASKS[chosen.task]
        self.work: Path = chosen.work / chosen.task
        self.work.mkdir(parents=True, exist_ok=True)
        self.data: Path = chosen.data / chosen.task

    def run(self, arm: str, rate: float, seed: int) -> dict[str, Any]:
        name = f"{arm.replace(', ', '-').replace(' ', '-')}-lr{rate:g}-seed{seed}"
        record = self.work / f"{name}.json"
        if record.is_file():
            kept: dict[str, Any] = json.loads(record.read_text())
            return kept
        began, task = time.time(), self.task
        more = ["--mpo-lr", str(RAISE * rate)] if arm == "plain, raised rate" else []
        arguments = [
            *("finetune", self.options.model, "--task", self.options.task, *ARMS[arm], *more, "--overwrite"),
            *("--train", self.data / "train.tsv", "--eval", self.data / "dev.tsv", "--limit", task["limit"]),
            *("--steps", task["steps"], "--batch-size", task["batch"], "--max-length", task["max_length"]),
            *("--lr", rate, "--seed", seed, "--precision", self.options.precision, "--save-steps", 100_000),
            *("-o", self.work / name),
        ]
        report = mpocli(*arguments, threads=self.options.threads)
        report["minutes"] = (time.time() - began) / 60
        record.write_text(json.dumps(report))
        print(f"{time.strftime('%H:%M:%S')} {name}: {report['metrics']}", flush=True)
        return report

    def measure(self) -> None:
        metric, rates = self.task["metric"], self.task["rates"]
        with ThreadPoolExecutor(self.options.parallel) as pool:
            jobs = {(arm, rate): pool.submit(self.run, arm, rate, SEEDS[0]) for rate in rates for arm in ARMS}
            tuned = {key: job.result() for key, job in jobs.items()}
            best = {arm: max(rates, key=lambda rate: tuned[arm, rate]["metrics"][metric]) for arm in ARMS}
            rest = {(arm, seed): pool.submit(self.run, arm, best[arm], seed) for seed in SEEDS[1:] for arm in ARMS}
            runs = {arm: [tuned[arm, best[arm]], *(rest[arm, seed].result() for seed in SEEDS[1:])] for arm in ARMS}
        plain = runs["plain"]
        seconds, peak = (statistics.mean(run[key] for run in plain) for key in ("step_seconds", "peak_kb"))
        print(f"\n| arm | {metric} | rate | parameters in training | time | memory |\n|---|---:|---:|---:|---:|---:|")
        for arm, found in runs.items():
            values = [run["metrics"][metric] for run in found]
            time_ratio = statistics.mean(run["step_seconds"] for run in found) / seconds
            memory = statistics.mean(run["peak_kb"] for run in found) / peak
            print(
                f"| {arm} | {spread(values)} | {best[arm]:g} | "
                f"{found[0]['trainable_params']:,} | {time_ratio:.2f}× | {memory:.2f}× |"
            )
        for (arm, rate), run in tuned.items():
            print(f"seed {SEEDS[0]}, {arm}, rate {rate:g}: {run['metrics'][metric]:.4f}")
        task, minutes = self.task, sum(run["minutes"] for found in (*runs.values(), tuned.values()) for run in found)
        print(
            f"\n{task['limit']} rows, {task['steps']} steps, batch {task['batch']}, length {task['max_length']}, "
            f"{self.options.precision}, seeds {list(SEEDS)}; {minutes:.0f} process-minutes, {platform.machine()}, "
            f"{os.cpu_count()} cores, {self.options.parallel} runs at a time"
        )


if __name__ == "__main__":
    Table(options(__doc__, TASKS)).measure()
