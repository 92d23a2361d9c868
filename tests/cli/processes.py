"""`mpocli` in real processes that start in no time: a server imports everything once and forks for each run.

Run as a script it is that server: one JSON line in (what `Server.run` is given), one line out, the exit code and the
seconds of processor time. A run's output goes to `<log>.out` and `<log>.err`.
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, NoReturn


@dataclass(frozen=True)
class Moment:
    """When a run signals itself: right before the `number`-th audit event of this name with an argument that the
    pattern is found in, or `delay` seconds of processor time after it. No load of the machine can move it."""

    event: str
    pattern: str
    number: int = 1
    signal: int = signal.SIGKILL
    delay: float = 0.0


@dataclass(frozen=True)
class Ended:
    """A run that is over. `code` is negative for the signal that ended it, `cpu` its processor time in seconds."""

    code: int
    cpu: float
    out: str
    err: str


class Server:
    """Use as a context manager; one run at a time. `model` is decomposed once to load what is loaded lazily, and
    `modules` are imported."""

    def __init__(self, model: Path, *modules: str) -> None:
        self._model, self._modules = model, modules

    def __enter__(self) -> Server:
        self._process = subprocess.Popen(
            [sys.executable, __file__, self._model, *self._modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # a pool of threads does not survive a fork
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(
        self,
        *arguments: object,
        cwd: Path,
        log: Path,
        moment: Moment | None = None,
        limit: int | None = None,
        out: Literal["file", "closed pipe", "full device"] = "file",
        ranks: int = 0,
        before: str = "",
    ) -> Ended:
        """`mpocli arguments…`. `limit`: no file may grow beyond so many bytes (EFBIG, much like a full disk).
        `out`: what stdout is; a closed pipe is `| head` after it has left. `ranks`: under torchrun, as so many
        processes. `before`: statements that each process executes first."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "log": str(log),
            "moment": moment and vars(moment),
            "limit": limit,
            "out": out,
            "ranks": ranks,
            "before": before,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        code, cpu = json.loads(self._process.stdout.readline())
        return Ended(code, cpu, Path(f"{log}.out").read_text(), Path(f"{log}.err").read_text())


def _arm(moment: Moment) -> None:
    left = moment.number

    def fire(_signal: int = 0, _frame: FrameType | None = None) -> None:
        os.kill(os.getpid(), moment.signal)

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if name == moment.event and any(re.search(moment.pattern, str(argument)) for argument in arguments):
            left -= 1
            if left == 0 and moment.delay:
                signal.signal(signal.SIGVTALRM, fire)
                signal.setitimer(signal.ITIMER_VIRTUAL, moment.delay)
            elif left == 0:
                fire()

    sys.addaudithook(hook)


def _run(main: Callable[[list[str]], NoReturn], arguments: list[str]) -> NoReturn:
    """`main`, and the end of the interpreter without taking torch down, which takes twenty times as long."""
    code: Any = 1
    try:
        main(arguments)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:  # Python says so too, and exits with 120
            os.write(2, f"Exception ignored: {error}\n".encode())
            code = 120
    os._exit(code)


def _torchrun(ranks: int, main: Callable[[list[str]], NoReturn], arguments: list[str]) -> NoReturn:
    """What `torchrun --standalone --nproc_per_node RANKS -m mpocli` does, its processes forked from this one."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def rank() -> None:
        try:
            main(arguments)
        except SystemExit as stop:
            assert not stop.code, stop.code

    meet = {"rdzv_backend": "c10d", "rdzv_configs": {"store_type": "file"}, "run_id": str(os.getpid())}
    elastic_launch(LaunchConfig(1, 1, ranks, start_method="fork", max_restarts=0, **meet), rank)()
    sys.exit(0)


def _serve() -> None:
    import resource
    from contextlib import redirect_stderr, redirect_stdout
    from importlib import import_module
    from io import StringIO

    from mpocli.cli.app import main

    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        try:
            main(["decompose", sys.argv[1], "--dry-run", "--rel-tol", "0.5"])
        except SystemExit as stop:
            assert not stop.code
    for name in sys.argv[2:]:
        import_module(name)
    gc.freeze()  # or every child would copy the pages that its first collection touches
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number, suffix in ((1, ".out"), (2, ".err")):
                file = os.open(f"{request['log']}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(file, number)
            if request["out"] == "closed pipe":
                reader, writer = os.pipe()
                os.close(reader)
                os.dup2(writer, 1)
            elif request["out"] == "full device":
                os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
            os.chdir(request["cwd"])
            if request["limit"]:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
            if request["moment"]:
                _arm(Moment(**request["moment"]))
            exec(request["before"], {})
            _run(partial(_torchrun, request["ranks"], main) if request["ranks"] else main, request["arguments"])
        _, status, used = os.wait4(pid, 0)
        sys.stdout.write(json.dumps([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
