"""A packed weight computes what its values do, bit by bit, and never keeps them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpocli.io.encodings.quantised import Quantised
from mpocli.mpo import MPO, SiteShape
from mpocli.nn import MPOEmbedding, MPOLinear
from mpocli.nn.packed import PackedTensor, packed_names, parameter, resident_bytes

ENCODINGS = [
    Quantised((48, 32), bits=4, group=16),
    Quantised((48, 32), bits=3, group=8, offsets=True),
    Quantised((48, 32), bits=8, group=0),
    Quantised((48, 32), bits=2, group=10, transposed=True),
]
FOUR = ENCODINGS[0]


def packed(encoding: Quantised, dtype: torch.dtype = torch.float32) -> tuple[nn.Parameter, Tensor]:
    """A packed parameter of random values, and its values."""
    tensor = torch.randn(encoding.shape, generator=torch.Generator().manual_seed(5))
    found = parameter(encoding.pack(tensor), encoding, dtype)
    assert isinstance(found, PackedTensor) and isinstance(found, nn.Parameter) and not found.requires_grad
    return found, found.unpacked()


def linear(encoding: Quantised = FOUR) -> tuple[nn.Linear, nn.Linear]:
    """A layer with a packed weight, and the dense one."""
    made, dense = nn.Linear(encoding.shape[1], encoding.shape[0]), nn.Linear(encoding.shape[1], encoding.shape[0])
    made.weight, values = packed(encoding)
    dense.load_state_dict({"weight": values, "bias": made.bias.detach()})
    return made, dense


def kept_for_backward(compute: Callable[[], Tensor]) -> list[Tensor]:
    """What autograd keeps of a computation."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    return kept


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: F.linear(x, w),
    "linear of three dimensions": lambda x, w: F.linear(x.reshape(2, 3, 32), w, torch.ones(48)),
    "Conv1D": lambda x, w: torch.addmm(torch.ones(48), x, w.T),
    "a core's contraction": lambda x, w: x @ w.reshape(6, 8, 4, 8).permute(2, 3, 0, 1).reshape(32, 48),
    "arithmetic": lambda x, w: (x[:, None] * w).sum(-1) + w.mean(),
}


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: f"{encoding.bits} bits")
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_results_and_gradients_are_those_of_the_values(
    operation: Callable[[Tensor, Tensor], Tensor], encoding: Quantised
) -> None:
    weight, values = packed(encoding)
    inputs = [torch.randn(6, 32, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    results = [operation(x, w) for x, w in zip(inputs, (weight, values), strict=True)]
    assert torch.equal(*results) and type(results[0]) is Tensor
    for result in results:
        result.square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("operation", [*OPERATIONS.values()][:4], ids=[*OPERATIONS][:4])
def test_autograd_keeps_codes_and_not_values(operation: Callable[[Tensor, Tensor], Tensor]) -> None:
    weight, values = packed(FOUR)
    x = torch.randn(6, 32, requires_grad=True)
    assert any(found.numel() == values.numel() for found in kept_for_backward(lambda: operation(x, values)))
    assert all(
        isinstance(found, PackedTensor) or found.numel() < values.numel()
        for found in kept_for_backward(lambda: operation(x, weight))
    )


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: f"{encoding.bits} bits")
def test_a_lookup_unpacks_the_rows_it_needs(monkeypatch: pytest.MonkeyPatch, encoding: Quantised) -> None:
    weight, values = packed(encoding)
    ids = torch.tensor([[3, 47, 3], [0, 1, 2]])
    unpacked: list[int] = []
    unpack = Quantised.unpack

    def watched(self: Quantised, *parts: Tensor) -> Tensor:
        unpacked.append(self.shape[0])
        return unpack(self, *parts)

    monkeypatch.setattr(Quantised, "unpack", watched)
    assert torch.equal(F.embedding(ids, weight), F.embedding(ids, values))
    assert unpacked == [48 if encoding.transposed else 6]
    assert F.embedding(ids[:0], weight).shape == (0, 3, 32)
    with pytest.raises(IndexError):
        F.embedding(torch.tensor([48]), weight)


@pytest.mark.parametrize("cores", ["central", "all"])
@pytest.mark.parametrize("rows", [1, 50])  # through the chain, and with the matrix rebuilt
def test_an_mpo_of_packed_cores_is_exact_in_values_and_gradients(cores: str, rows: int) -> None:
    torch.manual_seed(0)
    sites = SiteShape((4, 4, 3), (2, 4, 4))
    dense = MPOLinear.from_mpo(MPO.from_matrix(torch.randn(48, 32), sites), torch.randn(48))
    table = MPOEmbedding.from_mpo(MPO.from_matrix(torch.randn(48, 32), sites))
    for module, inputs in ((dense, torch.randn(rows, 32)), (table, torch.randint(48, (rows,)))):
        made = copy.deepcopy(module)
        for k, core in enumerate(module.cores):
            if cores == "all" or k == module.central:
                encoding = Quantised(tuple(core.shape), bits=4, group=16)
                setattr(made, f"core_{k}", parameter(encoding.pack(core.detach()), encoding, torch.float32))
                with torch.no_grad():
                    core.copy_(made.cores[k])
                core.requires_grad_(False)  # on which torch's choice of kernels depends
        results = [module(inputs), made(inputs)]
        assert torch.equal(*results)
        if cores == "central":
            for result in results:
                result.square().sum().backward()
            pairs = [(a.grad, b.grad) for a, b in zip(module.cores, made.cores, strict=True) if b.requires_grad]
            assert len(pairs) == 2 and all(torch.equal(a, b) for a, b in pairs)  # type: ignore[arg-type]


def test_it_stays_packed_through_copies_moves_and_conversions() -> None:
    made, dense = linear()
    values = dense.weight.detach()
    copied = copy.deepcopy(made)
    assert isinstance(copied.weight, PackedTensor) and isinstance(copied.weight, nn.Parameter)
    assert torch.equal(copied.weight.unpacked(), values) and copied.weight.parts[0] is not made.weight.parts[0]  # type: ignore[attr-defined]
    half = copied.to(torch.bfloat16)
    assert isinstance(half.weight, PackedTensor) and half.weight.dtype == torch.bfloat16
    assert torch.equal(half.weight.unpacked(), values.bfloat16())
    assert torch.equal(half.float().weight.unpacked(), values)  # nothing was lost on the way
    assert half.to("meta").weight.device.type == "meta"
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded.weight, PackedTensor) and not loaded.weight.requires_grad
    x = torch.randn(2, 32)
    assert torch.equal(loaded(x), dense(x))
    assert "PackedTensor(shape=(48, 32)" in repr(made.weight)


