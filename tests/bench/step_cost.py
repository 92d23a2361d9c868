"""Measure what a training step of a lossless five-site MPO costs beside the dense step, in time and memory.

    python tests/bench/step_cost.py --model ../shared/models/minilm-l6 --text ../shared/data/wikitext2/train.txt

Batches of 32 × 128 real tokens. Each arm runs in a process of its own; the arms take turns step by step, so that a
noisy machine is noisy for all of them. Memory is the process's peak above what it had before the model was loaded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH, LENGTH = 32, 128
ARMS = {"dense": "all", "MPO, auxiliary cores": "auxiliary", "MPO, all cores": "all"}


def serve(model: str, text: str, update: str) -> None:
    """In a process: one training step for every line on stdin, its seconds on stdout; at the end the peak memory."""
    import torch
    import transformers as tf

    import mpocli  # noqa: F401  (registers the loader)
    from mpocli.methods.memory import peak_memory, reset_peak_memory
    from mpocli.train.loop.updates import parameter_groups, set_update

    cpu = torch.device("cpu")
    torch.ones(8, 8).matmul(torch.ones(8, 8))
    reset_peak_memory(cpu)
    before = peak_memory(cpu)
    torch.manual_seed(0)
    student: Any = tf.AutoModelForSequenceClassification.from_pretrained(model).train()
    set_update(student, update)
    optimiser = torch.optim.AdamW(parameter_groups(student, 1e-5, 1e-5, 0.0))
    tokenizer = tf.AutoTokenizer.from_pretrained(model)
    ids = tokenizer(Path(text).read_text()[:200_000], verbose=False)["input_ids"]
    batches = torch.tensor(ids[: len(ids) // (BATCH * LENGTH) * BATCH * LENGTH]).reshape(-1, BATCH, LENGTH)
    labels = torch.arange(BATCH) % 2
    for number, _ in enumerate(sys.stdin):
        started = time.perf_counter()
        student(input_ids=batches[number % len(batches)], labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in student.parameters() if p.requires_grad], 1.0)
        optimiser.step()
        optimiser.zero_grad()
        print(time.perf_counter() - started, flush=True)
    print(json.dumps({"peak": peak_memory(cpu) - before}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.model, options.text, options.serve)
        return
    with tempfile.TemporaryDirectory() as directory:
        lossless = f"{directory}/mpo"
        subprocess.run([sys.executable, "-m", "mpocli", "decompose", options.model, "-o", lossless], check=True)
        processes = {}
        for arm, update in ARMS.items():
            model = options.model if arm == "dense" else lossless
            command = [sys.executable, __file__, "--model", model, "--text", options.text, "--serve", update]
            processes[arm] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for step in range(options.steps + 2):
            for arm, process in processes.items():
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write("\n")
                process.stdin.flush()
                took = float(process.stdout.readline())
                if step >= 2:  # the first ones allocate
                    seconds[arm].append(took)
        peaks = {}
        for arm, process in processes.items():
            out, _ = process.communicate()
            peaks[arm] = json.loads(out.splitlines()[-1])["peak"]
    print("| arm | seconds per step (median) | time | peak memory | memory |\n|---|---:|---:|---:|---:|")
    for arm, found in seconds.items():
        # Pairs of neighbouring steps: both saw the same machine.
        ratio = statistics.median(a / b for a, b in zip(found, seconds["dense"], strict=True))
        print(
            f"| {arm} | {statistics.median(found):.2f} | {ratio:.2f}× | {peaks[arm] / 1e6:,.0f} MB | "
            f"{peaks[arm] / peaks['dense']:.2f}× |"
        )


if __name__ == "__main__":
    main()
