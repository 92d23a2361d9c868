"""Whether a manifest tells the truth: every claim is told again from files, class and base, and compared.

Nothing can be claimed past this: the whole manifest is made anew and compared leaf by leaf, so that a new field is
verified or a difference. What stays as it is claimed is listed in `PROVENANCE`, and measurements, which have checks of
their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from mpocli.errors import InputError
from mpocli.hf.artifact import Checkpoint
from mpocli.hf.settled import settled
from mpocli.hf.values import dense_experts, read_mpo
from mpocli.hf.weight import Weight
from mpocli.io.differences import differences, leaves
from mpocli.io.digest import file_sha256
from mpocli.io.json_file import read_json
from mpocli.io.manifest import Manifest
from mpocli.io.model_files import unlisted_files
from mpocli.io.module_entry import ModuleEntry
from mpocli.io.read_manifest import read_manifest
from mpocli.io.schema import MANIFEST
from mpocli.mpo import Truncation, canonical_defect, decompose, norm_squared, stored_error
from mpocli.progress import Progress

# What nobody can tell from the files: where the model came from and what was done to it. Of these the base's digest
# and the first input's are compared with each other, and all digests with the weights of `--base`.
PROVENANCE = ("base_model", "history")
# Half precision stores a canonical core with this much rounding in AᵀA.
_CANONICAL_TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-1}
# And the squared relative error with this much of it, beside what was discarded.
_ERROR_TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}


@dataclass
class _Findings:
    """Problems, and how many things were looked at."""

    problems: list[str] = field(default_factory=list)
    checks: int = 0

    def check(self, problem: str | None) -> None:
        self.checks += 1
        if problem:
            self.problems.append(problem)


def verify(checkpoint: Checkpoint, base: str | None, progress: Progress | None) -> tuple[tuple[str, ...], int]:
    """Problems found, and how many things were checked; structure was checked on opening.

    Without `base` an error is held against what was discarded, where that is known; with it everything that was
    measured is measured again. Raises `InputError` for a checkpoint that mpocli did not write.
    """
    if checkpoint.manifest is None:
        raise InputError(
            f"{checkpoint.source.name}: is not an MPO checkpoint, there is nothing to verify",
            hint="--verify checks what mpocli wrote",
        )
    found = _Findings()
    directory = checkpoint.source.directory
    # As it is written: `checkpoint` has forgotten the measurements if the weights were changed since.
    manifest = read_manifest(directory, checkpoint.config_json)
    assert manifest is not None
    if (directory / MANIFEST).is_file():
        _files(found, directory, manifest)
        _derived(found, checkpoint, manifest)
        _origin(found, manifest)
    _patterns(found, checkpoint)
    origin = Checkpoint.open(base, trust_remote_code=checkpoint.trust_remote_code) if base else None
    if origin is not None:
        # What any command of the chain started from may serve: errors refer to the input of the one that made them.
        claimed = _digests(manifest)
        other = bool(claimed) and origin.reader.sha256 not in claimed
        found.check(
            f"base model: {base} has other weights than the ones recorded ({claimed[0][:12]}…)" if other else None
        )
    originals = {weight.name: weight for weight in origin.survey.weights} if origin else {}
    made = [weight for weight in checkpoint.survey.weights if weight.entry is not None]
    for count, weight in enumerate(made, 1):
        claim = manifest.by_name[weight.entry.name] if weight.entry else None
        assert claim is not None
        against = claim.measured_against
        unknown = against is not None and against not in _digests(manifest)
        found.check(f"{weight.name}: its error refers to {against}, no input of the history" if unknown else None)
        if not claim.spec.experts:
            _canonical(found, checkpoint, weight, claim)
            _discarded(found, checkpoint, weight, claim)
        if origin is not None and claim.relative_error is not None:
            original = originals.get(weight.name)
            if not _refers_to(claim, origin, original):
                pass
            elif original is None or original.key is None:
                found.check(f"{weight.name}: {base} has no such weight")
            else:
                _measured(found, checkpoint, weight, claim, _matrix(origin, original), str(base))
        if progress:
            progress(count, len(made), weight.name)
    return tuple(found.problems), found.checks


def _refers_to(claim: ModuleEntry, origin: Checkpoint, original: Weight | None) -> bool:
    """Whether an error was measured against this input of the chain of commands, and not against another one."""
    if claim.measured_against is not None:
        return claim.measured_against == origin.reader.sha256
    return original is None or original.entry is None


def _matrix(checkpoint: Checkpoint, weight: Weight) -> Tensor:
    """A weight in its module's orientation, whether it is stored dense or as cores."""
    assert weight.key is not None
    if weight.entry is not None:
        return read_mpo(checkpoint.reader, weight).to(dtype=torch.float64).to_matrix()
    return weight.oriented(checkpoint.reader.read(weight.key))


def _files(found: _Findings, directory: Path, manifest: Manifest) -> None:
    """Every file's digest and size; and that none of the model's is there which the manifest does not know."""
    for name, claim in manifest.files.items():
        path = directory / name
        if not path.is_file():
            found.check(f"{name}: is in {MANIFEST} and not in the directory")
        elif path.stat().st_size != claim["bytes"]:
            found.check(f"{name}: {path.stat().st_size} bytes, {MANIFEST} says {claim['bytes']}")
        else:
            changed = file_sha256(path) != claim["sha256"]
            found.check(f"{name}: its sha256 is not the one in {MANIFEST}" if changed else None)
    for name in unlisted_files(directory, manifest.files):
        found.check(f"{name}: is in the directory and not in {MANIFEST}")


