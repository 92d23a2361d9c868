"""Measure what share of a training step PST's masks take, and what the step costs beside plain fine-tuning.

    python tests/bench/mask_cost.py --model ../shared/models/minilm-l6 --text ../shared/data/wikitext2/train.txt

Batches of 32 × 128 real tokens, 90 % sparsity, every mask new in every step. Both arms take turns in one process, so
that a noisy machine is noisy for both.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from mpocli.config.scoring import Scoring
from mpocli.nn.masked import MaskedWeight
from mpocli.sparse import Pattern
from mpocli.train.sparse.masks import MaskTarget, put_masks

BATCH, LENGTH, SPARSITY = 32, 128, 0.9


class Timed:
    """Adds up the time that masks take."""

    def __init__(self) -> None:
        self.seconds, self._compute = 0.0, MaskedWeight._compute

    def __call__(self, masked: MaskedWeight, weight: torch.Tensor) -> Any:
        started = time.perf_counter()
        found = self._compute(masked, weight)
        self.seconds += time.perf_counter() - started
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--model", "--text"):
        parser.add_argument(name, required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    dense: Any = tf.AutoModelForSequenceClassification.from_pretrained(chosen.model).train()
    sparse = copy.deepcopy(dense)
    linear = [n for n, m in sparse.named_modules() if ".encoder." in n and isinstance(m, torch.nn.Linear)]
    sparse.requires_grad_(False)
    places = [MaskTarget(name, "weight", "matrix") for name in linear]
    masked = put_masks(sparse, places, Scoring(), Pattern(), together=False, seed=0)
    timed = Timed()
    MaskedWeight._compute = lambda self, weight: timed(self, weight)  # type: ignore[method-assign]
    tokenizer = tf.AutoTokenizer.from_pretrained(chosen.model)
    ids = tokenizer(Path(chosen.text).read_text()[:200_000], verbose=False)["input_ids"]
    batches = torch.tensor(ids[: len(ids) // (BATCH * LENGTH) * BATCH * LENGTH]).reshape(-1, BATCH, LENGTH)
    labels = torch.arange(BATCH) % 2
    arms = {"dense": dense, "PST": sparse}
    optimisers = {
        arm: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        for arm, model in arms.items()
    }
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    shares = []
    for step in range(chosen.steps + 2):
        for arm, model in arms.items():
            timed.seconds, started = 0.0, time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=chosen.precision == "bf16"):
                loss = model(input_ids=batches[step % len(batches)], labels=labels).loss
            loss.backward()
            optimisers[arm].step()
            optimisers[arm].zero_grad()
            if arm == "PST":
                for one in masked.values():
                    one.step(SPARSITY)
            took = time.perf_counter() - started
            if step >= 2:  # the first ones allocate, and the first PST step is dense
                seconds[arm].append(took)
                if arm == "PST":
                    shares.append(timed.seconds / took)
    ratio = statistics.median(a / b for a, b in zip(seconds["PST"], seconds["dense"], strict=True))
    print(f"{len(linear)} matrices, {chosen.precision}, {torch.get_num_threads()} threads, {chosen.steps} steps")
    print(f"dense {statistics.median(seconds['dense']):.2f} s, PST {statistics.median(seconds['PST']):.2f} s a step")
    print(f"a PST step takes {ratio:.2f}x a dense one; masks are {statistics.median(shares):.1%} of it")


if __name__ == "__main__":
    main()
