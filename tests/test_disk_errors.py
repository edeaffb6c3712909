"""Disks that run full at any moment, and read-only ones, for real: a small file system in a namespace of its own."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pt_dance import Corpus
from pt_dance.storage.folders import DiskError, building_path
from pt_dance.storage.writing import KEPT, NOTHING, new_folder, writing

SCRIPT = Path(__file__).with_name("small_disk.py")
CASES = ("corpus", "passages", "encoder", "index", "appended", "overwritten", "approximate index", "run", "saved")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    try:
        subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "x", "/mnt"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system lets nobody mount a file system in a namespace of one's own")
    folder = tmp_path_factory.mktemp("disks") / "disk"
    folder.mkdir()
    environment = {**os.environ, "PYTERRIER_HOME": str(folder.parent / "home"), "OMP_NUM_THREADS": "1"}
    command = ["unshare", "-rm", sys.executable, str(SCRIPT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not any(folder.iterdir()), "the disk was not mounted"
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_a_full_disk_is_one_plain_error_and_nothing_is_lost(report, case):
    found = report[case]
    assert found["errors"], "the disk was never full: this case tests nothing"
    for error in found["errors"]:
        assert error["is_os_error"] and error["errno"] == errno.ENOSPC and error["ours"], error
        assert "\n" not in error["message"] and not error["others_shown"], error
        assert any(words in error["message"] for words in ("No space left", "disk is full", "disk has")), error
    assert found["last"] is None and found["right"], found
    assert found["left"] == []


@pytest.mark.parametrize("case", CASES)
def test_a_read_only_disk_is_one_plain_error(report, case):
    error = report[case]["read-only"]
    assert error["is_os_error"] and error["errno"] == errno.EROFS and error["ours"], error
    assert "Read-only file system" in error["message"] and not error["others_shown"], error


def test_what_is_on_a_read_only_disk_can_be_searched(report):
    assert report["reading"] and report["loading"]


def test_errors_of_others_pass_as_they_are(tmp_path):
    final = tmp_path / "final"
    for error in (
        ValueError("No space left on device"),
        KeyError("x"),
        RuntimeError("boom"),
        # They name another file, or none while the disk of ours has room and can be written to.
        PermissionError(errno.EACCES, "no", str(tmp_path / "other.jsonl")),
        PermissionError(errno.EACCES, "no", "/"),
        OSError(errno.ENOSPC, "no"),
        OSError(errno.ENOSPC, "no", 3.5),
        OSError(errno.EROFS, "no"),
        RuntimeError("could not write: No space left on device"),
        sqlite3.OperationalError("database or disk is full"),
    ):
        with pytest.raises(type(error)) as caught, writing(final, "it", KEPT):
            raise error
        assert caught.value is error


def test_a_full_disk_makes_no_other_error_one_of_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    for error in (RuntimeError("4 devices requested and 1 found"), ValueError("No space left on device")):
        with pytest.raises(type(error)) as caught, writing(tmp_path / "final", "it", KEPT):
            raise error
        assert caught.value is error
    with pytest.raises(DiskError, match="it could not be written"), writing(tmp_path / "final", "it", KEPT):
        raise RuntimeError("write error in index.faiss: No space left on device")


def test_a_stage_of_the_user_on_a_full_disk_is_not_ours(tmp_path):
    def documents():
        yield {"docno": "1", "text": "a"}
        with open("/dev/full", "w") as cache:
            cache.write("x" * 100_000)

    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        Corpus.build(documents(), tmp_path / "corpus", verbose=False)
    assert not isinstance(caught.value, DiskError) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "file", "done"),
    [
        (PermissionError(errno.EACCES, "no"), "final", "read or written"),
        (OSError(errno.EIO, "no"), "final/vecs.f4", "read or written"),
        (OSError(errno.EFBIG, "no"), ".final.building/part", "written"),
        (OSError(errno.EROFS, "no"), "not there/final", "written"),
    ],
)
def test_errors_of_the_disk_say_what_could_not_be_written(tmp_path, error, file, done):
    error.filename = str(tmp_path / file)
    final = tmp_path / ("not there/final" if "not there" in file else "final")
    says = rf"the thing could not be {done} \(.*\); nothing of it is left"
    with pytest.raises(DiskError, match=says) as caught, writing(final, "the thing", NOTHING):
        raise error
    assert caught.value.errno == error.errno and caught.value.filename == error.filename


def test_a_new_folder_is_whole_or_not_there(tmp_path):
    building = building_path(tmp_path / "a" / "new")
    building.mkdir(parents=True)
    (building / "left by a kill").write_text("x")
    with new_folder(tmp_path / "a" / "new", "it") as folder:
        assert not any(folder.iterdir())
        with (
            pytest.raises(BlockingIOError, match="another process is making"),
            new_folder(tmp_path / "a" / "new", "it"),
        ):
            pass
        (folder / "file").write_text("y")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["new"]
    assert [p.name for p in (tmp_path / "a" / "new").iterdir()] == ["file"]
    with pytest.raises(KeyError), new_folder(tmp_path / "b", "it") as folder:
        (folder / "file").write_text("y")
        raise KeyError
    with new_folder(tmp_path / "c", "it"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
