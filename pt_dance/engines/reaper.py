"""Ends what is left of a private cluster when the program that started it is gone, however it ended.

Run as a script with the cluster's folder and the program's pid, it waits until its standard input is closed, which the
system does for a killed program, too. Ray ends most of its processes itself, but leaves its agents running for minutes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator

_PATIENCE = 10.0  # seconds until processes that were killed are gone


def processes_of(folder: str, but: int = 0) -> Iterator[int]:
    """Yield the pids of processes that have a file in a folder open for writing, as all of Ray's have their logs."""
    if not os.path.isdir("/proc/self/fd"):
        return
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) in (but, os.getpid()):
            continue
        with contextlib.suppress(OSError):
            files = f"/proc/{name}/fd"
            for descriptor in os.listdir(files):
                link = f"{files}/{descriptor}"
                if os.readlink(link).startswith(f"{folder}/") and os.lstat(link).st_mode & 0o200:
                    yield int(name)
                    break


def status_of(pid: int) -> tuple[str, str, str] | None:
    """Return name, state and start time of a process; None if there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            about = file.read()
    except OSError:
        return None
    name, _, rest = about.partition("(")[2].rpartition(")")
    fields = rest.split()
    return name, fields[0], fields[19]


def end(folder: str, but: int = 0) -> None:
    """Kill the processes of a cluster and remove its folder."""
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        found = list(processes_of(folder, but))
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if not found:
            break
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.stdin.read()
    end(sys.argv[1], int(sys.argv[2]))
