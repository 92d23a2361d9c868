"""Measure the peers of `quantize`: what GPT-2 loses when other libraries round the same matrices.

    data=../shared/data models=../shared/models
    pip install --no-deps hqq termcolor torchao optimum-quanto ninja bitsandbytes
    python tests/bench/bits_peers.py --data $data --model $models/gpt2-wikitext2-mini --work DIR

Each library's own functions round the weights of the attention and feed-forward matrices, outputs by inputs, in groups
along the inputs; nothing looks at text. The dense model gets what they give back, and its perplexity is that of
`table_bits.py` and `table_plan.py`. Bytes are those of the tensors that the library keeps of a matrix, over its bytes
in float32; headers of files are not counted. Scales and offsets have 16 bits where the library can hold them so. On a
CPU torchao keeps codes in whole bytes and leaves packing to kernels: its codes count as the bits that they have, and
its offsets, as in its packed tensors, only where one is not zero. Libraries that are not installed are left out.
Results are kept in DIR, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from losses import window_perplexity
from runs import parser
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from mpocli.hf.roles import role_of

# Bytes that a library keeps of a matrix of shape (outputs, inputs), and what it makes of them again, in any dtype.
Rounded = tuple[int, Tensor]


@dataclass(frozen=True)
class Peer:
    """A setting of a library; `group` is how many inputs share a scale, 0 for all of a row."""

    library: str
    scheme: str
    bits: int
    group: int
    rounded: Callable[[Tensor, int, int], Rounded]

    def __str__(self) -> str:
        return f"{self.scheme} {self.bits}/{self.group or 'row'}"


def held(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def hqq(weight: Tensor, bits: int, group: int) -> Rounded:
    """With the options of its `BaseQuantizeConfig`: optimised offsets, float16 beside the codes."""
    from hqq.core.quantize import BaseQuantizeConfig, Quantizer

    options = BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)["weight_quant_params"]
    codes, meta = Quantizer.quantize(weight, **options, compute_dtype=torch.float16, device="cpu")
    codes, meta = Quantizer.cpu(codes, meta)
    return held((codes, meta["scale"], meta["zero"])), Quantizer.dequantize(codes, meta)


def torchao(mapping: str, algorithm: str) -> Callable[[Tensor, int, int], Rounded]:
    """`IntxWeightOnlyConfig`'s, with scales in bfloat16, which is what its kernels may round them to."""

    def rounded(weight: Tensor, bits: int, group: int) -> Rounded:
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
        from torchao.quantization.quant_primitives import MappingType

        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=PerGroup(group),
            mapping_type=MappingType[mapping],
            scale_dtype=torch.bfloat16,
            intx_choose_qparams_algorithm=algorithm,
        )
        quantize_(layer, config)
        made: Any = layer.weight
        beside = [made.scale, made.zero_point] if made.zero_point.any() else [made.scale]
        return weight.numel() * bits // 8 + held(beside), made.dequantize()

    return rounded


def quanto(optimizer: str) -> Callable[[Tensor, int, int], Rounded]:
    """As its `QLinear` does, in the groups that are given; 8 bits have a scale a row and no offset."""

    def rounded(weight: Tensor, bits: int, group: int) -> Rounded:
        from optimum import quanto

        kind = getattr(quanto, f"qint{bits}")
        choose = getattr(quanto, optimizer)()
        # It keeps scales in the dtype that they have here, whatever that of the weights is.
        if bits == 8:
            made = quanto.quantize_weight(weight, kind, 0, choose(weight, kind, 0).half())
        else:
            scale, shift = choose(weight, kind, 0, group)
            made = quanto.quantize_weight(weight, kind, 0, scale.half(), shift.half(), group)
        kept: dict[str, Tensor] = {}
        made.save_to_state_dict(kept, "", keep_vars=False)
        return held(kept.values()), made.dequantize()

    return rounded


def nf4(nested: bool) -> Callable[[Tensor, int, int], Rounded]:
    """With `nested` the scales are rounded too, as QLoRA has it, else float32; the tables of codes are kept as well."""

    def rounded(weight: Tensor, bits: int, group: int) -> Rounded:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        codes, state = quantize_4bit(weight, blocksize=group, compress_statistics=nested, quant_type="nf4")
        return held((codes, *state.as_dict(packed=True).values())), dequantize_4bit(codes, state)

    return rounded


