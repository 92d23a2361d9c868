"""Time of planning and decomposing a model of BERT-base's widths, calibration apart.

    python tests/bench/plan_time.py --tokenizer ../shared/models/minilm-l6 --text ../shared/data/wikitext2/train.txt

The model has random weights with the decaying spectra of trained ones (σ_k ∝ k^−½), which is all that the time depends
on: 12 layers, 85 M parameters in attention and feed-forward matrices, 23 M in the embedding.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from mpocli.config.budget import Budget
from mpocli.config.calibration import Calibration
from mpocli.config.decompose import DecomposeConfig
from mpocli.methods.decompose import run as decompose


def make(directory: Path, tokenizer: str) -> None:
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig())
    with torch.no_grad():
        for parameter in model.bert.encoder.parameters():
            if parameter.dim() == 2:
                rank = min(parameter.shape)
                spectrum = torch.arange(1, rank + 1) ** -0.5
                left, right = torch.randn(parameter.shape[0], rank), torch.randn(rank, parameter.shape[1])
                parameter.copy_((left * spectrum) @ right * 0.02 / spectrum.norm())
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--weights", default="fisher")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    with TemporaryDirectory() as folder:
        make(Path(folder) / "bert", chosen.tokenizer)
        calibration = Calibration(chosen.text, chosen.samples, 256)
        budget = Budget(ratio=chosen.ratio, calibration=calibration, weights=chosen.weights)
        began = time.time()
        calibrated = [began]
        stages: dict[str, float] = {}

        def progress(done: int, total: int, what: str) -> None:
            stage = what.partition(" ")[0]
            if stage == "calibrating":
                calibrated[0] = time.time()
            stages[stage] = time.time()

        report = decompose.run(
            str(Path(folder) / "bert"),
            DecomposeConfig(layers=("embedding", "attention", "ffn"), budget=budget),
            Path(folder) / "out",
            progress=progress,
        )
        ended = time.time()
    forms = [module.form for module in report.modules if module.form]
    print({form: forms.count(form) for form in sorted(set(forms))}, f"ratio of the model {report.totals.ratio:.3f}")
    print(f"calibration {calibrated[0] - began:.0f} s; planning and decomposing {ended - calibrated[0]:.0f} s")
    print({stage: f"{moment - began:.0f} s" for stage, moment in stages.items()})


if __name__ == "__main__":
    main()
