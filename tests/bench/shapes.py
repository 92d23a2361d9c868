"""The weighted error of every way to a size, for each matrix of an encoder alone.

    python tests/bench/shapes.py --model ../shared/models/minilm-l6 --text ../shared/data/wikitext2/train.txt

For 25 % and 10 % of each matrix's parameters: plain SVD, whitened SVD, the balanced two-site MPO, the same after four
weighted sweeps, and what the planner makes of the matrix alone in the norm of its inputs (`--weights input`). Errors
are sqrt(tr(D G Dᵀ) / tr(W G Wᵀ)), G the second moments of the matrix's inputs over 128 windows of 128 tokens.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import AutoModel

from mpocli.config.calibration import Calibration
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.moments import collect
from mpocli.methods.data.calibration import calibration_batches
from mpocli.mpo.candidates import Candidate, all_of
from mpocli.mpo.factorize import site_shape
from mpocli.mpo.fitting import FittingProblem
from mpocli.mpo.gram import regularised
from mpocli.mpo.sweep import fit
from mpocli.mpo.weighted import weighted_square

COLUMNS = ("plain SVD", "whitened SVD", "balanced", "balanced, 4 sweeps", "auto")


def errors(matrix: Tensor, gram: Tensor, ratio: float) -> tuple[list[float], str]:
    subject, plain = FittingProblem(matrix, gram), FittingProblem(matrix)
    size = int(ratio * matrix.numel())
    balanced = Candidate("balanced", site_shape(*matrix.shape, 2))
    truncated = plain.fitted_within(balanced, size, 0)
    swept = fit(matrix, truncated.mpo, gram, sweeps=4, tol=0.0)
    chains = [candidate for candidate in all_of(*matrix.shape) if candidate.name != "svd"]
    auto = [subject.svd_within(size)]
    chain = subject.most_promising(chains, size)
    auto += [subject.fitted_within(chain, size, 10)] if chain else []
    best = min(auto, key=lambda form: form.loss)
    forms = [plain.svd_within(size), auto[0], truncated, swept, best]
    whole = weighted_square(subject.wide, gram)
    return [math.sqrt(max(subject.loss_of(form.mpo), 0.0) / whole) for form in forms], best.candidate.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    checkpoint = Checkpoint.open(chosen.model)
    model = AutoModel.from_pretrained(chosen.model).eval()
    batches = calibration_batches(checkpoint, Calibration(chosen.text, 128, 128), None, 0)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layer" in name]
    began = time.time()
    with TemporaryDirectory() as folder:
        store = collect(model, batches, names, Path(folder) / "moments")
        for ratio in (0.25, 0.1):
            print(f"\n| {ratio:.0%} | " + " | ".join(COLUMNS) + " | form |\n|---|" + "---:|" * len(COLUMNS) + "---|")
            rows = []
            for name in names:
                moments = store[name]
                gram = regularised(moments.gram, moments.tokens)
                found, form = errors(model.get_submodule(name).weight.detach(), gram, ratio)
                rows.append(found)
                print(f"| {name} | " + " | ".join(f"{error:.3f}" for error in found) + f" | {form} |", flush=True)
                assert found[-1] <= min(found[:-1]) * (1 + 1e-9), name
            means = [statistics.mean(column) for column in zip(*rows, strict=True)]
            print("| mean | " + " | ".join(f"{mean:.3f}" for mean in means) + " | |")
    print(f"\n{time.time() - began:.0f} s on {chosen.threads} threads")


if __name__ == "__main__":
    main()