def _derived(found: _Findings, checkpoint: Checkpoint, manifest: Manifest) -> None:
    """The manifest made anew: all but files, provenance and measurements is told from files and class."""
    again = settled(manifest, checkpoint.survey, checkpoint.reader)
    # An older mpocli wrote no `matrices`, and nothing that is not said is false.
    again = replace(again, totals=checkpoint.totals(), matrices=manifest.matrices and again.matrices)
    claimed = read_json(checkpoint.source.directory / MANIFEST)
    found.checks += sum(leaves(value) for key, value in claimed.items() if key not in ("files", *PROVENANCE))
    for difference in differences(claimed, again.to_dict()):
        found.problems.append(
            f"{difference.where}: {difference.found!r} by files and class, {MANIFEST} says {difference.claimed!r}"
        )


def _digests(manifest: Manifest) -> list[str]:
    recorded = [manifest.base_model.get("weights_sha256"), *(step.get("input_sha256") for step in manifest.history)]
    return [str(digest) for digest in recorded if digest]


def _origin(found: _Findings, manifest: Manifest) -> None:
    """The chain of commands began with the base model."""
    said = manifest.base_model.get("weights_sha256")
    first = manifest.history[0].get("input_sha256") if manifest.history else said
    found.check(
        f"base_model.weights_sha256: {str(said)[:12]}…, the first command of the history read {str(first)[:12]}…"
        if said != first
        else None
    )


def _patterns(found: _Findings, checkpoint: Checkpoint) -> None:
    """Values are as the encodings say, a pattern of zeros above all."""
    rows = {weight.key: weight for weight in checkpoint.survey.weights if weight.key}
    for key, name in checkpoint.reader.encoded.items():

        def matrix(key: str = key) -> Tensor:
            tensor = checkpoint.reader.read(key)
            return rows[key].oriented(tensor) if key in rows else tensor

        problem = checkpoint.reader.encoding(key).problem(matrix)
        found.check(f"encodings.{name}.{problem}" if problem else None)


def _canonical(found: _Findings, checkpoint: Checkpoint, weight: Weight, claim: ModuleEntry) -> None:
    center = claim.center
    if center is not None and not 0 <= center < claim.spec.sites.sites:
        found.check(f"{weight.name}: claims canonical cores around {center}, of {claim.spec.sites.sites} cores")
        return
    mpo = replace(read_mpo(checkpoint.reader, weight), center=center)
    defect = canonical_defect(mpo)
    wrong = defect > _CANONICAL_TOLERANCE.get(claim.dtype, 1e-5)
    found.check(f"{weight.name}: claims canonical cores around {center}, off by {defect:.1e}" if wrong else None)


def _discarded(found: _Findings, checkpoint: Checkpoint, weight: Weight, claim: ModuleEntry) -> None:
    """ε² = Σ ε_k²: the error against what was discarded, of which padding has its part."""
    if claim.discarded_weight is None:
        return
    bonds = claim.spec.sites.sites - 1
    if len(claim.discarded_weight) != bonds or min(claim.discarded_weight) < 0:
        found.check(f"{weight.name}: discarded weights {list(claim.discarded_weight)} of {bonds} bonds")
        return
    total = sum(claim.discarded_weight)
    whole = norm_squared(read_mpo(checkpoint.reader, weight)) + total  # ‖W‖², since every cut projects
    if claim.relative_error is None or not whole:
        return
    share, squared = total / whole, claim.relative_error**2
    tolerance = _ERROR_TOLERANCE.get(claim.dtype, 1e-5)
    padded = claim.spec.sites.padded_shape != claim.spec.shape
    wrong = squared - share > tolerance or (share - squared > tolerance and not padded)
    found.check(
        f"{weight.name}: discarded weights are {share:.6g} of the squared norm, and the relative error "
        f"{claim.relative_error:.6g} is {squared:.6g} of it"
        if wrong
        else None
    )


def _measured(
    found: _Findings, checkpoint: Checkpoint, weight: Weight, claim: ModuleEntry, matrix: Tensor, base: str
) -> None:
    """Errors and discarded weights against the matrix that was decomposed."""
    assert claim.relative_error is not None
    for number, error in enumerate(_errors(checkpoint, weight, claim, matrix)):
        which = f"expert {number}'s " if claim.spec.experts else ""
        wrong = abs(error - claim.relative_error) > 1e-6 * max(1.0, error)
        found.check(
            f"{weight.name}: {which}relative error {error:.6g} against {base}, {MANIFEST} says "
            f"{claim.relative_error:.6g}"
            if wrong
            else None
        )
    if claim.discarded_weight is None:
        return
    _, again = decompose(matrix, claim.spec.sites, Truncation(claim.spec.bond_dims[1:-1]), name=weight.name)
    tolerance = 1e-5 * again.norm_squared
    if abs(sum(again.discarded_weight) - sum(claim.discarded_weight)) > tolerance:
        # Cut in one go to bonds that were trimmed afterwards, another bond loses more; the sum was checked above.
        return
    for k, (one, other) in enumerate(zip(again.discarded_weight, claim.discarded_weight, strict=True)):
        wrong = abs(one - other) > tolerance
        found.check(
            f"{weight.name}: discarded weight {one:.6g} at bond {k + 1} against {base}, {MANIFEST} says {other:.6g}"
            if wrong
            else None
        )


def _errors(checkpoint: Checkpoint, weight: Weight, claim: ModuleEntry, matrix: Tensor) -> Iterator[float]:
    """‖W−Ŵ‖_F / ‖W‖_F of what is stored, for each expert where there are several."""
    if not claim.spec.experts:
        difference, norm = stored_error(matrix, read_mpo(checkpoint.reader, weight))
        yield difference / norm if norm else 0.0
        return
    for rebuilt in dense_experts(checkpoint.reader, weight):
        norm = float(matrix.double().norm())
        yield math.sqrt(float((rebuilt.double() - matrix.double()).square().sum())) / norm if norm else 0.0
