"""Measure the README's sparsity tables: dense, magnitude, movement, PST and Wanda on SST-2 or STS-B, or GPT-2 at once.

    data=../shared/data models=../shared/models
    python tests/bench/table_sparsify.py sst2 --data $data --model $models/minilm-l6 --work DIR
    python tests/bench/table_sparsify.py gpt2 --data $data --model $models/gpt2-wikitext2-mini --work DIR

Every trained arm takes the same steps from the same pretrained model, three learning rates on the first seed, and the
other seed at its best. Wanda prunes the dense arm's model of the same seed, and trains nothing. Results are kept in
DIR, so that a run that was stopped goes on.
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

from runs import mpocli, options, spread

TASKS: dict[str, dict[str, Any]] = {
    "sst2": {"metric": "accuracy", "limit": 8000, "steps": 375, "batch": 32, "sparsities": (0.5, 0.9)},
    "stsb": {"metric": "spearmanr", "limit": 4000, "steps": 375, "batch": 16, "sparsities": (0.9,)},
    "gpt2": {"metric": "perplexity"},
}
MAX_LENGTH = 64
SEEDS = (1, 2)
RATES = (5e-5, 1e-4, 2e-4)
TRAINED = ("magnitude", "movement", "pst")


class Table:
    def __init__(self, chosen: argparse.Namespace) -> None:
        self.options, self.task = chosen, TASKS[chosen.task]
        self.work: Path = chosen.work / chosen.task
        self.work.mkdir(parents=True, exist_ok=True)
        self.data: Path = chosen.data / chosen.task

    def keep(self, name: str, *arguments: object) -> dict[str, Any]:
        """A command's report: from DIR, or by running it."""
        record = self.work / f"{name}.json"
        if record.is_file():
            kept: dict[str, Any] = json.loads(record.read_text())
            return kept
        began = time.time()
        more = ("--precision", self.options.precision, "-o", self.work / name, "--overwrite")
        report = mpocli(*arguments, *more, threads=self.options.threads)
        report["minutes"] = (time.time() - began) / 60
        record.write_text(json.dumps(report))
        print(f"{time.strftime('%H:%M:%S')} {name}: {report['metrics']}", flush=True)
        return report

    def trained(self, arm: str, sparsity: float, rate: float, seed: int) -> dict[str, Any]:
        task = self.task
        name = f"{arm}-{sparsity:g}-lr{rate:g}-seed{seed}"
        verb = ("finetune",) if arm == "dense" else ("sparsify", "--method", arm, "--sparsity", sparsity)
        return self.keep(
            name,
            *(verb[0], self.options.model, *verb[1:], "--task", self.options.task, "--limit", task["limit"]),
            *("--train", self.data / "train.tsv", "--eval", self.data / "dev.tsv", "--max-length", MAX_LENGTH),
            *("--steps", task["steps"], "--batch-size", task["batch"], "--save-steps", 100_000),
            *("--lr", rate, "--seed", seed),
        )

    def wanda(self, sparsity: float, rate: float, seed: int) -> dict[str, Any]:
        dense = self.work / f"dense-0-lr{rate:g}-seed{seed}"
        return self.keep(
            f"wanda-{sparsity:g}-seed{seed}",
            *("sparsify", dense, "--method", "wanda", "--sparsity", sparsity, "--task", self.options.task),
            *("--calibrate", self.data / "train.tsv", "--samples", 128, "--eval", self.data / "dev.tsv"),
            *("--max-length", MAX_LENGTH, "--seed", seed),
        )

    def measure(self) -> None:
        if self.options.task == "gpt2":
            self.measure_gpt2()
            return
        metric, sparsities = self.task["metric"], self.task["sparsities"]
        cells = [("dense", 0.0), *((arm, sparsity) for sparsity in sparsities for arm in TRAINED)]

        def quality(report: dict[str, Any]) -> float:
            return float(report["metrics"][metric])

        with ThreadPoolExecutor(self.options.parallel) as pool:
            jobs = {(*cell, rate): pool.submit(self.trained, *cell, rate, SEEDS[0]) for cell in cells for rate in RATES}
            tuned = {key: job.result() for key, job in jobs.items()}
            best = {cell: max(RATES, key=lambda rate: quality(tuned[*cell, rate])) for cell in cells}
            rest = {
                (*cell, seed): pool.submit(self.trained, *cell, best[cell], seed)
                for seed in SEEDS[1:]
                for cell in cells
            }
            runs = {
                cell: [tuned[*cell, best[cell]], *(rest[*cell, seed].result() for seed in SEEDS[1:])] for cell in cells
            }
        for sparsity in sparsities:
            runs["wanda", sparsity] = [self.wanda(sparsity, best["dense", 0.0], seed) for seed in SEEDS]
        print(f"\n| | sparsity | {metric} | rate | trained | of model and scores | weight files |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        for (arm, sparsity), found in runs.items():
            report, rate = found[0], best.get((arm, sparsity))
            whole = report.get("dense_and_scores") or report["totals"]["dense_params"]
            trained = report["trainable_params"]
            print(
                f"| {arm} | {sparsity:.0%} | {spread([quality(run) for run in found])} | {rate or ''} | "
                f"{trained:,} | {trained / whole:.1%} | {report['totals']['bytes'] / 1e6:.1f} MB |"
            )
        for (arm, sparsity, rate), report in tuned.items():
            print(f"seed {SEEDS[0]}, {arm} at {sparsity:.0%}, rate {rate:g}: {quality(report):.4f}")
        task, minutes = self.task, sum(json.loads(file.read_text())["minutes"] for file in self.work.glob("*.json"))
        print(
            f"\n{task['limit']} rows, {task['steps']} steps, batch {task['batch']}, length {MAX_LENGTH}, "
            f"{self.options.precision}, seeds {list(SEEDS)}; {minutes:.0f} process-minutes, {platform.machine()}, "
            f"{os.cpu_count()} cores, {self.options.parallel} runs at a time"
        )

    def measure_gpt2(self) -> None:
        """One-shot pruning at 50 %: perplexity on the test text, two samples of calibration text."""
        text = self.options.data / "wikitext2"
        runs: dict[str, list[dict[str, Any]]] = {}
        for method in ("magnitude", "wanda", "sparsegpt"):
            for seed in SEEDS if method != "magnitude" else SEEDS[:1]:
                calibrated = ("--calibrate", text / "train.txt", "--samples", 128, "--seq-len", 256)
                report = self.keep(
                    f"{method}-seed{seed}",
                    *("sparsify", self.options.model, "--method", method, "--sparsity", 0.5, "--seed", seed),
                    *("--task", "lm", "--eval", text / "test.txt", "--max-length", 256),
                    *(calibrated if method != "magnitude" else ()),
                )
                runs.setdefault(method, []).append(report)
        first = runs["magnitude"][0]
        print("\n| | perplexity | weight files |\n|---|---:|---:|")
        print(
            f"| dense | {first['metrics_before']['perplexity']:.2f} | {first['totals_before']['bytes'] / 1e6:.1f} MB |"
        )
        for method, found in runs.items():
            values = ", ".join(f"{run['metrics']['perplexity']:.2f}" for run in found)
            print(f"| {method} | {values} | {found[0]['totals']['bytes'] / 1e6:.1f} MB |")


if __name__ == "__main__":
    Table(options(__doc__, TASKS)).measure()
