"""Processes that have imported transformers and never mpocli: one server has, and forks for each script.

The server of `cli.processes` begins as such a process too: importing torch and transformers once is enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.bert.modeling_bert",
    ]
)
_BEGINNING = """
import os, sys
assert "mpocli" not in sys.modules
for stream in (1, 2):
    os.dup2(os.open(log + ".out" if stream == 1 else log + ".err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
os.chdir(cwd)
sys.argv[1:] = arguments
"""


@dataclass(frozen=True)
class Ended:
    """A script that is over: its exit code and what it printed."""

    code: int
    out: str
    err: str


def run_stranger(script: str, *arguments: object, cwd: Path) -> Ended:
    """Run Python statements in a process without mpocli, in the directory `cwd`, beside which its output is kept."""
    log = f"{cwd}.stranger"
    given = {"log": log, "cwd": str(cwd), "arguments": [str(argument) for argument in arguments], "__name__": "script"}
    process = CONTEXT.Process(target=exec, args=(_BEGINNING + script, given))
    process.start()
    process.join()
    assert process.exitcode is not None
    return Ended(process.exitcode, Path(f"{log}.out").read_text(), Path(f"{log}.err").read_text())
