"""Measure the README's squeezing table: gradual against direct truncation to the same size, in as many steps.

    python tests/bench/table_squeeze.py --data ../shared/data/sst2 --model ../shared/models/minilm-l6 --work DIR

A lossless MPO is fine-tuned once per seed; both arms start from it, with the same choice of bonds, three learning
rates on the first seed and the other seeds at the best. Results are kept in DIR, so that a run that was stopped
goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from runs import bootstrap, mpocli, options, spread

LEARNING_RATES = (1e-4, 2e-4, 5e-4)
SEEDS = (1, 2)
ARMS = ("squeezed", "direct")
LIMIT, BATCH, LENGTH, ROUND_STEPS, RATIO = 8000, 32, 64, 50, 0.6
HOW = ["--target-ratio", RATIO, "--tie", "kind", "--per-param", "--step", "10%"]


class Table:
    def __init__(self, chosen: argparse.Namespace) -> None:
        self.options, self.work = chosen, chosen.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.dev = chosen.data / "dev.tsv"
        shared = ["--task", "sst2", "--train", chosen.data / "train.tsv", "--eval", self.dev, "--limit", LIMIT]
        self.shared = [*shared, "--max-length", LENGTH, "--batch-size", BATCH, "--precision", chosen.precision]

    def start(self, seed: int) -> Path:
        """A lossless MPO, its auxiliary cores fine-tuned for two epochs."""
        place: Path = self.work / f"base-seed{seed}"
        if not (place / "mpo.json").is_file():
            if not (self.work / "lossless" / "mpo.json").is_file():
                mpocli("decompose", self.options.model, "-o", self.work / "lossless", threads=1)
            more = ["--lr", 2e-4, "--epochs", 2, "--seed", seed, "--save-steps", 100_000, "-o", place, "--overwrite"]
            mpocli("finetune", self.work / "lossless", *self.shared, *more, threads=self.options.threads)
        return place

    def run(self, arm: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
        name = f"{arm}-lr{rate:g}-seed{seed}"
        record = self.work / f"{name}.json"
        if record.is_file():
            kept: dict[str, Any] = json.loads(record.read_text())
            return kept
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
        began, out = time.time(), self.work / name
        more = ["--direct"] if arm == "direct" else []
        more += ["--finetune-steps", steps, "--lr", rate, "--seed", seed, "-o", out, "--overwrite"]
        report = mpocli("squeeze", self.start(seed), *self.shared, *HOW, *more, threads=self.options.threads)
        report["minutes"] = (time.time() - began) / 60
        predictions = self.work / f"{name}.predictions.jsonl"
        shared = ["--task", "sst2", "--eval", self.dev, "--max-length", LENGTH, "--predictions", predictions]
        mpocli("eval", out, *shared, threads=self.options.threads)
        record.write_text(json.dumps(report))
        print(f"{time.strftime('%H:%M:%S')} {name}: {report['metrics']}, {report['totals']['params']:,}", flush=True)
        return report

    def measure(self) -> None:
        with ThreadPoolExecutor(self.options.parallel) as pool:
            list(pool.map(self.start, SEEDS))
            first, rates = SEEDS[0], LEARNING_RATES
            jobs = {("squeezed", r): pool.submit(self.run, "squeezed", r, first, ROUND_STEPS) for r in rates}
            # As many steps as the squeeze took: its rounds are known once one of them is done.
            steps = len(jobs["squeezed", rates[0]].result()["rounds"]) * ROUND_STEPS
            jobs |= {("direct", r): pool.submit(self.run, "direct", r, first, steps) for r in rates}
            tuned = {key: job.result() for key, job in jobs.items()}
            best = {arm: max(rates, key=lambda r: tuned[arm, r]["metrics"]["accuracy"]) for arm in ARMS}
            lengths = {"squeezed": ROUND_STEPS, "direct": steps}
            rest = {(arm, s): pool.submit(self.run, arm, best[arm], s, lengths[arm]) for s in SEEDS[1:] for arm in ARMS}
            runs = {arm: [tuned[arm, best[arm]], *(rest[arm, s].result() for s in SEEDS[1:])] for arm in ARMS}
        self.show(best, runs, tuned, steps)

    def show(self, best: dict[str, float], runs: dict[str, list[Any]], tuned: dict[Any, Any], steps: int) -> None:
        print("\n| arm | accuracy | rate | parameters | ratio | steps |\n|---|---:|---:|---:|---:|---:|")
        before = [run["metrics_before"]["accuracy"] for run in runs["direct"]]
        totals = runs["direct"][0]["totals_before"]
        print(f"| before | {spread(before)} | | {totals['params']:,} | {totals['ratio']:.3f} | |")
        for arm, found in runs.items():
            totals = found[0]["totals"]
            counts = [len(run["rounds"]) * ROUND_STEPS if arm == "squeezed" else steps for run in found]
            values = [run["metrics"]["accuracy"] for run in found]
            print(
                f"| {arm} | {spread(values)} | {best[arm]:g} | {totals['params']:,} | {totals['ratio']:.3f} | "
                f"{', '.join(map(str, counts))} |"
            )
        for (arm, rate), run in tuned.items():
            print(f"seed {SEEDS[0]}, {arm}, rate {rate:g}: {run['metrics']['accuracy']:.4f}")
        low, high = self.interval(best)
        print(f"\nsqueezed − direct: paired bootstrap 95 % interval [{low:+.3f}, {high:+.3f}]")
        minutes = sum(run["minutes"] for found in (*runs.values(), tuned.values()) for run in found)
        print(
            f"{LIMIT} rows, batch {BATCH}, length {LENGTH}, {self.options.precision}, {' '.join(map(str, HOW))}, seeds "
            f"{list(SEEDS)}; {minutes:.0f} process-minutes, {platform.machine()}, {os.cpu_count()} cores, "
            f"{self.options.parallel} runs at a time"
        )

    def interval(self, best: dict[str, float]) -> tuple[float, float]:
        """95 % of the difference when the development rows are drawn anew, the same for all seeds."""

        def right(arm: str, seed: int) -> Any:
            lines = (self.work / f"{arm}-lr{best[arm]:g}-seed{seed}.predictions.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            return np.array([row["prediction"] == row["label"] for row in rows], dtype=float)

        gaps = np.mean([right("squeezed", s) - right("direct", s) for s in SEEDS], axis=0)
        return bootstrap(len(gaps), lambda rows: float(gaps[rows].mean()))


if __name__ == "__main__":
    Table(options(__doc__)).measure()