def test_loading_takes_the_same_codes_or_the_same_values_and_nothing_else() -> None:
    made, dense = linear()
    other, _ = packed(FOUR)
    moved = parameter(FOUR.pack(torch.ones(48, 32)), FOUR, torch.float32)
    made.load_state_dict({"weight": moved, "bias": dense.bias})
    assert torch.equal(made.weight.unpacked(), moved.unpacked())  # type: ignore[operator]
    made.load_state_dict({"weight": other, "bias": dense.bias})
    made.load_state_dict(dense.state_dict())
    with pytest.raises(RuntimeError, match="other values cannot be copied into packed codes"):
        made.load_state_dict({"weight": dense.weight + 1, "bias": dense.bias})
    assert torch.equal(made.weight.unpacked(), dense.weight)  # type: ignore[operator]


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1),
        lambda w: w.data.mul_(2),
        lambda w: nn.init.normal_(w),
        lambda w: torch._foreach_mul_([w], 2.0),
        lambda w: torch.add(torch.ones(48, 32), 1, out=w),
    ],
)
def test_writing_to_it_is_refused(write: Callable[[Any], object]) -> None:
    weight, values = packed(FOUR)
    with torch.no_grad(), pytest.raises(RuntimeError, match="packed codes are constants"):
        write(weight)
    assert torch.equal(weight.unpacked(), values)  # type: ignore[operator]


def test_a_low_rank_beside_it_trains_as_beside_a_dense_layer() -> None:
    grads = []
    for layer in linear():
        torch.manual_seed(0)
        x = torch.randn(3, 5, 32, requires_grad=True)
        down, up = nn.Linear(32, 2, bias=False), nn.Linear(2, 48, bias=False)
        layer.requires_grad_(False)
        (layer(x) + up(down(x))).square().sum().backward()
        grads.append([x.grad, down.weight.grad, up.weight.grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("rows", [1, 32, 40])
@pytest.mark.parametrize("is_conv1d", [False, True])
def test_bfloat16_with_a_scale_a_row_is_within_its_rounding(rows: int, is_conv1d: bool) -> None:
    """By torch's int8 kernel for few rows, against float64; the bound is two roundings of what is added up."""
    shape = (256, 48) if is_conv1d else (48, 256)
    weight, _ = packed(Quantised(shape, bits=8, group=0, transposed=is_conv1d), torch.bfloat16)
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact_weight = Quantised(shape, bits=8, group=0, transposed=is_conv1d).unpack(*weight.parts).double()  # type: ignore[attr-defined]
    matrix = exact_weight if is_conv1d else exact_weight.T
    found = torch.addmm(torch.zeros(48).bfloat16(), x, weight if is_conv1d else weight.t())
    exact, size = x.double() @ matrix, x.double().abs() @ matrix.abs()
    assert found.dtype == torch.bfloat16
    assert bool(((found.double() - exact).abs() <= 2**-8 * (exact.abs() + 0.25 * size)).all())


def test_the_int8_kernel_computes_few_rows_and_no_other_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    as_int8 = Quantised.as_int8

    def watched(self: Quantised, parts: tuple[Tensor, ...]) -> Any:
        found = as_int8(self, parts)
        calls.append(found is not None)
        return found

    monkeypatch.setattr(Quantised, "as_int8", watched)
    row, _ = packed(Quantised((48, 32), bits=8, group=0), torch.bfloat16)
    groups, _ = packed(Quantised((48, 32), bits=8, group=16), torch.bfloat16)
    x = torch.randn(4, 32).bfloat16()
    F.linear(x, row)
    assert calls == [True]
    F.linear(x, groups)
    assert calls == [True, False]
    F.linear(x.float(), packed(Quantised((48, 32), bits=8, group=0))[0])
    assert len(calls) == 2


def test_a_compiled_layer_is_one_graph() -> None:
    made, dense = linear()
    x = torch.randn(3, 32)
    compiled: Any = torch.compile(made, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), dense(x))


def test_bytes_are_those_of_the_codes() -> None:
    made, dense = linear()
    made.weight_again = made.weight
    assert packed_names(made) == ["weight"]
    assert resident_bytes(made) == 48 * (32 // 2 + 2 * 2) + 4 * 48
    assert resident_bytes(dense) == 4 * (48 * 32 + 48)
    assert made.weight.numel() == dense.weight.numel()
