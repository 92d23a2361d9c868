"""Every command on a decoder of real size, each on what others wrote: exit code, seconds and peak memory.

    python tests/bench/real_size.py MODEL DATA [--others DIR] [--only WORD …]

MODEL is a causal language model (a vocabulary of some 50,000, a few hundred million parameters), DATA has the folders
wikitext2, sst2 and e2e, and DIR a `minilm-l6` and a `t5-e2e-mini` for what needs an encoder or an encoder-decoder.
Few rows, windows and steps of full size and length. Exits with 1 where a command ends otherwise than it should.
`--only` runs the commands that have one of these words in their line or name, with those whose output they read.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Names in braces are files or folders of the working directory, or `model`; `name =` says what a command writes.
COMMANDS = """
dry       = decompose {model} --trunc 256 --dry-run
mpo       = decompose {model}
capped    = decompose {model} --trunc 256
ffn       = decompose {model} --layers ffn --ffn-trunc 128 --ignore '*.layers.0.*'
shaped    = decompose {model} --target '*up_proj' --sites 3 --rel-tol 0.3
again     = decompose {mpo} --trunc 128
look      = inspect {mpo} --spectrum
verified  = inspect {mpo} --verify --base {model}
merged    = merge {mpo}
sizes     = eval {capped} --baseline {model}
lm        = eval {model} --task lm --eval {test.txt} --max-length 512 --fail-below perplexity=1000
agreed    = eval {capped} --task lm --eval {test.txt} --max-length 512 --baseline {model}
same      = eval {merged} --task lm --eval {test.txt} --max-length 512 --baseline {mpo} --max-drop perplexity=2

plan      = plan {model} --ratio 0.5 --layers attention,ffn {text}
compared  = plan {model} --ratio 0.6 --target '*.layers.1.*' --shapes svd {text} --compare
felt      = plan {model} --ratio 0.6 --target '*.layers.1.self_attn*' --shapes svd {text} --sensitivity felt.json
planned   = decompose {model} --ratio 0.6 --shapes svd {text}
bytes     = decompose {model} --max-bytes 200MB --shapes svd
bounded   = decompose {model} --target '*.layers.0.mlp*' --max-error 0.3 {text}
refitted  = decompose {model} --ratio 0.6 --target '*.layers.0.*' --shapes svd --sequential {text}
healed    = finetune {planned} {lm} --update all --steps 2
cured     = eval {healed} --task lm --eval {test.txt} --max-length 512 --baseline {model}

tuned     = finetune {mpo} {sst2} --steps 3
plain     = finetune {model} {sst2} --steps 3 --precision bf16
central   = finetune {mpo} {lm} --steps 2 --update central --gradient-checkpointing --recompute-weights
taught    = finetune {capped} {lm} --steps 2 --teacher {model}
told      = finetune {model} {e2e} --steps 2
written   = eval {told} {e2e-dev} --max-new-tokens 8 --predictions told.jsonl
broken    = finetune {mpo} {lm} --steps 6 --save-steps 2 --log-steps 2 ! INT
resumed   = finetune {mpo} {lm} --steps 6 --save-steps 2 --log-steps 2 --resume > broken
svd       = finetune {model} {sst2} --steps 2 --overparam svd --layers attention
dynamic   = finetune {model} {sst2} --steps 4 --overparam dynamic --top-n 2 --splits 2
static    = finetune {model} {sst2} --steps 4 --overparam static --top-n 1 --layers attention --score-batches 1
raised    = finetune {model} {sst2} --steps 2 --overparam none --mpo-lr 4e-4

squeezed  = squeeze {tuned} {sst2} --max-drop 1 --rounds 2 --finetune-steps 1
direct    = squeeze {tuned} {sst2} --target-ratio 0.6 --tie kind --per-param --step 10% --direct --finetune-steps 2
small     = merge {squeezed}
judged    = eval {small} {sst2-dev} --baseline {squeezed} --predictions judged.jsonl

