"""Disks that run full at any moment, and read-only ones, for real: a small file system in a namespace of its own."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pt_dance._disk_errors import writing
from pt_dance._files import DiskError, building_path

SCRIPT = Path(__file__).with_name("small_disk.py")
CASES = ("corpus", "encoder", "index", "appended", "overwritten", "approximate index", "run", "saved")


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
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
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
    elsewhere = PermissionError(errno.EACCES, "no", str(tmp_path / "other.jsonl"))
    for error in (ValueError("No space left on device"), RuntimeError("boom"), elsewhere, KeyError("x")):
        with pytest.raises(type(error)) as caught, writing(final, "it"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PermissionError(errno.EACCES, "no", "FINAL"), errno.EACCES),
        (OSError(errno.EFBIG, "no", "BESIDE"), errno.EFBIG),
        (OSError(errno.ENOSPC, "[Errno 28] Error writing bytes to file. Detail: ..."), errno.ENOSPC),
        (RuntimeError("could not write: No space left on device"), errno.ENOSPC),
    ],
)
def test_errors_of_the_disk_say_what_could_not_be_written(tmp_path, error, code):
    final = tmp_path / "final"
    if error.__dict__.get("filename", getattr(error, "filename", None)):
        error.filename = str(final if error.filename == "FINAL" else building_path(final) / "part")
    says = r"the thing could not be written \(.*goes on"
    with pytest.raises(DiskError, match=says) as caught, writing(final, "the thing"):
        raise error
    assert caught.value.errno == code and caught.value.filename == str(final)
