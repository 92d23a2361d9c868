"""Tiny models of many families through the commands: what comes out is equal, refused in one line, or FAILED.

    python tests/bench/families.py [--only WORD …] [--list] [--work DIR]

One row a family of `tiny_models.py` (`--only`: those with one of these words in their name; `--list` names them):

matrices   how many of the model's weight matrices a lossless `decompose` took
lossless   what it wrote computes what the dense model does
merge      so does what `merge` makes of that, in a process without mpocli
ratio      `decompose --ratio 0.6 --calibrate` on text computes what it does when it is dequantised
sparsify   `--method magnitude --sparsity 0.5` computes bit for bit what its `--storage dense` does without mpocli
experts    what `expand-moe --experts 2` wrote computes what the dense model does

`=` is equal, to `TOLERANCE` where no bits are named, on rows of which one is padded; loading it finds the tensors that
loading the dense model finds. `refused` is an exit of 2, 3 or 4 with one line of error and nothing written; the line
is told below the table. Exits with 1 where anything FAILED. Ten seconds a row.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import beside
import torch
from cli.processes import Ended, Server
from cli.tasks import prose
from strangers import run_stranger
from tiny_models import FAMILIES
from torch import Tensor

TOLERANCE = 1e-4  # of ‖difference‖/‖output‖
SECONDS = 120  # for one command, and for one process that loads
BUDGET = ("--ratio", "0.6", "--calibrate", "text.txt", "--seq-len", "16", "--samples", "12")
MAGNITUDE = ("--method", "magnitude", "--sparsity", "0.5")
# What is run in a row's directory, by the folder that it writes; the second word is the folder that it reads.
COMMANDS: dict[str, tuple[str, ...]] = {
    "lossless": ("decompose", "dense"),
    "merge": ("merge", "lossless"),
    "ratio": ("decompose", "dense", *BUDGET),
    "sparsify": ("sparsify", "dense", *MAGNITUDE),
    "zeros": ("sparsify", "dense", *MAGNITUDE, "--storage", "dense"),
    "experts": ("expand-moe", "dense", "--experts", "2"),
}
# What is equal to what: the folder of a column, its counterpart's outputs, and whether bit for bit.
CLAIMS: dict[str, tuple[str, bool]] = {
    "lossless": ("dense", False),
    "merge": ("dense", False),
    "ratio": ("ratio.dequantised", False),
    "sparsify": ("zeros", True),
    "experts": ("dense", False),
}
PLAIN = ("merge", "zeros")  # loaded without mpocli

_IN_TIME = f"import signal, sys; signal.alarm({SECONDS}); sys.path.insert(0, sys.argv[1]); import loaded\n"


@dataclass
class Row:
    """A family's row of the table, and what is to be said below it."""

    name: str
    work: Path
    matrices: str = ""
    cells: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def put(self, column: str, word: str, why: str = "") -> None:
        """The first word about a column stands, unless a later one is of a failure."""
        if column in self.cells and word != "FAILED":
            return
        self.cells[column] = word
        if why:
            self.notes.append(f"{self.name}, {column}: {f'FAILED: {why}' if word == 'FAILED' else why}")


def fill(row: Row, server: Server) -> None:
    """Build the model, run the commands, load what they wrote, and compare."""
    row.work.mkdir()
    prose(row.work / "text.txt", 60, 1)
    problems = _apart(row, "loaded.build", "dense", ()) or _apart(row, "loaded.measure", "dense", ("dense",))
    if problems:
        return row.put("lossless", "FAILED", "; ".join(problems.values()))
    dense = torch.load(row.work / "dense.pt")
    if not dense["outputs"] or not all(bool(torch.isfinite(tensor).all()) for tensor in dense["outputs"]):
        return row.put("lossless", "FAILED", "the dense model's outputs are not finite")
    written = [name for name in COMMANDS if _run(row, name, server)]
    problems = _measure(row, [name for name in written if name in PLAIN], "")
    problems |= _measure(row, [name for name in written if name not in PLAIN], "import mpocli\n")
    for column, (counterpart, bits) in CLAIMS.items():
        if column not in written:
            continue
        folders = [folder for folder in (column, counterpart) if folder in COMMANDS]
        told = [f"{folder} {problems[folder]}" for folder in folders if folder in problems]
        if not told and counterpart in COMMANDS and counterpart not in written:
            told = [f"written, and {' '.join(COMMANDS[counterpart])} is refused"]
        if not told:
            told = _differences(row.work, dense, column, counterpart, bits=bits)
        row.put(column, "FAILED" if told else "=", "; ".join(told))


