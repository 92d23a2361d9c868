"""Signals that ask for the end, as exceptions in the main thread of the process they are meant for."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from mpocli.cli.signals import Terminated, as_interrupts


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    """Handlers as at the start of a process, whatever the tests' runner has set."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_signal_is_a_keyboard_interrupt_once_and_its_echo_does_not_cut_the_clearing_up_short(
    number: signal.Signals,
) -> None:
    cleared = False
    with as_interrupts() as ending:
        with pytest.raises(KeyboardInterrupt) as raised:
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
        cleared = True
    assert cleared and isinstance(raised.value, Terminated)
    assert ending.exit_code == 128 + number and number.name in ending.reason


def test_a_later_signal_is_a_new_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a process whose clearing up hangs could only be killed."""
    monkeypatch.setattr("mpocli.cli.signals._SAME_SECONDS", 0.0)
    with as_interrupts():
        for _ in range(2):
            with pytest.raises(Terminated):
                os.kill(os.getpid(), signal.SIGTERM)


def test_handlers_are_as_before_after_the_block_and_a_signal_that_is_ignored_stays_so() -> None:
    """`nohup mpocli …` goes on when the terminal closes."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with as_interrupts() as ending:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert ending.signal is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_another_thread_sets_no_handler_and_does_not_fail() -> None:
    found = []

    def inside() -> None:
        with as_interrupts():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


def test_a_forked_worker_ends_by_the_signal_as_it_would_without_a_handler() -> None:
    """A pool ends its workers so, and a traceback of each would be all that the user sees."""
    with as_interrupts():
        worker = os.fork()
        if worker == 0:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os._exit(77)
        _, status = os.waitpid(worker, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM


def test_an_error_that_comes_of_the_signal_is_not_called_a_bug(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal that is gone fails whoever still wants to print on it."""
    from mpocli.cli.app import main

    def command(*_arguments: object, **_options: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGHUP)
        except KeyboardInterrupt:
            raise OSError(5, "Input/output error") from None

    monkeypatch.setattr("mpocli.cli.app._command", lambda: type("", (), {"main": command}))
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 129
    assert capsys.readouterr().err == "error: ended by SIGHUP; nothing half-written was left\n"
