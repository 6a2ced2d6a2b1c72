"""Results reach their folder whole, or another one that is named; a full disk is a real one, of 64 KiB."""

import errno
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pikv.evaluation.report import folder as folders
from pikv.evaluation.report.folder import choose_folder, save_files
from pikv.unfinished import unfinished_name


def write_two(part):
    (part / "a.csv").write_text("first")
    (part / "b.json").write_text("second")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB, mounted."""
    point = tmp_path / "disk"
    point.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting needs root")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(point)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.decode().strip()}")
    yield point
    subprocess.run(["umount", "-l", str(point)], check=True)


@pytest.fixture
def rescue(tmp_path, monkeypatch):
    """Where temporary folders go."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(folders.tempfile, "gettempdir", lambda: str(place))
    return place


def test_files_appear_when_all_are_complete(tmp_path):
    folder = choose_folder(tmp_path / "a" / "results", "compare")
    assert names(tmp_path) == []  # only looked at

    def write(part):
        (part / "a.csv").write_text("first")
        assert not (folder / "a.csv").exists()
        (part / "b.json").write_text("second")

    save_files(folder, write)
    assert names(folder) == ["a.csv", "b.json"]
    assert names(folder.parent) == ["results"]
    assert (folder / "b.json").read_text() == "second"


def test_a_link_a_mounted_folder_and_the_shells_own_folder_are_written_to(tmp_path, small_disk, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = os.stat(".").st_ino
    for folder in (tmp_path / "link", small_disk, Path()):
        save_files(choose_folder(folder, "compare"), write_two)
        assert names(folder) == ["a.csv", "b.json"]
    assert os.stat(tmp_path / "here").st_ino == before
    assert names(tmp_path / "real") == ["a.csv", "b.json"]


def test_what_a_full_disk_does_not_take_is_found_elsewhere(small_disk, rescue):
    def write(part):
        (part / "a.csv").write_text("first")
        (part / "b.json").write_text("x" * 100_000)

    folder = choose_folder(small_disk / "results", "compare")
    with pytest.raises(OSError, match=r"cannot write to .*results: No space left on device; the results are in ") as caught:
        save_files(folder, write)
    (elsewhere,) = rescue.iterdir()
    assert str(caught.value).endswith(str(elsewhere))
    assert names(elsewhere) == ["a.csv", "b.json"]
    assert (elsewhere / "b.json").stat().st_size == 100_000
    assert names(small_disk) == []


def test_a_disk_that_is_full_already_is_refused_before_anything_is_run(small_disk):
    with (small_disk / "other").open("wb", buffering=0) as other:
        while shutil.disk_usage(small_disk).free:
            other.write(b"x" * 4096)
    with pytest.raises(ValueError, match=r"cannot write to .*: No space left on device"):
        choose_folder(small_disk / "results", "compare")


def test_two_runs_into_one_folder_keep_both_results(tmp_path, rescue):
    first, second = (choose_folder(tmp_path / "results", "compare") for _ in range(2))
    save_files(first, write_two)
    with pytest.raises(OSError, match=r"cannot write to .*results: File exists; the results are in "):
        save_files(second, lambda part: (part / "a.csv").write_text("of the second"))
    assert (tmp_path / "results" / "a.csv").read_text() == "first"
    (elsewhere,) = rescue.iterdir()
    assert (elsewhere / "a.csv").read_text() == "of the second"
    assert names(tmp_path / "results") == ["a.csv", "b.json"]


def test_a_run_is_not_mixed_with_another(tmp_path, rescue):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "b.json").write_text("of another")
    with pytest.raises(OSError, match="File exists"):
        save_files(tmp_path / "results", write_two)
    assert names(tmp_path / "results") == ["b.json"]
    assert (tmp_path / "results" / "b.json").read_text() == "of another"


@pytest.mark.parametrize("taken", [False, True])
def test_file_systems_without_links(tmp_path, rescue, monkeypatch, taken):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(folders.os, "link", no_links)
    if not taken:
        save_files(tmp_path / "results", write_two)
        assert names(tmp_path / "results") == ["a.csv", "b.json"]
        return
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.csv").write_text("of another")
    with pytest.raises(OSError, match="File exists"):
        save_files(tmp_path / "results", write_two)
    assert (tmp_path / "results" / "a.csv").read_text() == "of another"


def test_nowhere_to_write_is_said(tmp_path, monkeypatch):
    def fail(part):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folders.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="No space left on device; nor can any temporary folder be written to"):
        save_files(tmp_path / "a" / "results", fail)
    assert names(tmp_path) == []


def test_what_killed_processes_left_goes_and_what_others_write_stays(tmp_path, monkeypatch):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    mine = unfinished_name(".pikv-")
    dead, alive = (tmp_path / mine.replace(f"-{os.getpid()}-", f"-{pid}-") for pid in (done.pid, os.getppid()))
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "another-machine")
        elsewhere = tmp_path / unfinished_name(".pikv-").replace(f"-{os.getpid()}-", f"-{done.pid}-")
    for leftover in (dead, alive, elsewhere):
        leftover.mkdir()
        (leftover / "results.csv").write_text("half")
    save_files(choose_folder(tmp_path, "compare"), write_two)
    assert names(tmp_path) == sorted([alive.name, elsewhere.name, "a.csv", "b.json"])


@pytest.mark.parametrize("error", [TypeError("no figure"), FileNotFoundError(errno.ENOENT, "No such file", "font")])
def test_what_was_written_before_something_failed_is_kept(tmp_path, rescue, error):
    def write(part):
        write_two(part)
        raise error

    with pytest.raises((RuntimeError, OSError), match=r"cannot write to .*(no figure|No such file); the results are in "):
        save_files(tmp_path / "results", write)
    (elsewhere,) = rescue.iterdir()
    assert names(elsewhere) == ["a.csv", "b.json"]
    assert names(tmp_path) == ["temporary"]


def test_results_are_never_overwritten(tmp_path):
    (tmp_path / "results").mkdir()
    assert choose_folder(tmp_path / "results", "compare") == tmp_path / "results"  # empty is fine
    (tmp_path / "results" / "old").write_text("")
    with pytest.raises(ValueError, match="never overwritten"):
        choose_folder(tmp_path / "results", "compare")
    with pytest.raises(ValueError, match="is not a folder"):
        choose_folder(tmp_path / "results" / "old" / "deeper", "compare")
    (tmp_path / "nowhere").symlink_to("missing")
    with pytest.raises(ValueError, match="is not a folder"):
        choose_folder(tmp_path / "nowhere", "compare")


def test_the_default_folder_is_named_after_the_command():
    assert choose_folder(None, "compare").as_posix().startswith("out/compare-")
