"""Measure the README's table of experts: dense, dense experts, MPOE and MPOE without its mask, on wikitext-2 or E2E.

    data=../shared/data models=../shared/models
    python tests/bench/table_moe.py wikitext2 --data $data --model $models/gpt2-wikitext2-mini --work DIR
    python tests/bench/table_moe.py e2e --data $data --model $models/t5-e2e-mini --work DIR

Every arm goes on training the same model for the same tokens. Its learning rate is the best of some after a fifth of
the steps of the first seed, by perplexity or loss a target token on an eighth of the development data; both seeds
then take all steps at that rate, and are tested once, on all test data.
Results are kept in DIR, so that a run that was stopped goes on.
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

from losses import e2e_loss
from runs import mpocli, options, spread

TASKS: dict[str, dict[str, Any]] = {
    # 8 windows of 256 tokens, 500 steps: 1.02 M tokens.
    "wikitext2": {
        "how": ("--task", "lm", "--max-length", 256, "--batch-size", 8),
        "steps": 500,
        "train": "train.txt",
        "eval": "valid.txt",
        "test": "test.txt",
        "rates": (3e-5, 1e-4, 3e-4),
        "metric": "perplexity",
        "tuned": "perplexity",
        "arms": ("dense", "dense experts", "MPOE", "MPOE, no mask"),
    },
    "e2e": {
        "how": ("--task", "e2e", "--max-length", 64, "--batch-size", 16),
        "steps": 200,
        "train": "trainset.csv",
        "eval": "devset.csv",
        "test": "testset_w_refs.csv",
        "rates": (3e-6, 1e-5, 3e-5, 1e-4),
        "metric": "bleu",
        "tuned": "loss",
        "arms": ("dense", "dense experts", "MPOE"),
    },
}
SEEDS = (1, 2)
EXPERTS = 8
START: dict[str, tuple[str, ...]] = {
    "dense experts": ("--baseline-moe",),
    "MPOE": ("--mask-prob", "0.5"),
    "MPOE, no mask": ("--mask-prob", "0"),
}


class Table:
    def __init__(self, chosen: argparse.Namespace) -> None:
        self.options, self.task = chosen, TASKS[chosen.task]
        self.work: Path = chosen.work / chosen.task
        self.work.mkdir(parents=True, exist_ok=True)
        self.data: Path = chosen.data / chosen.task
        lines = (self.data / self.task["eval"]).read_text().splitlines(keepends=True)
        self.development = self.work / self.task["eval"]
        self.development.write_text("".join(lines[: len(lines) // 8]))

    def start(self, arm: str, seed: int) -> Path:
        if arm not in START:
            return Path(self.options.model)
        made = self.work / f"start-{arm.replace(', ', '-').replace(' ', '-')}-seed{seed}"
        if not made.is_dir():
            what = ("expand-moe", self.options.model, "--experts", EXPERTS, "--seed", seed, *START[arm])
            mpocli(*what, "-o", made, threads=self.options.threads)
        return made

    def run(self, arm: str, rate: float, seed: int, *, tune: bool = False) -> dict[str, Any]:
        name = f"{arm.replace(', ', '-').replace(' ', '-')}-lr{rate:g}-seed{seed}{'-tune' if tune else ''}"
        record = self.work / f"{name}.json"
        if record.is_file():
            kept: dict[str, Any] = json.loads(record.read_text())
            return kept
        began, task = time.time(), self.task
        report = mpocli(
            *("finetune", self.start(arm, seed), *task["how"], "--train", self.data / task["train"]),
            *("--eval", self.development, "--steps", task["steps"] // 5 if tune else task["steps"]),
            *(() if tune else ("--test", self.data / task["test"])),
            *("--lr", rate, "--seed", seed, "--precision", self.options.precision, "--save-steps", 100_000),
            *("-o", self.work / name, "--overwrite"),
            threads=self.options.threads,
        )
        if self.options.task == "e2e":
            where, file = ("metrics", self.development) if tune else ("test_metrics", self.data / task["test"])
            report[where]["loss"] = e2e_loss(self.work / name, self.options.model, file)
        report["minutes"] = (time.time() - began) / 60
        record.write_text(json.dumps(report))
        print(f"{time.strftime('%H:%M:%S')} {name}: {report['metrics']} {report.get('test_metrics')}", flush=True)
        return report

    def measure(self) -> None:
        metric, arms, rates, by = (self.task[key] for key in ("metric", "arms", "rates", "tuned"))
        with ThreadPoolExecutor(self.options.parallel) as pool:
            for arm in arms:  # one after the other, before runs share them
                self.start(arm, SEEDS[0])
            jobs = {
                (arm, rate): pool.submit(self.run, arm, rate, SEEDS[0], tune=True) for rate in rates for arm in arms
            }
            tuned = {key: job.result() for key, job in jobs.items()}
            best = {arm: min(rates, key=lambda rate: tuned[arm, rate]["metrics"][by]) for arm in arms}
            whole = {(arm, seed): pool.submit(self.run, arm, best[arm], seed) for seed in SEEDS for arm in arms}
            runs = {arm: [whole[arm, seed].result() for seed in SEEDS] for arm in arms}
        before = runs["dense"][0]["metrics_before"][metric]
        plain = sum(run["step_seconds"] for run in runs["dense"]) / len(runs["dense"])
        print(f"\nbefore: {metric} {before:.3f} on the first eighth of the development data")
        loss = self.options.task == "e2e"
        if loss:
            model = Path(self.options.model)
            print(f"before: loss {e2e_loss(model, model, self.development):.4f} a target token there")
        print(
            f"\n| | {metric}, test |{' loss, test |' if loss else ''} rate | parameters | weight files | time |\n|---|"
            + "---:|" * (6 if loss else 5)
        )
        for arm, found in runs.items():
            totals = found[0]["totals"]
            seconds = sum(run["step_seconds"] for run in found) / len(found)
            print(
                f"| {arm} | {spread([run['test_metrics'][metric] for run in found])} | "
                + (f"{spread([run['test_metrics']['loss'] for run in found])} | " if loss else "")
                + f"{best[arm]:g} | "
                f"{totals['params']:,} | {totals['bytes'] / 1e6:.1f} MB | {seconds / plain:.2f}× |"
            )
        for (arm, rate), report in tuned.items():
            print(f"tuning, {arm}, rate {rate:g}: {by} {report['metrics'][by]:.4f}, {report['metrics']}")
        minutes = sum(json.loads(file.read_text())["minutes"] for file in self.work.glob("*.json"))
        print(
            f"\n{' '.join(map(str, self.task['how']))}, {self.task['steps']} steps, {self.options.precision}, "
            f"seeds {list(SEEDS)}; {minutes:.0f} process-minutes, {platform.machine()}, {os.cpu_count()} cores, "
            f"{self.options.parallel} runs at a time"
        )


if __name__ == "__main__":
    Table(options(__doc__, TASKS)).measure()
