"""Jobs side by side: all of them, in the right company, and an error that ends it."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from mpocli.methods.planner.parallel import run_parallel


@pytest.fixture(autouse=True)
def two_threads():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2  # put back by whoever changed it
    torch.set_num_threads(before)


def test_large_jobs_run_alone_on_all_threads_and_the_others_beside_each_other_on_one() -> None:
    running, seen, lock = set(), {}, threading.Lock()

    def do(job: int) -> None:
        with lock:
            running.add(job)
        time.sleep(0.05)
        with lock:
            seen[job] = (torch.get_num_threads(), frozenset(running))
        time.sleep(0.05)
        with lock:
            running.remove(job)

    announced = list(run_parallel(range(6), do, alone=lambda job: job % 3 == 0))
    assert announced == [0, 3, 1, 2, 4, 5]
    assert seen[0] == (2, frozenset({0})) and seen[3] == (2, frozenset({3}))
    assert {threads for threads, _ in (seen[job] for job in (1, 2, 4, 5))} == {1}
    assert seen[1][1] == {1, 2}


def test_the_first_error_ends_it_and_nothing_more_begins() -> None:
    begun = []

    def do(job: int) -> None:
        begun.append(job)
        if job == 0:
            raise ValueError("no")
        time.sleep(0.2)

    with pytest.raises(ValueError, match="no"):
        list(run_parallel(range(20), do, alone=lambda job: False))
    assert len(begun) < 6


def test_an_error_behind_a_long_job_ends_it_too() -> None:
    begun = []

    def do(job: int) -> None:
        begun.append(job)
        if job == 1:
            raise ValueError("no")
        time.sleep(0.3 if job == 0 else 0.01)

    with pytest.raises(ValueError, match="no"):
        list(run_parallel(range(30), do, alone=lambda job: False))
    assert begun == [0, 1]


def test_a_caller_that_stops_leaves_nothing_behind() -> None:
    begun = []

    def do(job: int) -> None:
        begun.append(job)
        time.sleep(0.05)

    work = run_parallel(range(50), do, alone=lambda job: False)
    next(work)
    work.close()  # type: ignore[attr-defined]
    count = len(begun)
    time.sleep(0.2)
    assert len(begun) == count < 10 and torch.get_num_threads() == 2
