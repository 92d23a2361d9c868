"""A decomposed weight read from the files: as an MPO, as a dense matrix, or as the matrices of its experts."""

from __future__ import annotations

import torch

from mpocli.hf.weight import Weight
from mpocli.io.checkpoint import CheckpointReader
from mpocli.mpo import MPO
from mpocli.mpo.linalg import check_finite


def is_rounded(reader: CheckpointReader, weight: Weight) -> bool:
    """Whether the files hold a matrix in few bits: not its cores, where it has some."""
    return weight.entry is None and weight.key is not None and not reader.encoding(weight.key).is_exact


def read_mpo(reader: CheckpointReader, weight: Weight) -> MPO:
    """The stored cores of a decomposed weight. Raises `InputError` where one is not finite."""
    assert weight.entry is not None
    cores = []
    for core in weight.entry.spec.core_shapes():
        name = weight.key_of(core)
        tensor = reader.read(name)
        check_finite(tensor, name)
        cores.append(tensor)
    return MPO(tuple(cores), weight.shape, weight.entry.center)


def dense_tensor(reader: CheckpointReader, weight: Weight) -> torch.Tensor:
    """The dense weight of a decomposed module, in the orientation and dtype that its layer stores."""
    mpo = read_mpo(reader, weight)
    matrix = mpo.to(dtype=torch.float64).to_matrix().to(mpo.cores[0].dtype)
    return weight.oriented(matrix).contiguous()


def dense_experts(reader: CheckpointReader, weight: Weight) -> torch.Tensor:
    """(n, O, I), the matrices of a layer's experts in their cores' dtype."""
    assert weight.entry is not None
    spec = weight.entry.spec
    if spec.share == "dense":
        return reader.read(weight.key_of("weight"))
    cores = [reader.read(weight.key_of(core)) for core in spec.core_shapes()]
    for core, name in zip(cores, spec.core_shapes(), strict=True):
        check_finite(core, weight.key_of(name))
    matrices = []
    for expert in range(spec.experts):
        own = tuple((core[expert] if core.dim() == 5 else core).double() for core in cores)
        matrices.append(MPO(own, weight.shape).to_matrix().to(cores[0].dtype))
    return torch.stack(matrices)
