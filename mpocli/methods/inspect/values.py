"""What `inspect` reads of the tensors' values, where it is asked to: zeros that are stored dense, and spectra."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mpocli.hf.values import read_mpo
from mpocli.hf.weight import Weight
from mpocli.io.checkpoint import CheckpointReader
from mpocli.mpo import MPO, bond_spectra, entropy_nats, site_shape

# A dense tensor with fewer zeros than this part has them by chance.
_SPARSE = 0.01


def zeros_counted(reader: CheckpointReader, keys: Iterable[str]) -> dict[str, int]:
    """Of those tensors that are sparse, though stored dense."""
    found = {}
    for key in keys:
        if key in reader:
            tensor = reader.read(key)
            zeros = int((tensor == 0).sum())
            if zeros >= _SPARSE * tensor.numel():
                found[key] = zeros
    return found


def spectrum(reader: CheckpointReader, weight: Weight, sites: int) -> dict[str, Any]:
    """Singular values and entropy (nats) of every bond, with the shape that they are of, as fields of a `ModuleView`.

    A dense matrix is decomposed on `sites` sites.
    """
    if weight.entry is not None:
        mpo = read_mpo(reader, weight)
    else:
        assert weight.key is not None
        matrix = weight.oriented(reader.read(weight.key))
        mpo = MPO.from_matrix(matrix, site_shape(*weight.shape, sites), name=weight.key)
    spectra = bond_spectra(mpo)
    return {
        "out_dims": mpo.site_shape.out_dims,
        "in_dims": mpo.site_shape.in_dims,
        "bond_dims": mpo.bond_dims,
        "singular_values": tuple(tuple(values.tolist()) for values in spectra),
        "entropy_nats": tuple(entropy_nats(values) for values in spectra),
    }