thin      = sparsify {model} --method magnitude --sparsity 0.5
wanda     = sparsify {model} --method wanda --sparsity 0.5 {text}
sparsegpt = sparsify {capped} --method sparsegpt --pattern 2:4 {text}
pst       = sparsify {plain} {sst2} --sparsity 0.9 --steps 3
pst-mpo   = sparsify {tuned} {sst2} --sparsity 0.9 --steps 2
movement  = sparsify {plain} {sst2} --method movement --sparsity 0.9 --steps 2
thinner   = eval {sparsegpt} --task lm --eval {test.txt} --max-length 512 --baseline {capped}
pst-eval  = eval {pst} {sst2-dev} --baseline {plain} --path sparse
zeros     = inspect {pst}
filled    = merge {pst-mpo}

int4      = quantize {model} --bits 4
gptq      = quantize {model} --bits 3 --target '*.layers.1.*' {text}
centres   = quantize {mpo} --bits 4 --cores central
eighth    = decompose {model} --ratio-bytes 0.12 --bits auto --target '*.layers.0.*' {text}
lean      = eval {int4} --task lm --eval {test.txt} --max-length 512 --memory lean
beside    = finetune {centres} {lm} --steps 2
wide      = merge {int4}

experts   = expand-moe {model} --experts 2
dense-moe = expand-moe {model} --experts 2 --baseline-moe
routed    = finetune {experts} {sst2} --steps 2
moe-eval  = eval {routed} {sst2-dev}
moe-look  = inspect {experts}
moe-dense = merge {experts}
moe-thin  = sparsify {experts} --method magnitude --sparsity 0.5

