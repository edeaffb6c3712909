"""Refreshers that are forks of the tests' process, where it does not matter how they are started.

A refresher of its own imports everything, which takes longer than all that it does in a small fit.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tqdm import tqdm

from pt_dance.training.refresh import beside, refresher


class Forked:
    """What is used of a ``subprocess.Popen``."""

    def __init__(self, folder: Path, given: Any) -> None:
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_refresh, args=(os.getpid(), folder, given.fileno()))
        self._process.start()
        self.terminate, self.kill = self._process.terminate, self._process.kill

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked refresher", timeout)
        return self._process.exitcode


def _refresh(parent: int, folder: Path, given: int) -> None:
    tqdm.set_lock(threading.RLock())  # not that of the parent, which would wait for ever if this is killed with it
    log = os.open(folder / "refresher.log", os.O_CREAT | os.O_WRONLY)
    for file, place in ((given, 0), (log, 1), (log, 2)):
        os.dup2(file, place)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(place, "r" if place == 0 else "w") for place in range(3))
    sys.argv = [refresher.__file__, str(parent), str(folder)]
    refresher.main()


@contextlib.contextmanager
def forked_refreshers() -> Iterator[None]:
    """Let refreshers be forks for the time being."""
    with mock.patch.object(beside, "_started", lambda folder, given, lock: Forked(folder, given)):
        yield
