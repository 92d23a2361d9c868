"""Measure the README's table of plans: four ways to the same size, without training, and healed by 200 steps.

    data=../shared/data models=../shared/models
    python tests/bench/table_plan.py gpt2 --data $data --model $models/gpt2-wikitext2-mini --work DIR [--heal]
    python tests/bench/table_plan.py minilm --data $data --model $models/minilm-l6 --work DIR [--heal]
    python tests/bench/table_plan.py t5 --data $data --model $models/t5-e2e-mini --work DIR [--heal]

The attention and feed-forward matrices keep 80, 60, 40, 20 and 10 % of their parameters. GPT-2: perplexity of the
wikitext-2 test text in windows of 256. MiniLM: cosine of its sentence embeddings (mean over tokens) with those of the
original, and Spearman's correlation of pair cosines with the scores of STS-B's development pairs. T5: loss per token on
E2E's development set. Results are kept in DIR, so that a run that was stopped goes on.
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from losses import e2e_loss
from runs import mpocli, parser
from scipy.stats import spearmanr
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import mpocli as _plugin  # noqa: F401 (so that from_pretrained knows the format)

RATIOS = (0.8, 0.6, 0.4, 0.2, 0.1)
ARMS: dict[str, tuple[str, ...]] = {
    "paper-shape MPO": ("--shapes", "paper", "--allocation", "uniform", "--sweeps", "0"),
    "plain SVD": ("--shapes", "svd", "--allocation", "uniform"),
    "whitened SVD": ("--shapes", "svd", "--allocation", "uniform", "--weights", "input"),
    "auto": (),
    "auto, sequential": ("--sequential",),
}
PLAIN = ("paper-shape MPO", "plain SVD")
ONLY_GPT2 = ("auto, sequential",)
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"calibrate": ("wikitext2/train.txt", "--samples", 64, "--seq-len", 256), "columns": ("perplexity",)},
    "minilm": {
        "calibrate": ("stsb/train.tsv", "--task", "stsb", "--samples", 512, "--max-length", 64),
        "columns": ("cosine", "Spearman"),
    },
    "t5": {
        "calibrate": ("e2e/trainset.csv", "--task", "e2e", "--samples", 256, "--max-length", 80),
        "columns": ("loss",),
    },
}
HEAL: dict[str, tuple[Any, ...]] = {
    "gpt2": ("--task", "lm", "--train", "wikitext2/train.txt", "--max-length", 256, "--batch-size", 8, "--lr", 3e-4),
    "t5": ("--task", "e2e", "--train", "e2e/trainset.csv", "--max-length", 80, "--batch-size", 16, "--lr", 3e-4),
}


# Sentence embeddings of the dense model.
ORIGINAL: dict[Path, list[torch.Tensor]] = {}


@torch.no_grad()
def gpt2(model_dir: Path, source: Path, data: Path) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    ids = torch.tensor(tokenizer((data / "wikitext2" / "test.txt").read_text())["input_ids"])
    windows = ids[: len(ids) // 256 * 256].view(-1, 256)
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in windows.split(16)]
    return {"perplexity": math.exp(sum(losses) / len(windows))}


@torch.no_grad()
def minilm(model_dir: Path, source: Path, data: Path) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(source)
    with (data / "stsb" / "dev.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    scores = [float(row.get("score") or row["label"]) for row in rows]
    sides = [[row["sentence1"] for row in rows], [row["sentence2"] for row in rows]]

    def embedded(path: Path) -> list[torch.Tensor]:
        model = AutoModel.from_pretrained(path).eval()
        made = []
        for sentences in sides:
            order = sorted(range(len(sentences)), key=lambda k: len(sentences[k]))  # little padding
            rows = torch.empty(len(sentences), model.config.hidden_size)
            for start in range(0, len(order), 64):
                part = order[start : start + 64]
                batch = tokenizer([sentences[k] for k in part], return_tensors="pt", padding=True, truncation=True)
                hidden = model(**batch).last_hidden_state
                mask = batch["attention_mask"][..., None]
                rows[part] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
            made.append(rows)
        return made

    if source not in ORIGINAL:
        ORIGINAL[source] = embedded(source)
    before, after = ORIGINAL[source], embedded(model_dir)
    cosine = torch.cat([(a * b).sum(-1) for a, b in zip(before, after, strict=True)]).mean()
    return {"cosine": float(cosine), "Spearman": float(spearmanr((after[0] * after[1]).sum(-1), scores).statistic)}


def t5(model_dir: Path, source: Path, data: Path) -> dict[str, float]:
    return {"loss": e2e_loss(model_dir, source, data / "e2e" / "devset.csv")}


MEASURES = {"gpt2": gpt2, "minilm": minilm, "t5": t5}


def main() -> None:
    made = parser(__doc__, MODELS)
    made.add_argument("--heal", action="store_true", help="train every result for 200 steps and measure again")
    chosen = made.parse_args()
    torch.set_num_threads(chosen.threads)
    work: Path = chosen.work / chosen.task
    work.mkdir(parents=True, exist_ok=True)
    setup, measure = MODELS[chosen.task], MEASURES[chosen.task]
    arms = [arm for arm in ARMS if chosen.task == "gpt2" or arm not in ONLY_GPT2]
    file, *how = setup["calibrate"]

    def run(arm: str, ratio: float) -> dict[str, Any]:
        record = work / f"{arm.replace(', ', '-').replace(' ', '-')}-{ratio:g}.json"
        if not record.is_file():
            began = time.time()
            calibrated = () if arm in PLAIN else ("--calibrate", chosen.data / file, *how)
            out = record.with_suffix("")
            what = ("decompose", chosen.model, "--layers", "attention,ffn", "--ratio", ratio, *ARMS[arm])
            report = mpocli(*what, *calibrated, "-o", out, "--overwrite", threads=chosen.threads)
            selected = [module for module in report["modules"] if module["reason"] != "not selected"]
            kept = sum(module["params"] for module in selected) / sum(module["dense_params"] for module in selected)
            forms = [module["form"] or "dense" for module in selected]
            found = {"metrics": measure(out, chosen.model, chosen.data), "kept": kept, "seconds": report["seconds"]}
            found["forms"] = {form: forms.count(form) for form in sorted(set(forms))}
            record.write_text(json.dumps(found | {"minutes": (time.time() - began) / 60}))
            print(f"{time.strftime('%H:%M:%S')} {record.stem}: {found}", flush=True)
        known: dict[str, Any] = json.loads(record.read_text())
        if chosen.heal and "healed" not in known:
            began = time.time()
            options = [chosen.data / word if "/" in str(word) else word for word in HEAL[chosen.task]]
            healed = record.with_name(f"{record.stem}-healed")
            source = record.with_suffix("")
            mpocli(
                *("finetune", source, *options, "--steps", 200, "--update", "all", "--save-steps", 100_000),
                *("--precision", chosen.precision, "-o", healed, "--overwrite"),
                threads=chosen.threads,
            )
            known["healed"] = measure(healed, chosen.model, chosen.data)
            known["minutes"] += (time.time() - began) / 60
            record.write_text(json.dumps(known))
            print(f"{time.strftime('%H:%M:%S')} {record.stem}, healed: {known['healed']}", flush=True)
        return known

    dense = measure(chosen.model, chosen.model, chosen.data)
    with ThreadPoolExecutor(chosen.parallel) as pool:
        jobs = {(arm, ratio): pool.submit(run, arm, ratio) for ratio in RATIOS for arm in arms}
        runs = {key: job.result() for key, job in jobs.items()}
    for kind in ("metrics", "healed") if chosen.heal else ("metrics",):
        for column in setup["columns"]:
            print(f"\n| {column}, dense {dense[column]:.3f} | " + " | ".join(f"{ratio:.0%}" for ratio in RATIOS) + " |")
            print("|---|" + "---:|" * len(RATIOS))
            for arm in arms:
                print(f"| {arm} | " + " | ".join(f"{runs[arm, ratio][kind][column]:.3f}" for ratio in RATIOS) + " |")
    for (arm, ratio), found in runs.items():
        print(f"{arm} at {ratio:.0%}: kept {found['kept']:.4f}, {found['forms']}, {found['seconds']:.0f} s")
    minutes = sum(found["minutes"] for found in runs.values())
    print(f"\n{minutes:.0f} process-minutes, {platform.machine()}, {os.cpu_count()} cores, {chosen.parallel} at a time")


if __name__ == "__main__":
    main()
