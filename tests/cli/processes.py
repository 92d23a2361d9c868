"""`mpocli` in real processes that start in no time: a server imports everything once and forks for each run.

The server is given what `Server.run` is and answers with the exit code and the seconds of processor time. What a run
prints goes to `<log>.out` and `<log>.err`.
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, NoReturn

from strangers import CONTEXT

WRITE = "a change of the file system"


@dataclass(frozen=True)
class Moment:
    """When a run signals itself: right before the `number`-th audit event of this name (`WRITE`: of those that change
    the file system) with an argument that the pattern is found in, or `delay` seconds of processor time after it. No
    load of the machine can move it."""

    event: str
    pattern: str
    number: int = 1
    signal: int = signal.SIGKILL
    delay: float = 0.0


@dataclass(frozen=True)
class Ended:
    """A run that is over. `code` is negative for the signal that ended it, `cpu` its processor time in seconds,
    `writes` each change of the file system that it was about to make, as event and paths, if it was watched."""

    code: int
    cpu: float
    out: str
    err: str
    writes: tuple[tuple[str, ...], ...] = ()


class Server:
    """Use as a context manager; one run at a time. `model` is decomposed once to load what is loaded lazily, all of
    mpocli is imported, and `modules` of others are."""

    def __init__(self, model: Path, *modules: str) -> None:
        self._model, self._modules = model, modules

    def __enter__(self) -> Server:
        self._connection, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_serve, args=(theirs, str(self._model), self._modules))
        self._process.start()
        theirs.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join()

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
        watch: bool = False,
    ) -> Ended:
        """`mpocli arguments…`. `limit`: no file may grow beyond so many bytes (EFBIG, much like a full disk).
        `out`: what stdout is; a closed pipe is `| head` after it has left. `ranks`: under torchrun, as so many
        processes. `before`: statements that each process executes first. `watch`: note the changes that it makes."""
        request = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "log": str(log),
            "moment": moment,
            "limit": limit,
            "out": out,
            "ranks": ranks,
            "before": before,
            "watch": watch,
        }
        self._connection.send(request)
        code, cpu = self._connection.recv()
        out_text, err_text = (Path(f"{log}.{name}").read_text(errors="replace") for name in ("out", "err"))
        noted = Path(f"{log}.writes").read_text().splitlines() if watch else []
        return Ended(code, cpu, out_text, err_text, tuple(tuple(json.loads(line)) for line in noted))


# Where in the arguments of such an audit event the paths are, and in which place of those a directory's descriptor.
_CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.link": ((1, 3),),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.rmdir": ((0, 1),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.utime": ((0, 3),),
}


def _changes(name: str, arguments: tuple[Any, ...]) -> list[str]:
    """The absolute paths that an audit event is about to change: none, if it only reads."""
    if name == "open":
        path, _, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        return [_whole(path)] if writes and not isinstance(path, int) else []
    return [
        _whole(arguments[place], -1 if descriptor is None else arguments[descriptor])
        for place, descriptor in _CHANGES.get(name, ())
    ]


def _whole(path: str | bytes | int | os.PathLike[str], descriptor: int = -1) -> str:
    """An absolute path, its links as they are; `descriptor` is of the directory it is relative to."""
    if isinstance(path, int):
        return str(Path(f"/proc/self/fd/{path}").readlink())
    base = Path(f"/proc/self/fd/{descriptor}").readlink() if descriptor != -1 else Path.cwd()
    return os.path.normpath(base / os.fsdecode(path))


def _watch(log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        paths = _changes(name, arguments)
        if paths:
            os.write(file, f"{json.dumps([name, *paths])}\n".encode())

    sys.addaudithook(hook)


def _arm(moment: Moment) -> None:
    left = moment.number

    def fire(_signal: int = 0, _frame: FrameType | None = None) -> None:
        os.kill(os.getpid(), moment.signal)

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        meant = _changes(name, arguments) if moment.event == WRITE else name == moment.event
        if meant and any(re.search(moment.pattern, str(argument)) for argument in arguments):
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


def _serve(connection: Connection, model: str, modules: tuple[str, ...]) -> None:
    import resource
    from contextlib import redirect_stderr, redirect_stdout
    from importlib import import_module
    from io import StringIO
    from pkgutil import walk_packages

    import mpocli
    from mpocli.cli.app import main

    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        try:
            main(["decompose", model, "--dry-run", "--rel-tol", "0.5"])
        except SystemExit as stop:
            assert not stop.code
    ours = [found.name for found in walk_packages(mpocli.__path__, "mpocli.") if found.name != "mpocli.__main__"]
    for name in [*ours, *modules]:
        import_module(name)
    os.fsync = lambda descriptor: None  # as in the tests' own process
    gc.freeze()  # or every child would copy the pages that its first collection touches
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        pid = os.fork()
        if pid == 0:
            connection.close()
            sys.dont_write_bytecode = True  # of what is imported late in a new environment
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
            if request["watch"]:
                _watch(f"{request['log']}.writes")
            if request["moment"]:
                _arm(request["moment"])
            exec(request["before"], {})
            _run(partial(_torchrun, request["ranks"], main) if request["ranks"] else main, request["arguments"])
        _, status, used = os.wait4(pid, 0)
        connection.send((os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime))