def _run(row: Row, name: str, server: Server) -> bool:
    """One command; whether it has written its folder."""
    verb, source, *options = COMMANDS[name]
    if not (row.work / source).is_dir():
        return False
    arguments = (verb, source, *options, "--out", name, "--json")
    limit = f"import signal; signal.alarm({SECONDS})"
    ended = server.run(*arguments, cwd=row.work, log=row.work / f"{name}.log", before=limit)
    if ended.code == 0:
        if name == "lossless":
            actions = [module["action"] for module in json.loads(ended.out)["modules"]]
            row.matrices = f"{actions.count('mpo')}/{len(actions)}"
        return True
    column = name if name in CLAIMS else "sparsify"
    if why := _unseemly(ended, row.work / name):
        row.put(column, "FAILED", f"{verb} {why}")
    elif column == name:
        row.put(column, "refused", _errors(ended)[0])
    return False


def _unseemly(ended: Ended, out: Path) -> str:
    """What is wrong with a refusal, "" if nothing."""
    if ended.code < 0:
        return f"was ended by signal {-ended.code}" + f" after {SECONDS} s" * (ended.code == -14)
    if ended.code not in (2, 3, 4) or len(_errors(ended)) != 1 or "Traceback" in ended.err:
        last = ended.err.strip().splitlines()[-4:]
        return f"ended with exit {ended.code}: {' / '.join(text.strip() for text in last)}"
    return "was refused and wrote something" if out.exists() else ""


def _errors(ended: Ended) -> list[str]:
    lines = [text for text in ended.err.splitlines() if text.startswith("error: ")]
    return [text.removeprefix("error: ") for text in lines]


def _apart(row: Row, call: str, column: str, folders: tuple[str, ...], before: str = "") -> dict[str, str]:
    """Call a function of `loaded.py` in a process of its own; why it, or some of its folders, came to nothing."""
    script = f"{_IN_TIME}{before}{call}(*sys.argv[2:])"
    ended = run_stranger(script, beside.TESTS / "bench", row.name, *(folders or (column,)), cwd=row.work)
    if ended.code or "Traceback" in ended.err:
        last = (ended.err.strip().splitlines() or [""])[-1]
        return dict.fromkeys(folders or (column,), f"{call} ended with {ended.code}: {last}")
    found: dict[str, str] = json.loads(ended.out.splitlines()[-1]) if folders else {}
    return found


def _measure(row: Row, folders: list[str], before: str) -> dict[str, str]:
    return _apart(row, "loaded.measure", "", tuple(folders), before) if folders else {}


def _differences(work: Path, dense: dict[str, list[Tensor]], folder: str, counterpart: str, *, bits: bool) -> list[str]:
    """How what a folder's model computes differs from what it should, and what loading it missed."""
    found, expected = (torch.load(work / f"{name}.pt") for name in (folder, counterpart))
    told = [
        f"{kind} {new[:3]}"
        for kind, keys in found.items()
        if kind != "outputs" and (new := sorted(set(keys) - set(dense[kind])))
    ]
    pairs = list(zip(found["outputs"], expected["outputs"], strict=True))
    for number, (one, other) in enumerate(pairs):
        if one.shape != other.shape:
            told.append(f"output {number} is {tuple(one.shape)} and should be {tuple(other.shape)}")
        elif bits and not torch.equal(one, other):
            told.append(f"output {number} is not the same, bit for bit")
        elif not (error := float((one - other).norm() / other.norm())) <= TOLERANCE:
            told.append(f"output {number} differs by {error:.1e}")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--work", type=Path, help="keep everything in this new directory")
    options = parser.parse_args()
    names = [name for name in FAMILIES if not options.only or any(word in name for word in options.only)]
    if options.list:
        print(*names, sep="\n")
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary) / "work"
        work.mkdir(parents=True)
        sys.exit(_table(names, work.resolve()))


def _table(names: list[str], work: Path) -> int:
    """Print the rows as they come, then the notes and the counts; the exit code."""
    import models

    models.llama(work / "warm")
    heavy = "merge", "sparsify.run", "expand_moe.run", "data.calibration", "decompose.decide", "quantize.run"
    modeling = [f"transformers.models.{name}.modeling_{name}" for name in ("bert", "bart", "llama", "gpt2")]
    counts: Counter[str] = Counter()
    notes: list[str] = []
    print(f"| family | matrices | {' | '.join(CLAIMS)} |\n|---|---|{'---|' * len(CLAIMS)}", flush=True)
    with Server(work / "warm", *(f"mpocli.methods.{name}" for name in heavy), *modeling) as server:
        for name in names:
            row = Row(name, work / name)
            fill(row, server)
            cells = [row.cells.get(column, "–") for column in CLAIMS]
            print(f"| {' | '.join([name, row.matrices or '–', *cells])} |", flush=True)
            counts.update(cells)
            notes += row.notes
    print("", *(f"- {note}" for note in notes), sep="\n")
    print(f"\n{len(names)} families: " + ", ".join(f"{count} {word}" for word, count in counts.most_common()))
    return 1 if counts["FAILED"] else 0


if __name__ == "__main__":
    main()
