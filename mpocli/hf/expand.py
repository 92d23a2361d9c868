"""Over-parameterise: lossless MPOs in the place of dense matrices, for training. `replace.remove` folds them back."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from mpocli.errors import InputError
from mpocli.hf.replace import dense_shape, install
from mpocli.io.mpo_spec import MPOSpec
from mpocli.mpo import MPO, SiteShape, site_shape, symmetric_gauge
from mpocli.nn import MPOModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def overparam_shape(rows: int, columns: int, sites: int) -> SiteShape:
    """The papers' shape for *more* parameters: both dimensions split over the first and the last site, 1×1 between.

    The middle sites carry nothing but bonds, so that every one of them adds a square matrix (OPF, ACL 2023, tables
    4 and 5: m = 11 sites).

    >>> overparam_shape(768, 3072, 4)
    SiteShape(out_dims=(24, 1, 1, 32), in_dims=(48, 1, 1, 64))
    """
    if sites < 2:
        raise InputError(f"a {rows}x{columns} matrix on {sites} sites", hint="use two sites or more")
    ends = site_shape(rows, columns, 2)
    between = (1,) * (sites - 2)
    out, in_ = ends.out_dims, ends.in_dims
    return SiteShape((out[0], *between, out[1]), (in_[0], *between, in_[1]))


@torch.no_grad()
def expand(model: PreTrainedModel, name: str, sites: SiteShape) -> MPO:
    """Replace a dense linear module by a lossless MPO of its weight with √Λ of every bond on both of its sides.

    For `svd_shape` these are U√Σ and √ΣVᵀ; 1×1 sites begin as identities, up to signs. Optimisers that hold the old
    weight must be built anew. Raises `InputError` for a module that is no linear layer or does not fit `sites`.
    """
    module = model.get_submodule(name)
    found = dense_shape(module)
    if found is None or found[0] == "embedding":
        raise InputError(f"module {name}: a {type(module).__name__} cannot be over-parameterised")
    kind, shape = found
    weight = cast(torch.Tensor, module.weight)
    matrix = weight.T if kind == "conv1d" else weight
    mpo = symmetric_gauge(MPO.from_matrix(matrix, sites, name=name))
    install(model, {name: MPOSpec(kind, shape, sites.out_dims, sites.in_dims, mpo.bond_dims)}, weight.dtype)
    made = cast(MPOModule, model.get_submodule(name))
    made.load_mpo(mpo)
    made.train(module.training)
    return mpo
