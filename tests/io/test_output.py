"""Output directories: what may be replaced, and that replacing is all or nothing."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest

from mpocli.errors import InputError
from mpocli.io import claim, lock, place
from mpocli.io.claim import writes_output
from mpocli.io.output import check_output, output_directory


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_nothing_is_at_the_path_before_the_block_ends_and_all_of_it_after(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output_directory(out) as work:
        (work / "a").write_text("1")
        assert not out.exists() and work.parent == tmp_path / ".out.partial"
    assert _names(tmp_path) == {"out"} and (out / "a").read_text() == "1"


def test_an_old_directory_stands_untouched_until_then_and_is_gone_after(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with output_directory(out) as work:
        (work / "new").write_text("new")
        assert _names(out) == {"old"}
    assert _names(tmp_path) == {"out"} and _names(out) == {"new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_exception_in_the_block_leaves_the_old_directory_and_no_remains(
    error: type[BaseException], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(error), output_directory(out) as work:
        (work / "new").write_text("new")
        raise error
    assert _names(tmp_path) == {"out"} and _names(out) == {"old"}


def test_an_os_error_in_the_block_is_an_input_error_that_names_the_output_and_the_cause(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"out: cannot be written \(No space left on device\)"):  # noqa: SIM117
        with output_directory(tmp_path / "out"):
            raise OSError(28, os.strerror(28))
    assert _names(tmp_path) == set()


def test_a_parent_that_is_a_file_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), output_directory(tmp_path / "file" / "out"):
        raise AssertionError("the block must not run")


def test_a_symbolic_link_at_the_path_keeps_pointing_at_what_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    real = tmp_path / "far" / "real"
    real.mkdir()
    (real / "old").write_text("old")
    (tmp_path / "out").symlink_to(real)
    with output_directory(tmp_path / "out") as work:
        (work / "new").write_text("new")
    assert (tmp_path / "out").is_symlink() and _names(tmp_path / "out") == {"new"}
    assert _names(tmp_path) == {"out", "far"} and _names(tmp_path / "far") == {"real"}


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?b", "-a", "a b", "ünï"])
def test_remains_of_an_output_with_an_odd_name_are_swept_and_only_they(name: str, tmp_path: Path) -> None:
    (tmp_path / f".{name}.partial").mkdir()
    (tmp_path / f".{name}.lock").touch()
    bystander = tmp_path / ".aXb.partial"
    bystander.mkdir()
    with output_directory(tmp_path / name):
        pass
    assert _names(tmp_path) == {name, bystander.name}


def test_a_directory_may_be_absent_empty_or_a_model_to_overwrite(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    check_output(out, source, overwrite=False)
    out.mkdir()
    check_output(out, source, overwrite=False)
    (out / "config.json").write_text("{}")
    with pytest.raises(InputError, match="‹overwrite›"):
        check_output(out, source, overwrite=False)
    check_output(out, source, overwrite=True)
    (out / "config.json").rename(out / "thesis.tex")
    with pytest.raises(InputError, match=r"config\.json"):
        check_output(out, source, overwrite=True)
    shutil.rmtree(out)
    out.write_text("")
    with pytest.raises(InputError, match="not a directory"):
        check_output(out, source, overwrite=True)


def test_nothing_is_known_of_the_input_before_it_is_downloaded(tmp_path: Path) -> None:
    check_output(tmp_path / "out", None, overwrite=False)
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="not a directory"):
        check_output(tmp_path / "out", None, overwrite=True)


def test_remains_are_swept_before_the_output_is_checked(tmp_path: Path) -> None:
    aside = tmp_path / ".out.partial" / "replaced"
    aside.mkdir(parents=True)
    (aside / "config.json").write_text("{}")
    with pytest.raises(InputError, match="‹overwrite›"):
        check_output(tmp_path / "out", tmp_path / "source", overwrite=False)
    assert _names(tmp_path) == {"out"} and _names(tmp_path / "out") == {"config.json"}


def test_the_living_are_told_by_the_lock_they_hold(tmp_path: Path) -> None:
    """Neither by a process id, which is 1 in every container, nor by the presence of a file, which a kill leaves."""
    with output_directory(tmp_path / "out") as work:
        (work / "a").write_text("1")
        with pytest.raises(InputError, match="another process"):
            check_output(tmp_path / "out", None, overwrite=True)
        assert (work / "a").read_text() == "1"
    assert _names(tmp_path) == {"out"}


def test_nothing_is_deleted_where_the_file_system_has_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There nobody knows whether somebody works in it still."""

    def no_locks(*_arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    for left in (".out.partial", ".out.partial-abcd"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "half").write_text("of another")
    with output_directory(tmp_path / "out") as work:
        (work / "a").write_text("1")
    assert _names(tmp_path) == {"out", ".out.partial", ".out.partial-abcd"} and _names(tmp_path / "out") == {"a"}
    assert (tmp_path / ".out.partial" / "half").exists() and (tmp_path / ".out.partial-abcd" / "half").exists()


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("before", ["absent", "empty", "a model"])
def test_what_was_written_at_the_output_since_it_was_claimed_stays(
    before: str, can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(place, "_exchange", lambda a, b: False)
    out = tmp_path / "out"
    if before != "absent":
        out.mkdir()
    if before == "a model":
        (out / "config.json").write_text("{}")
    found = _names(out) if out.exists() else set()

    @writes_output
    def run() -> None:
        check_output(out, None, overwrite=True)
        out.mkdir(exist_ok=True)
        (out / "thesis.tex").write_text("mine")  # after the look, before the work begins
        with output_directory(out) as work:
            (work / "new").write_text("new")

    with pytest.raises(InputError, match="since this run began"):
        run()
    assert _names(tmp_path) == {"out"} and _names(out) == {*found, "thesis.tex"}


def test_what_has_changed_in_place_since_it_was_claimed_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(InputError, match="since this run began"), output_directory(out):
        (out / "config.json").write_text('{"a": 1}')
    assert (out / "config.json").read_text() == '{"a": 1}'


def test_missing_parents_are_made_for_a_result_and_not_for_a_failure(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b" / "out", None, overwrite=False)
    with pytest.raises(ValueError), output_directory(tmp_path / "a" / "b" / "out"):
        raise ValueError
    assert _names(tmp_path) == set()


def test_a_mount_point_is_no_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It could not be renamed to in the end."""
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path / "out")
    with pytest.raises(InputError, match="mount point"):
        check_output(tmp_path / "out", None, overwrite=False)


def test_a_directory_is_discarded_whole_before_it_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in the middle leaves nothing under its name, and the next claim beside it sweeps the rest."""
    training, out = tmp_path / "out.training", tmp_path / "out"
    training.mkdir()
    (training / "run.json").write_text("{}")

    @writes_output
    def run() -> None:
        check_output(out, None, overwrite=True)
        monkeypatch.setattr(claim, "_remove", lambda path: None)  # killed here
        claim.discard(training)
        raise KeyboardInterrupt

    with monkeypatch.context(), pytest.raises(KeyboardInterrupt):
        run()
    assert not training.exists() and _names(tmp_path) == {".out.partial"}
    monkeypatch.undo()
    check_output(out, None, overwrite=False)
    assert _names(tmp_path) == set()


@pytest.mark.parametrize("below", [".", "below"])
def test_the_working_directory_is_no_output(below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out" / "below").mkdir(parents=True)
    (tmp_path / "out" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "out" / below)
    with pytest.raises(InputError, match="working directory"):
        check_output(tmp_path / "out", tmp_path / "source", overwrite=True)


def test_every_file_and_directory_is_on_the_disk_before_the_renaming_and_the_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory must be flushed too, or the names in it may be lost."""
    out, flushed = tmp_path / "out", set()
    fsync = os.fsync

    def note(descriptor: int) -> None:
        flushed.add((os.fstat(descriptor).st_ino, out.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    with output_directory(out) as work:
        (work / "folder").mkdir()
        (work / "folder" / "file").write_text("1")
    inside = (out, out / "folder", out / "folder" / "file")
    assert flushed == {*((path.stat().st_ino, False) for path in inside), (tmp_path.stat().st_ino, True)}


def test_a_file_system_that_cannot_flush_a_directory_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    with output_directory(tmp_path / "out") as work:
        (work / "file").write_text("1")
    assert _names(tmp_path) == {"out"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), SystemExit()], ids=repr)
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("renaming", ["replaced", "new"])
def test_whatever_interrupts_a_renaming_leaves_old_or_new_and_no_remains(
    renaming: str, moment: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`renaming` aside or into place; where the system cannot exchange directories in one step."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    rename, raised = Path.rename, []

    def interrupted(self: Path, target: Path) -> Path:
        if raised or renaming != (target if self == out else self).name:
            return rename(self, target)
        raised.append(error)
        if moment == "after":
            rename(self, target)
        raise error

    monkeypatch.setattr(place, "_exchange", lambda a, b: False)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises((InputError, KeyboardInterrupt, SystemExit)), output_directory(out) as work:
        (work / "new").write_text("new")
    assert raised and _names(tmp_path) == {"out"}
    assert _names(out) == ({"new"} if renaming == "new" and moment == "after" else {"old"})


def test_source_and_output_may_be_neighbours_with_one_name_inside_the_other(tmp_path: Path) -> None:
    """`bert` and `bert-mpo`: a prefix of the text is no parent."""
    source = tmp_path / "bert"
    source.mkdir()
    check_output(tmp_path / "bert-mpo", source, overwrite=False)
    check_output(tmp_path / "ber", source, overwrite=False)
    for out in (source, source / "out", tmp_path, source / ".." / "bert"):
        with pytest.raises(InputError, match="inside each other"):
            check_output(out, source, overwrite=True)
