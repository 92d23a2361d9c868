"""What a layer of few bits costs: packed in memory, unpacked once, and dense, in the same run.

    python tests/bench/packed_cost.py [--rounds 40] [--dtypes float32,bfloat16]

All arms take turns, so that a busy moment of the machine meets each of them; told is the least of the rounds, which is
what other work disturbed least. `lean` is a packed weight (`keep_packed`), `fast` one that was unpacked once, `dense`
another of the same shape that never was rounded.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mpocli.io.encodings.quantised import Quantised
from mpocli.nn.packed import parameter, resident_bytes

SHAPES = ((768, 768), (3072, 768), (768, 3072))  # outputs, inputs
TOKENS = (1, 32, 512)


def layers(shape: tuple[int, int], encoding: Quantised, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The arms, without biases."""
    tensor = torch.randn(shape) * 0.02
    parts = encoding.pack(tensor)
    made = {name: nn.Linear(shape[1], shape[0], bias=False) for name in ("dense", "fast", "lean")}
    made["dense"].weight = nn.Parameter(tensor.to(dtype), requires_grad=False)
    made["fast"].weight = nn.Parameter(encoding.unpack(*parts).to(dtype), requires_grad=False)
    made["lean"].weight = parameter(parts, encoding, dtype)
    return dict(made)


@torch.no_grad()
def least(arms: dict[str, Callable[[Tensor], Tensor]], x: Tensor, rounds: int) -> dict[str, float]:
    """Seconds of a call, the least over the rounds."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, arm in arms.items():
            started = time.perf_counter()
            arm(x)
            times[name].append(time.perf_counter() - started)
    return {name: min(found[1:]) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("dtype     out x in    bits      tokens  dense ms  fast/dense  lean/dense  bytes lean/dense")
    for dtype in (getattr(torch, name) for name in chosen.dtypes.split(",")):
        for shape in SHAPES:
            for bits, group in ((4, 64), (8, 64), (8, 0)):
                arms = layers(shape, Quantised(shape, bits=bits, group=group), dtype)
                held = resident_bytes(arms["lean"]) / resident_bytes(arms["dense"])
                for tokens in TOKENS:
                    found = least(dict(arms), torch.randn(tokens, shape[1]).to(dtype), chosen.rounds)
                    what = f"{str(dtype)[6:]:9} {shape[0]:4} x {shape[1]:4} {bits}{'' if group else ' row':>4}"
                    ratios = [found[name] / found["dense"] for name in ("fast", "lean")]
                    numbers = f"{found['dense'] * 1e3:9.3f} {ratios[0]:11.2f} {ratios[1]:11.2f} {held:11.3f}"
                    print(f"{what:30} {tokens:7} {numbers}")


if __name__ == "__main__":
    main()
