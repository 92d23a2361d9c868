"""Room for intermediate results: nothing stays of it, whoever dies."""

from __future__ import annotations

import errno
import os
import signal
import tempfile
from pathlib import Path

import pytest

from mpocli.errors import InputError
from mpocli.io.scratch import scratch_directory


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def _killed_inside(output: Path | None) -> None:
    """A process with one file in its scratch directory, killed there."""
    child = os.fork()
    if child == 0:
        try:
            with scratch_directory(output) as place:
                (place / "moments").write_text("1")
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_without_an_output_the_next_run_sweeps_what_a_kill_left_and_not_what_is_alive(temporary: Path) -> None:
    _killed_inside(None)
    (left,) = (path for path in temporary.iterdir() if path.is_dir())
    assert (left / "moments").is_file()
    with scratch_directory(None) as alive:
        (alive / "mine").write_text("1")
        assert not left.exists()
        with scratch_directory(None) as other:
            assert other != alive
        assert (alive / "mine").read_text() == "1"
    assert list(temporary.iterdir()) == []


def test_what_is_a_link_is_not_swept(temporary: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Anyone may write to the system's temporary directory."""
    victim = tmp_path_factory.mktemp("victim")
    (victim / "file").write_text("mine")
    (temporary / "mpocli-scratch-1.lock").touch()
    (temporary / "mpocli-scratch-1").symlink_to(victim)
    with scratch_directory(None):
        pass
    assert (victim / "file").read_text() == "mine"


def test_beside_an_output_it_is_swept_with_the_outputs_remains(tmp_path: Path) -> None:
    _killed_inside(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {".out.lock", ".out.partial"}
    with scratch_directory(tmp_path / "out") as place:
        assert place.parent == tmp_path / ".out.partial" and list(place.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_no_usable_temporary_directory_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in [...]")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(InputError, match="TMPDIR"), scratch_directory(None):
        pass


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("output", [None, "out"])
def test_a_full_disk_is_an_input_error_and_anything_else_is_itself(
    output: str | None, error: Exception, temporary: Path
) -> None:
    place = temporary / output if output else None
    with pytest.raises(InputError, match="cannot be written"), scratch_directory(place):
        raise error
    with pytest.raises(ZeroDivisionError), scratch_directory(place):
        raise ZeroDivisionError
    assert list(temporary.iterdir()) == []