st        = finetune {minilm-l6} {sst2} --steps 3
st-lossy  = decompose {st} --trunc 64
st-eval   = eval {st-lossy} {sst2-dev} --baseline {st}
t5        = decompose {t5-e2e-mini} --ratio 0.6 --task e2e --calibrate {e2e.csv} --samples 8 --shapes svd
t5-tuned  = finetune {t5} {e2e} --steps 2 --update all --teacher {t5-e2e-mini}
t5-eval   = eval {t5-tuned} {e2e-dev} --max-new-tokens 8 --baseline {t5-e2e-mini}
t5-moe    = expand-moe {t5-e2e-mini} --experts 4 --router topk --top-k 2 --noise 0.01
"""
# Sets of options.
OPTIONS = {
    "text": "--calibrate {train.txt} --samples 8 --seq-len 512",
    "lm": "--task lm --train {train.txt} --eval {short.txt} --max-length 512 --batch-size 2 --lr 1e-5",
    "sst2": "--task sst2 --train {sst2.tsv} --eval {sst2-few.tsv} --max-length 64 --batch-size 8 --lr 2e-5",
    "sst2-dev": "--task sst2 --eval {sst2-few.tsv} --max-length 64",
    "e2e": "--task e2e --train {e2e.csv} --max-length 64 --batch-size 4 --lr 1e-5",
    "e2e-dev": "--task e2e --eval {e2e-few.csv} --max-length 64",
}
WRITERS = ("decompose", "merge", "finetune", "squeeze", "sparsify", "quantize", "expand-moe")


@dataclass(frozen=True)
class Command:
    """`interrupted`: it is ended by Ctrl-C once it has trained some steps; `out`: where it writes, if it does."""

    name: str
    words: tuple[str, ...]
    out: str | None
    interrupted: bool

    @property
    def reads(self) -> set[str]:
        return {word[1:-1] for word in self.words if word.startswith("{")}

    @property
    def expected(self) -> int:
        return 130 if self.interrupted else 0


def commands() -> list[Command]:
    """All of them, in order, with their sets of options filled in."""
    found = []
    for line in filter(None, COMMANDS.splitlines()):
        name, _, text = (part.strip() for part in line.partition("="))
        for key, options in OPTIONS.items():
            text = text.replace(f"{{{key}}}", options)
        text, _, place = (part.strip() for part in text.partition(">"))
        text, _, sign = (part.strip() for part in text.partition("!"))
        words = tuple(shlex.split(text))
        writes = words[0] in WRITERS and "--dry-run" not in words
        found.append(Command(name, words, (place or name) if writes else None, bool(sign)))
    return found


def chosen(every: Sequence[Command], only: Collection[str], absent: Collection[str]) -> list[Command]:
    """Those with one of the words, and all that they read from; none that reads what is absent."""
    usable: list[Command] = []
    lost = set(absent)
    for command in every:
        if command.reads & lost:
            lost.add(command.name)
        else:
            usable.append(command)
    wanted = {c.name for c in usable if not only or any(word in (c.name, *c.words) for word in only)}
    for command in reversed(usable):
        if command.name in wanted:
            wanted |= command.reads | ({command.out} if command.out else set())
    return [command for command in usable if command.name in wanted]


def prepare(work: Path, data: Path) -> None:
    """Small files of whole rows."""
    cut = {"short.txt": ("wikitext2/valid.txt", 4_000), "test.txt": ("wikitext2/test.txt", 20_000)}
    for name, (source, size) in {**cut, "train.txt": ("wikitext2/train.txt", 200_000)}.items():
        text = (data / source).read_text(encoding="utf-8")[:size]
        (work / name).write_text(text.rpartition("\n")[0] + "\n", encoding="utf-8")
    rows = {"sst2.tsv": ("sst2/train.tsv", 64), "sst2-few.tsv": ("sst2/dev.tsv", 32)}
    rows |= {"e2e.csv": ("e2e/trainset.csv", 32), "e2e-few.csv": ("e2e/devset.csv", 16)}
    for name, (source, count) in rows.items():
        lines = (data / source).read_text(encoding="utf-8").splitlines(keepends=True)
        (work / name).write_text("".join(lines[: count + 1]), encoding="utf-8")


@dataclass(frozen=True)
class Outcome:
    code: int
    seconds: float
    peak: int  # bytes


def run(command: Command, places: dict[str, Path], work: Path) -> Outcome:
    """In a process of its own, whose output goes to a file beside the others."""
    words = [str(places.get(word[1:-1], work / word[1:-1])) if word.startswith("{") else word for word in command.words]
    if command.out:
        words += ["-o", str(work / command.out)]
    log = work / f"{command.name}.log"
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        child = subprocess.Popen([sys.executable, "-m", "mpocli", *words], stdout=stream, stderr=stream, cwd=work)
        if command.interrupted:
            _interrupt(child, work / f"{command.out}.training")
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024
    return Outcome(child.returncode, time.monotonic() - began, usage.ru_maxrss * unit)


def _interrupt(child: subprocess.Popen[bytes], training: Path) -> None:
    """Ctrl-C after the first checkpoint."""
    while not list(training.glob("checkpoint-*/trainer_state.json")):
        if os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.2)
    child.send_signal(signal.SIGINT)


def rows(todo: Sequence[Command], places: dict[str, Path], work: Path) -> Iterator[tuple[Command, Outcome]]:
    for command in todo:
        yield command, run(command, places, work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--others", type=Path, help="a folder with minilm-l6 and t5-e2e-mini")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD")
    parser.add_argument("--work", type=Path, help="a folder that stays, for the outputs and what was printed")
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, by children too
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        prepare(work, given.data)
        places = {"model": given.model.absolute()}
        names = ("minilm-l6", "t5-e2e-mini")
        places |= {name: (given.others / name).absolute() for name in names if given.others}
        todo = chosen(commands(), given.only, [name for name in names if name not in places])
        wrong = []
        began = time.monotonic()
        print("| | command | exit | seconds | peak memory |\n|---|---|---:|---:|---:|")
        for command, outcome in rows(todo, places, work):
            line = shlex.join(command.words).replace("'{", "").replace("}'", "")
            figures = f"{outcome.code} | {outcome.seconds:.0f} | {outcome.peak / 1e9:.2f} GB"
            print(f"| {command.name} | `{line}` | {figures} |", flush=True)
            if outcome.code != command.expected:
                wrong.append(command.name)
                print((work / f"{command.name}.log").read_text(encoding="utf-8")[-3000:], file=sys.stderr)
        print(f"\n{len(todo)} commands in {(time.monotonic() - began) / 60:.0f} minutes")
    if wrong:
        sys.exit(f"ended otherwise than they should: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
