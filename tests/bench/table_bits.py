"""Measure the README's tables of bytes: bits alone, bonds alone, one after the other, and chosen together.

    data=../shared/data models=../shared/models
    python tests/bench/table_bits.py gpt2 --data $data --model $models/gpt2-wikitext2-mini --work DIR
    python tests/bench/table_bits.py minilm --data $data --model $models/minilm-l6 --work DIR
    python tests/bench/table_bits.py t5 --data $data --model $models/t5-e2e-mini --work DIR

The attention and feed-forward matrices keep a part of the bytes that they have in float32, headers counted. `rtn` and
`gptq` are the largest of the grids of all matrices alike that fit: 8, 4, 3 or 2 bits, groups of 32, 64, 128 or a row,
with offsets or without. `auto` chooses shapes and bonds in float32; after it, in `auto, rtn`, what it made is rounded
to 4 bits in groups of 64 (8 where those are too few); `joint` is `--bits auto`. What is measured is that of
`table_plan.py`. Results are kept in DIR, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from runs import mpocli, parser
from table_plan import SETUPS, Setup

SIZES = {"gpt2": (0.25, 0.14, 0.11, 0.09, 0.07, 0.05), "minilm": (0.14, 0.09, 0.06), "t5": (0.14, 0.09, 0.06)}
ARMS = ("rtn", "gptq", "auto", "auto, rtn", "joint")
_ON = ("--layers", "attention,ffn")


def grids() -> list[tuple[float, tuple[Any, ...]]]:
    """Bits an entry of grids for rows of 256 entries or more, and the options that ask for them, largest first."""
    found = []
    for bits, group, offsets in product((8, 4, 3, 2), (32, 64, 128, 0), ("no", "yes")):
        stored = bits + 16 * (1 + (offsets == "yes")) / (group or 256)
        found.append((stored, ("--bits", bits, "--group", group, "--zero-point", offsets)))
    return sorted(found, key=lambda one: -one[0])


class Table:
    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen, self.setup = chosen, SETUPS[chosen.task]
        self.work: Path = chosen.work
        self.work.mkdir(parents=True, exist_ok=True)

    def looks(self) -> tuple[Any, ...]:
        name, *rest = self.setup.calibrate
        return "--calibrate", self.chosen.data / name, *rest

    def run(self, *words: Any) -> dict[str, Any]:
        return mpocli(*words, "--overwrite", threads=self.chosen.threads)

    def part(self, made: dict[str, Any]) -> float:
        """Bytes of the chosen matrices' share of the files, over those that they have dense."""
        plain = self.kept("dense", lambda: self.run("decompose", self.chosen.model, *_ON, "--dry-run"))
        dense = sum(m["dense_bytes"] for m in plain["modules"] if m["role"] in ("attention", "ffn"))
        return float((made["totals"]["bytes"] - plain["before"]["bytes"] + dense) / dense)

    def kept(self, name: str, do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        record = self.work / f"{name}.json"
        if not record.is_file():
            record.write_text(json.dumps(do()))
        known: dict[str, Any] = json.loads(record.read_text())
        return known

    def made(self, arm: str, size: float) -> dict[str, Any] | None:
        """The report of the command that made an arm's model, with its `directory`; None where none is so small."""
        out = self.work / f"{arm.replace(', ', '-')}-{size:g}"
        if arm in ("rtn", "gptq"):
            looks = self.looks() if arm == "gptq" else ()
            for stored, grid in grids():
                if stored / 32 > size:
                    continue
                made = self.run("quantize", self.chosen.model, *_ON, *grid, *looks, "-o", out)
                if self.part(made) <= size:
                    return made | {"directory": str(out), "how": " ".join(map(str, grid))}
            return None
        if arm == "auto, rtn":
            bits = 4 if size < 4.25 / 32 else 8
            group = 64
            ratio = size * 32 / (bits + 16 / group)
            while True:
                self.run(
                    "decompose", self.chosen.model, *_ON, "--ratio", f"{ratio:.4f}", *self.looks(), "-o", f"{out}-wide"
                )
                made = self.run("quantize", f"{out}-wide", *_ON, "--bits", bits, "--group", group, "-o", out)
                if self.part(made) <= size:
                    return made | {"directory": str(out), "how": f"{ratio:.3f} × {bits} bits"}
                ratio *= 0.98 * size / self.part(made)
        bits_too = ("--bits", "auto") if arm == "joint" else ()
        made = self.run(
            "decompose", self.chosen.model, *_ON, "--ratio-bytes", size, *bits_too, *self.looks(), "-o", out
        )
        return made | {"directory": str(out)}

    def measured(self, arm: str, size: float) -> dict[str, Any]:
        def do() -> dict[str, Any]:
            made = self.made(arm, size)
            if made is None:
                return {}
            metrics = self.setup.measure(Path(made["directory"]), self.chosen.model, self.chosen.data)
            return {"metrics": metrics, "part": self.part(made), "how": made.get("how", "")}

        name = f"{arm.replace(', ', '-')}-{size:g}-measured"
        began = time.time()
        new = not (self.work / f"{name}.json").is_file()
        found = self.kept(name, do)
        if new:
            print(f"{time.strftime('%H:%M:%S')} {name}: {found} ({time.time() - began:.0f} s)", flush=True)
        return found


def main() -> None:
    made = parser(__doc__, SETUPS)
    made.add_argument("--arms", nargs="*", default=ARMS)
    chosen = made.parse_args()
    table = Table(chosen)
    dense = table.kept("dense-measured", lambda: _dense(table.setup, chosen))
    print(f"dense {dense['metrics']}")
    sizes = SIZES[chosen.task]
    print(f"\n| | {' | '.join(f'{size:.0%}' for size in sizes)} |\n|---|{'---:|' * len(sizes)}")
    for arm in chosen.arms:
        cells = [table.measured(arm, size) for size in sizes]
        shown = [" / ".join(f"{value:.4g}" for value in cell["metrics"].values()) if cell else "–" for cell in cells]
        print(f"| {arm} | {' | '.join(shown)} |", flush=True)
    print(f"\n{platform.machine()}, {platform.processor()}")


def _dense(setup: Setup, chosen: argparse.Namespace) -> dict[str, Any]:
    return {"metrics": setup.measure(chosen.model, chosen.model, chosen.data)}


if __name__ == "__main__":
    main()
