"""What the tables share: options, runs of the command line that report in JSON, and how results are printed."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

# Runs the command and says what the process's memory was at most.
_RUN = "import resource, sys; from mpocli.cli.app import main\ntry: main(sys.argv[1:])\nfinally: "
_RUN += "sys.stderr.write(f'\\npeak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}\\n')"


def parser(what: str | None, tasks: Collection[str] = ()) -> argparse.ArgumentParser:
    """The command line of a table; with `tasks` one of them has to be named."""
    made = argparse.ArgumentParser(description=what)
    if tasks:
        made.add_argument("task", choices=tasks)
    for name in ("--data", "--model", "--work"):
        made.add_argument(name, type=Path, required=True)
    made.add_argument("--precision", default="bf16")
    made.add_argument("--parallel", type=int, default=2)
    made.add_argument("--threads", type=int, default=1)
    return made


def options(what: str | None, tasks: Collection[str] = ()) -> argparse.Namespace:
    return parser(what, tasks).parse_args()


def mpocli(*arguments: object, threads: int) -> dict[str, Any]:
    """The report of one command, and `peak_kb`."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-c", _RUN, *map(str, arguments), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report | {"peak_kb": int(done.stderr.rpartition("peak ")[2])}


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def bootstrap(rows: int, difference: Callable[[Any], float]) -> tuple[float, float]:
    """95 % of a difference when the development rows are drawn anew, the same for all that is compared."""
    generator = np.random.default_rng(0)
    found = [difference(generator.integers(rows, size=rows)) for _ in range(2000)]
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)
