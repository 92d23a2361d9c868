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
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TASKS: dict[str, dict[str, Any]] = {
    "cola": {"metric": "matthews_correlation", "limit": 4000, "steps": 375, "batch": 32, "max_length": 64},
    "stsb": {"metric": "spearmanr", "limit": 4000, "steps": 375, "batch": 16, "max_length": 64},
}
LEARNING_RATES = (5e-5, 1e-4, 2e-4)
SEEDS = (1, 2, 3)
RAISE = 4  # the sceptic's arm: the same matrices, dense, at so many times the rate
ARMS: dict[str, list[str]] = {
    "plain": [],
    "plain, raised rate": ["--overparam", "none"],
    "svd": ["--overparam", "svd"],
    "static": ["--overparam", "static", "--top-n", "3"],
    "dynamic": ["--overparam", "dynamic", "--top-n", "3", "--splits", "3"],
}
# Runs the command and says what the process's memory was at most.
_RUN = "import resource, sys; from mpocli.cli.app import main\ntry: main(sys.argv[1:])\nfinally: "
_RUN += "sys.stderr.write(f'\\npeak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}\\n')"


class Table:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.task = options, TASKS[options.task]
        self.work: Path = options.work / options.task
        self.work.mkdir(parents=True, exist_ok=True)
        self.data: Path = options.data / options.task

    def run(self, arm: str, rate: float, seed: int) -> dict[str, Any]:
        name = f"{arm.replace(', ', '-').replace(' ', '-')}-lr{rate:g}-seed{seed}"
        record = self.work / f"{name}.json"
        if record.is_file():
            kept: dict[str, Any] = json.loads(record.read_text())
            return kept
        began, task = time.time(), self.task
        more = ["--mpo-lr", str(RAISE * rate)] if arm == "plain, raised rate" else []
        arguments = [
            *("finetune", self.options.model, "--task", self.options.task, *ARMS[arm], *more, "--json", "--overwrite"),
            *("--train", self.data / "train.tsv", "--eval", self.data / "dev.tsv", "--limit", task["limit"]),
            *("--steps", task["steps"], "--batch-size", task["batch"], "--max-length", task["max_length"]),
            *("--lr", rate, "--seed", seed, "--precision", self.options.precision, "--save-steps", 100_000),
            *("-o", self.work / name),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.options.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, "-c", _RUN, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        report: dict[str, Any] = json.loads(done.stdout)
        report["peak_kb"] = int(done.stderr.rpartition("peak ")[2])
        report["minutes"] = (time.time() - began) / 60
        record.write_text(json.dumps(report))
        print(f"{time.strftime('%H:%M:%S')} {name}: {report['metrics']}", flush=True)
        return report

    def measure(self) -> None:
        metric = self.task["metric"]
        with ThreadPoolExecutor(self.options.parallel) as pool:
            jobs = {(arm, rate): pool.submit(self.run, arm, rate, SEEDS[0]) for rate in LEARNING_RATES for arm in ARMS}
            tuned = {key: job.result() for key, job in jobs.items()}
            best = {arm: max(LEARNING_RATES, key=lambda rate: tuned[arm, rate]["metrics"][metric]) for arm in ARMS}
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
                f"| {arm} | {statistics.mean(values):.3f} ± {statistics.stdev(values):.3f} | {best[arm]:g} | "
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    Table(parser.parse_args()).measure()


if __name__ == "__main__":
    main()
