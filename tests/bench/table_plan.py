"""Measure the README's tables of plans: ways to the same size, without training, and healed by 200 steps.

    data=../shared/data models=../shared/models
    python tests/bench/table_plan.py gpt2 --data $data --model $models/gpt2-wikitext2-mini --work DIR [--heal]
    python tests/bench/table_plan.py minilm --data $data --model $models/minilm-l6 --work DIR [--heal]
    python tests/bench/table_plan.py t5 --data $data --model $models/t5-e2e-mini --work DIR [--heal]

The attention and feed-forward matrices keep 80, 60, 40, 20 and 10 % of their parameters. GPT-2: perplexity of the
wikitext-2 test text in windows of 256. MiniLM: cosine of its sentence embeddings (mean over tokens) with those of the
original, and Spearman's correlation of pair cosines with the scores of STS-B's development pairs. T5: loss per token on
E2E's development set.

Healing: 200 steps of `finetune --update all`, on the text that the model was trained on (GPT-2 and T5, measured on the
first 400 windows or pairs of the same data) or on SST-2, whose accuracy it then is (MiniLM, which has no head of its
own); the dense model gets the same steps. Each arm takes that of three rates which is best at 20 % on other data: 200
windows of validation text, 200 of E2E's test pairs, 1,000 training rows of SST-2 that are not trained on (MiniLM, which
that rate breaks at 80 %, chooses there for 80 and 60 % once more). Results are kept in DIR, so that a run that was
stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from losses import e2e_loss, embeddings, window_perplexity
from runs import mpocli, parser

RATIOS = (0.8, 0.6, 0.4, 0.2, 0.1)
CHOICES, ROWS = 200, 400  # windows or pairs that a rate is chosen by, and a healed model is measured on
ARMS: dict[str, tuple[str, ...]] = {
    "paper-shape MPO": ("--shapes", "paper", "--allocation", "uniform", "--sweeps", "0"),
    "plain SVD": ("--shapes", "svd", "--allocation", "uniform"),
    "whitened SVD": ("--shapes", "svd", "--allocation", "uniform", "--weights", "input"),
    "auto": (),
}
UNCALIBRATED = ("paper-shape MPO", "plain SVD")
DENSE = "dense"
Metrics = dict[str, float]


@dataclass(frozen=True)
class Setup:
    """Of one model. Files of the options that are named here lie in the data or, split there, in the work folder."""

    calibrate: tuple[Any, ...]
    measure: Callable[[Path, Path, Path], Metrics]
    heal: tuple[Any, ...]
    rates: tuple[float, ...]
    chosen_on: str
    evaluated_on: str
    # Of a healed model in a file, or the first so many of its windows or pairs; smaller is better.
    healed: Callable[[Path, Path, Path, int | None], float]
    tuned_at: tuple[float, ...] = (0.2,)

    def tuned_for(self, ratio: float) -> float:
        """The ratio whose rate is taken: the nearest that has one."""
        return min(self.tuned_at, key=lambda tuned: abs(tuned - ratio))


def gpt2(model_dir: Path, source: Path, data: Path) -> Metrics:
    return {"perplexity": window_perplexity(model_dir, source, data / "wikitext2" / "test.txt")}


def minilm(model_dir: Path, source: Path, data: Path) -> Metrics:
    return dict(zip(("cosine", "Spearman"), embeddings(model_dir, source, data / "stsb" / "dev.tsv"), strict=True))


def sst2_errors(model_dir: Path, source: Path, file: Path, most: int | None = None) -> float:
    report = mpocli("eval", model_dir, "--task", "sst2", "--eval", file, "--max-length", 64, threads=1)
    return -float(report["metrics"]["accuracy"])


def t5(model_dir: Path, source: Path, data: Path) -> Metrics:
    return {"loss": e2e_loss(model_dir, source, data / "e2e" / "devset.csv")}


SETUPS: dict[str, Setup] = {
    "gpt2": Setup(
        ("wikitext2/train.txt", "--samples", 64, "--seq-len", 256),
        gpt2,
        ("--task", "lm", "--train", "wikitext2/train.txt", "--max-length", 256, "--batch-size", 4),
        (3e-5, 1e-4, 3e-4),
        "wikitext2/valid.txt",
        "wikitext2/test.txt",
        window_perplexity,
    ),
    "minilm": Setup(
        ("stsb/train.tsv", "--task", "stsb", "--samples", 512, "--max-length", 64),
        minilm,
        ("--task", "sst2", "--train", "sst2-train.tsv", "--max-length", 64, "--batch-size", 8),
        (1e-4, 3e-4, 1e-3),
        "sst2-held.tsv",
        "sst2/dev.tsv",
        sst2_errors,
        (0.2, 0.8),
    ),
    "t5": Setup(
        ("e2e/trainset.csv", "--task", "e2e", "--samples", 256, "--max-length", 80),
        t5,
        ("--task", "e2e", "--train", "e2e/trainset.csv", "--limit", 8000, "--max-length", 80, "--batch-size", 4),
        (3e-4, 1e-3, 3e-3),
        "e2e/testset_w_refs.csv",
        "e2e/devset.csv",
        e2e_loss,
    ),
}


@dataclass(frozen=True)
class Table:
    """The runs of one model's table, each kept in the work folder under its name."""

    chosen: argparse.Namespace
    work: Path

    @cached_property
    def setup(self) -> Setup:
        return SETUPS[self.chosen.task]

    def file(self, name: str) -> Path:
        beside = self.work / name
        return beside if beside.is_file() else self.chosen.data / name

    def kept(self, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        record = self.work / f"{name}.json"
        if not record.is_file():
            began = time.time()
            found = run()
            record.write_text(json.dumps(found | {"minutes": (time.time() - began) / 60}))
            print(f"{time.strftime('%H:%M:%S')} {name}: {found}", flush=True)
        known: dict[str, Any] = json.loads(record.read_text())
        return known

    def directory(self, arm: str, ratio: float) -> Path:
        return self.chosen.model if arm == DENSE else self.work / f"{arm.replace(' ', '-')}-{ratio:g}"

    def compressed(self, arm: str, ratio: float) -> dict[str, Any]:
        out = self.directory(arm, ratio)

        def run() -> dict[str, Any]:
            file, *how = self.setup.calibrate
            calibrated = () if arm in UNCALIBRATED else ("--calibrate", self.chosen.data / file, *how)
            what = ("decompose", self.chosen.model, "--layers", "attention,ffn", "--ratio", ratio, *ARMS[arm])
            report = mpocli(*what, *calibrated, "-o", out, "--overwrite", threads=self.chosen.threads)
            selected = [module for module in report["modules"] if module["reason"] != "not selected"]
            kept = sum(module["params"] for module in selected) / sum(module["dense_params"] for module in selected)
            forms = [module["form"] or "dense" for module in selected]
            metrics = self.setup.measure(out, self.chosen.model, self.chosen.data)
            counted = {form: forms.count(form) for form in sorted(set(forms))}
            return {"metrics": metrics, "kept": kept, "seconds": report["seconds"], "forms": counted}

        return self.kept(out.name, run)

    def trained(self, arm: str, ratio: float, rate: float) -> Path:
        source = self.directory(arm, ratio)
        out = self.work / f"{DENSE if arm == DENSE else source.name}-{rate:g}"

        def run() -> dict[str, Any]:
            files = {"txt", "tsv", "csv"}
            options = [self.file(word) if str(word).rpartition(".")[2] in files else word for word in self.setup.heal]
            report = mpocli(
                *("finetune", source, *options, "--lr", rate, "--steps", 200, "--update", "all"),
                *("--save-steps", 100_000, "--precision", self.chosen.precision, "-o", out, "--overwrite"),
                threads=self.chosen.threads,
            )
            return {"trained": report["trainable_params"]}

        self.kept(out.name, run)
        return out

    def healed(self, arm: str, ratio: float, rate: float, file: str) -> dict[str, Any]:
        out = self.trained(arm, ratio, rate)
        trained = json.loads(out.with_name(f"{out.name}.json").read_text())["minutes"]
        name = f"{out.name}-{Path(file).stem}"
        most = CHOICES if file == self.setup.chosen_on else ROWS
        found = self.kept(name, lambda: {"healed": self.setup.healed(out, self.chosen.model, self.file(file), most)})
        return found | {"minutes": found["minutes"] + trained}

    def split_sst2(self) -> None:
        """8,000 training rows, and 1,000 others that choose the rate."""
        lines = (self.chosen.data / "sst2" / "train.tsv").read_text().splitlines(keepends=True)
        (self.work / "sst2-train.tsv").write_text("".join(lines[:8001]))
        (self.work / "sst2-held.tsv").write_text("".join([lines[0], *lines[8001:9001]]))


def main() -> None:
    made = parser(__doc__, SETUPS)
    made.add_argument("--heal", action="store_true", help="train every result for 200 steps and measure again")
    chosen = made.parse_args()
    torch.set_num_threads(chosen.threads)
    table = Table(chosen, chosen.work / chosen.task)
    table.work.mkdir(parents=True, exist_ok=True)
    table.split_sst2()
    setup = table.setup
    dense = setup.measure(chosen.model, chosen.model, chosen.data)
    healing = [DENSE, *ARMS] if chosen.heal else []
    with ThreadPoolExecutor(chosen.parallel) as pool:
        cells = [(arm, ratio) for ratio in RATIOS for arm in ARMS]
        runs = dict(zip(cells, pool.map(lambda cell: table.compressed(*cell), cells), strict=True))
        # The dense model's runs are the same at every ratio, and kept under one name.
        tuned = [(arm, at, rate, setup.chosen_on) for at in setup.tuned_at for arm in healing for rate in setup.rates]
        choices = dict(zip(tuned, pool.map(lambda run: table.healed(*run), tuned), strict=True))

        def tried(arm: str, ratio: float) -> list[float]:
            at = setup.tuned_for(ratio)
            return [choices[arm, at, rate, setup.chosen_on]["healed"] for rate in setup.rates]

        def best(arm: str, ratio: float) -> float:
            return min(zip(tried(arm, ratio), setup.rates, strict=True))[1]

        cells = [(arm, ratio) for ratio in reversed(RATIOS) for arm in healing if arm != DENSE or ratio == RATIOS[0]]
        again = pool.map(lambda cell: table.healed(*cell, best(*cell), setup.evaluated_on), cells)
        healed = dict(zip(cells, again, strict=True))
    for column in dense:
        print(f"\n| {column}, dense {dense[column]:.3f} | " + " | ".join(f"{ratio:.0%}" for ratio in RATIOS) + " |")
        print("|---|" + "---:|" * len(RATIOS))
        for arm in ARMS:
            print(f"| {arm} | " + " | ".join(f"{runs[arm, ratio]['metrics'][column]:.3f}" for ratio in RATIOS) + " |")
    if chosen.heal:
        again_dense = abs(healed[DENSE, RATIOS[0]]["healed"])
        print(f"\n| healed, dense {again_dense:.3f} at {best(DENSE, RATIOS[0]):g} |", end=" ")
        print(
            " | ".join(f"{ratio:.0%}" for ratio in RATIOS) + " |" + " rate | at the three rates |" * len(setup.tuned_at)
        )
        for arm in healing[1:]:
            print(f"| {arm} | " + " | ".join(f"{abs(healed[arm, ratio]['healed']):.3f}" for ratio in RATIOS), end=" | ")
            for at in setup.tuned_at:
                print(
                    f"{best(arm, at):g}",
                    ", ".join(f"{abs(value):.3f}" for value in tried(arm, at)),
                    sep=" | ",
                    end=" | ",
                )
            print()
    for (arm, ratio), found in runs.items():
        print(f"{arm} at {ratio:.0%}: kept {found['kept']:.4f}, {found['forms']}, {found['seconds']:.0f} s")
    minutes = [sum(found["minutes"] for found in part.values()) for part in (runs, choices, healed)]
    print(f"\n{minutes[0]:.0f} process-minutes, healing {sum(minutes[1:]):.0f}, {platform.machine()},", end=" ")
    print(f"{os.cpu_count()} cores, {chosen.parallel} at a time")


if __name__ == "__main__":
    main()
