"""Work on many matrices, several at a time and each on one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import TypeVar

import torch

from mpocli.hf.weight import Weight
from mpocli.progress import Progress

Job = TypeVar("Job")
# At a time: each holds some ten matrices of its size or its second moments' in double precision.
_MOST = 4
# Elements of a matrix or of its second moments, up to which several are worked on at a time: 80 MB of float64.
_SIDE_BY_SIDE = 10**7


def run_parallel(jobs: Sequence[Job], do: Callable[[Job], None], *, alone: Callable[[Job], bool]) -> Iterator[Job]:
    """Do all jobs, and give each of them back before it is waited for, those that run `alone` first.

    Factorisations of a few hundred rows gain nothing from a second thread, and one after another they leave all cores
    but one idle. With one thread each, what comes out does not depend on how many threads there are either. Jobs that
    are alone have all threads; take those that would not fit in memory side by side, or that a GPU works on. An error
    or a caller that stops ends it: jobs that have begun are waited for, others are not begun.
    """
    for job in filter(alone, jobs):
        yield job
        do(job)
    rest = [job for job in jobs if not alone(job)]
    workers = min(torch.get_num_threads(), _MOST, len(rest))
    if workers < 1:
        return
    stopped = Event()

    def done(job: Job) -> None:
        if stopped.is_set():
            return
        try:
            do(job)
        except BaseException:
            stopped.set()
            raise

    with _threads(1), ThreadPoolExecutor(workers) as pool:
        try:
            for job, result in [(job, pool.submit(done, job)) for job in rest]:
                yield job
                result.result()
        finally:
            stopped.set()


def over_weights(
    jobs: Sequence[Job],
    do: Callable[[Job], None],
    weight_of: Callable[[Job], Weight],
    device: torch.device,
    what: str,
    progress: Progress | None,
) -> None:
    """`do` for all jobs, announced by their weights' names: large ones alone, and all of them on a GPU."""

    def is_alone(job: Job) -> bool:
        weight = weight_of(job)
        elements = max(*(size**2 for size in weight.shape), weight.dense_params)
        return device.type != "cpu" or elements > _SIDE_BY_SIDE

    for number, job in enumerate(run_parallel(jobs, do, alone=is_alone)):
        if progress is not None:
            progress(number, len(jobs), f"{what} {weight_of(job).name}")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Of every operation that begins now, in threads that begin now too."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
