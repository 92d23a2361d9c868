"""How much more or less a matrix's error costs the model than its norm says, measured once and kept in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from mpocli.errors import InputError
from mpocli.hf.activations import Batch
from mpocli.hf.weight import Weight
from mpocli.io.files import OutputFile
from mpocli.io.readable import is_there, why_unreadable
from mpocli.methods.planner.divergence import RecordedOutputs, divergence, is_layer, replaced
from mpocli.methods.planner.fit_store import FitStore
from mpocli.nn.evaluating import evaluating
from mpocli.progress import Progress

# The size, as a part of a matrix, at which its SVD is measured.
_SIZE = 0.25
_FORMAT = 1
_LEAST, _MOST = 0.05, 20.0


def sensitivities(
    path: Path,
    identity: dict[str, Any],
    fits: FitStore,
    model: Any,
    weights: Sequence[Weight],
    batches: Sequence[Batch],
    progress: Progress | None = None,
) -> dict[str, float]:
    """Measured over predicted loss of every matrix that is one module's own, when it alone is truncated.

    Read from `path` as far as it holds them, measured otherwise and added to it. `identity` says what they belong to
    (model, text, seed); raises `InputError` for a file of another, or one that cannot be read.
    """
    known = _read(path, identity)
    missing = [weight for weight in weights if is_layer(weight) and weight.name not in known]
    with evaluating(model), TemporaryDirectory(dir=fits.folder.parent) as folder:
        dense = RecordedOutputs(model, batches if missing else (), Path(folder))
        for number, weight in enumerate(missing):
            if progress:
                progress(number, len(missing), f"truncating {weight.name} alone")
            norm, problem = fits.problem(weight)
            made = problem.svd_within(int(_SIZE * problem.dense))
            if norm.unmeasured or made is None:
                continue
            measured = _divergence_with(model, weight, made.mpo.to_matrix(), dense)
            predicted = fits.scale(weight, norm, problem) * made.loss
            # Of errors at round-off level the quotient means nothing.
            known[weight.name] = min(max(measured / predicted, _LEAST), _MOST) if predicted > 0.0 else 1.0
            # After each, so that a run that is stopped has lost one matrix.
            _write(path, {"format": _FORMAT, "of": identity, "measured_over_predicted": known})
    return known


def _divergence_with(model: Any, weight: Weight, matrix: Tensor, dense: RecordedOutputs) -> float:
    """Of a model in which this one matrix is replaced."""
    with replaced(model, {weight.name: weight}, lambda _: matrix):
        return divergence(model, dense)[0]


def _write(path: Path, data: dict[str, Any]) -> None:
    """The whole file or none of it."""
    OutputFile("--sensitivity", path, overwrite=True).write_text(json.dumps(data, indent=1) + "\n")


def _read(path: Path, identity: dict[str, Any]) -> dict[str, float]:
    if not is_there(path):
        return {}
    why = why_unreadable(path)  # a pipe would be waited for
    if why:
        raise InputError(f"--sensitivity {path}: {why}", hint="name another file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        belongs, known = dict(data["of"]), {str(k): float(v) for k, v in data["measured_over_predicted"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"--sensitivity {path}: holds no measurements ({type(error).__name__})", hint="name another file"
        ) from error
    if belongs != identity:
        differs = next((key for key in identity if belongs.get(key) != identity[key]), "model")
        other, this = belongs.get(differs), identity.get(differs)
        raise InputError(
            f"--sensitivity {path}: measured for {differs} {other!r}, and this is {this!r}",
            hint="name another file, or delete this one",
        )
    return known
