"""Linear layers of a loaded model by sparse kernels, where these are measured to be the faster ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from mpocli.nn.packed import is_packed
from mpocli.nn.sparse_linear import SemiStructuredLinear, SparseLinear, fits_semi_structured

# Time for all measurements of a model. A group of equal layers is always given a warm-up and one measurement.
_SECONDS = 1.0
# Multiplications of one measurement: rows beyond these would change both times by the same factor.
_MOST_ROWS, _LEAST_ROWS, _MOST_PRODUCTS = 512, 64, 1 << 31
# Layers are measured together if their sparsities round to the same number, coarsely so where they are many.
_STEP, _COARSE_STEP, _MOST_GROUPS = 0.01, 0.05, 16
# A sparse kernel must be faster by this share to be chosen: what a measurement is good for.
_GAIN = 0.1


PathChoice = Literal["auto", "dense", "sparse"]


@dataclass(frozen=True)
class PathReport:
    """Equal linear layers: how they are computed, and the seconds that one of them takes for `tokens` rows.

    `shape` is (O, I), `modules` their number, `sparsity` the mean share of zeros. `sparse_seconds` is None where
    there is no sparse kernel for the device, the precision and the places of the zeros.
    """

    shape: tuple[int, int]
    sparsity: float
    tokens: int
    modules: int
    path: Literal["dense", "csr", "2:4"]
    dense_seconds: float
    sparse_seconds: float | None


@dataclass(frozen=True)
class _Layer:
    """A dense layer, all names that the model has for it, its share of zeros and the kernel that it could run on."""

    module: nn.Module
    names: tuple[str, ...]
    matrix: Tensor  # (O, I)
    transposed: bool
    sparsity: float
    kernel: type[SparseLinear] | None

    def packed(self, precision: str) -> SparseLinear:
        assert self.kernel is not None
        dtype = torch.bfloat16 if precision == "bf16" else None
        return self.kernel(self.module, transposed=self.transposed, dtype=dtype)


@torch.no_grad()
def choose_paths(
    model: nn.Module,
    tokens: int,
    *,
    precision: str = "fp32",
    path: PathChoice = "auto",
    least: float = 0.5,
    repeats: int = 5,
) -> list[PathReport]:
    """Measure the layers with a share of zeros of at least `least`, and let a sparse kernel compute some of them.

    `auto` takes the faster kernel, `sparse` the sparse one wherever there is one, `dense` none; all report the times
    of both. `tokens` is the number of rows of a typical call, `precision` that of the run: `fp32`, the weights' own,
    or `bf16` by autocast. There is CSR for float32 on a CPU, and 2:4 for half precision on a CUDA device. Linear
    layers with a forward pass of their own, with hooks, and those tied to an embedding are left alone. The largest
    matrices are measured on fewer rows than asked for, and the report says on how many.
    """
    restore_paths(model)
    groups = _groups(_sparse_layers(model, least, precision))
    reports = []
    for group in groups:
        first = group[0]
        rows = min(tokens, _MOST_ROWS, max(_LEAST_ROWS, _MOST_PRODUCTS // first.matrix.numel()))
        candidates = [first.module] + ([first.packed(precision)] if first.kernel else [])
        x = torch.randn(rows, first.matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(first.matrix)
        calls = [_call(layer, x, precision) for layer in candidates]
        times = _latencies(calls, repeats, _SECONDS / len(groups))
        faster = len(times) == 2 and times[1] <= (1 - _GAIN) * times[0]
        kernel = first.kernel if path == "sparse" or (path == "auto" and faster) else None
        if kernel:
            for layer in group:
                packed = layer.packed(precision)
                for name in layer.names:
                    model.set_submodule(name, packed)
        reports.append(
            PathReport(
                shape=(first.matrix.shape[0], first.matrix.shape[1]),
                sparsity=statistics.fmean(layer.sparsity for layer in group),
                tokens=rows,
                modules=len(group),
                path=kernel.path if kernel else "dense",
                dense_seconds=times[0],
                sparse_seconds=times[1] if len(times) == 2 else None,
            )
        )
    return reports


def restore_paths(model: nn.Module) -> None:
    """Put the dense layers back: before the model is copied or trained."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, SparseLinear):
            model.set_submodule(name, module.dense)


def _sparse_layers(model: nn.Module, least: float, precision: str) -> list[_Layer]:
    from transformers.pytorch_utils import Conv1D

    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        # The very classes: those derived from them compute, store or read their weights otherwise.
        if type(module) in (nn.Linear, Conv1D) and not module._forward_hooks and not module._forward_pre_hooks:
            names.setdefault(module, []).append(name)
    found = []
    for module, known in names.items():
        weight = cast(Tensor, module.weight)
        if id(weight) in tables or is_packed(weight) or weight.is_meta or not weight.numel():
            continue
        sparsity = 1 - int(torch.count_nonzero(weight)) / weight.numel()
        if sparsity >= least:
            transposed = isinstance(module, Conv1D)
            matrix = weight.T if transposed else weight
            found.append(_Layer(module, tuple(known), matrix, transposed, sparsity, _kernel(matrix, precision)))
    return found


def _kernel(matrix: Tensor, precision: str) -> type[SparseLinear] | None:
    """The sparse kernel that there is for an (O, I) matrix; a CPU's bfloat16 products are dense ones."""
    if matrix.device.type == "cpu":
        return SparseLinear if matrix.dtype == torch.float32 and precision == "fp32" else None
    dtype = torch.bfloat16 if precision == "bf16" else matrix.dtype
    return SemiStructuredLinear if fits_semi_structured(matrix, dtype) else None


def _groups(layers: Sequence[_Layer]) -> list[list[_Layer]]:
    """Layers that take the same time, the largest first."""
    groups: dict[tuple[object, ...], list[_Layer]] = {}
    for step in (_STEP, _COARSE_STEP):
        groups = {}
        for layer in layers:
            kind = type(layer.module), layer.matrix.shape, layer.module.bias is None, layer.kernel
            groups.setdefault((*kind, round(layer.sparsity / step)), []).append(layer)
        if len(groups) <= _MOST_GROUPS:
            break
    return sorted(groups.values(), key=lambda group: (-group[0].matrix.numel(), group[0].sparsity))


def _call(layer: nn.Module, x: Tensor, precision: str) -> Callable[[], None]:
    def call() -> None:
        # Entered anew each time, as in every batch: autocast narrows a weight once and remembers it.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            layer(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    return call


def _latencies(calls: Sequence[Callable[[], None]], repeats: int, seconds: float) -> list[float]:
    """The median seconds of every call, after one that does not count.

    The calls take turns, so that a busy moment of the machine meets all of them. After `seconds` no round is begun.
    """
    times: list[list[float]] = [[] for _ in calls]
    stop = time.perf_counter() + seconds
    for done in range(repeats + 1):
        if done > 1 and time.perf_counter() > stop:
            break
        for call, found in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            found.append(time.perf_counter() - started)
    return [statistics.median(found[1:]) for found in times]