PEERS = (
    *(Peer("hqq", "HQQ", bits, group, hqq) for bits, group in ((4, 64), (3, 64), (2, 64), (2, 16))),
    Peer("torchao", "torchao, asymmetric", 4, 64, torchao("ASYMMETRIC", "affine")),
    *(
        Peer("torchao", "torchao, HQQ scales", bits, group, torchao("SYMMETRIC", "hqq_scale_only"))
        for bits, group in ((3, 64), (2, 32))
    ),
    Peer("optimum-quanto", "quanto", 8, 0, quanto("AbsmaxOptimizer")),
    *(Peer("optimum-quanto", "quanto, HQQ offsets", bits, 128, quanto("HqqOptimizer")) for bits in (4, 2)),
    Peer("bitsandbytes", "NF4", 4, 64, nf4(False)),
    Peer("bitsandbytes", "NF4, scales rounded", 4, 64, nf4(True)),
)


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of attention and feed-forward, by name."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    return {name: module for name, module in layers.items() if role_of(name) in ("attention", "ffn")}


@torch.no_grad()
def replace(model: nn.Module, peer: Peer) -> dict[str, float]:
    """Round the model's matrices; share of bytes that is left, and of the weights' squares that is lost."""
    kept, dense, lost, all_of_it = 0, 0, 0.0, 0.0
    for module in matrices(model).values():
        turned = isinstance(module, Conv1D)  # which keeps inputs by outputs
        weight: Any = module.weight
        rows = (weight.T if turned else weight).detach().clone(memory_format=torch.contiguous_format)
        size, back = peer.rounded(rows, peer.bits, peer.group)
        back = back.float()
        kept, dense = kept + size, dense + rows.nbytes
        lost, all_of_it = lost + float((rows - back).square().sum()), all_of_it + float(rows.square().sum())
        weight.copy_(back.T if turned else back)
    return {"share": kept / dense, "lost": lost / all_of_it}


def directory(peer: Peer, work: Path) -> Path:
    return work / f"{peer}-{version(peer.library)}".replace(", ", "-").replace("/", "-").replace(" ", "-")


def make(peer: Peer, model_dir: Path, out: Path) -> None:
    """Write the model with the peer's weights to `out`, and what they keep beside it."""
    record = out.with_name(f"{out.name}-made.json")
    if not record.is_file():
        model = AutoModelForCausalLM.from_pretrained(model_dir)
        found = replace(model, peer)
        model.save_pretrained(out)
        record.write_text(json.dumps(found))


def measured(peer: Peer, chosen: argparse.Namespace) -> dict[str, float]:
    out = directory(peer, chosen.work)
    record = out.with_name(f"{out.name}.json")
    if not record.is_file():
        began = time.time()
        found = json.loads(out.with_name(f"{out.name}-made.json").read_text())
        found["perplexity"] = window_perplexity(out, chosen.model, chosen.data / "wikitext2" / "test.txt")
        record.write_text(json.dumps(found))
        shutil.rmtree(out)
        print(f"{time.strftime('%H:%M:%S')} {peer}: {found} ({time.time() - began:.0f} s)", flush=True)
    known: dict[str, float] = json.loads(record.read_text())
    return known


def installed(library: str) -> bool:
    try:
        print(f"{library} {version(library)}")
    except PackageNotFoundError:
        print(f"{library} is not installed, left out")
        return False
    return True


def main() -> None:
    chosen = parser(__doc__).parse_args()
    torch.set_num_threads(chosen.threads)
    chosen.work.mkdir(parents=True, exist_ok=True)
    there = {library for library in dict.fromkeys(peer.library for peer in PEERS) if installed(library)}
    peers = [peer for peer in PEERS if peer.library in there]
    # All are made before one is measured: loading and the libraries' imports change what threads share.
    for peer in peers:
        make(peer, chosen.model, directory(peer, chosen.work))
    with ThreadPoolExecutor(chosen.parallel) as pool:
        found = list(pool.map(lambda peer: measured(peer, chosen), peers))
    print("\n| scheme | bits | group | share of bytes | weights lost | perplexity |\n|---|---:|---:|---:|---:|---:|")
    for peer, row in zip(peers, found, strict=True):
        numbers = f"{row['share']:.2%} | {row['lost']:.3%} | {row['perplexity']:.2f}"
        print(f"| {peer.scheme} | {peer.bits} | {peer.group or 'row'} | {numbers} |")


if __name__ == "__main__":
    main()
