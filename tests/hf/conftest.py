"""The helpers beside this file are importable, and sparse checkpoints to look at are made once."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from families import make
from sparse_checkpoints import dense_with_zeros, pruning

from mpocli.methods.sparsify import run as sparsify


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SimpleNamespace]:
    """dense/, oracle/ (dense with zeros) and sparse/ of a family, made once; nobody writes into them."""

    @functools.cache
    def made(family: str = "bert-classifier", dtype: torch.dtype = torch.float32) -> SimpleNamespace:
        path = tmp_path_factory.mktemp(family)
        model = make(family, path / "dense", dtype=dtype)
        pruned = dense_with_zeros(path / "dense", path / "oracle")
        report = sparsify.run(str(path / "dense"), pruning(), path / "sparse")
        assert {tensor.name for tensor in report.tensors} == pruned and len(pruned) >= 6
        return SimpleNamespace(
            cls=type(model), path=path, dense=path / "dense", oracle=path / "oracle", sparse=path / "sparse"
        )

    return made
