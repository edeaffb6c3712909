"""Kill processes that write, and see what they leave: what ``kill_indexing.py`` and ``kill_fit.py`` have in common.

A Python process started anew imports the script it is named, says so, and forks a child for each job it is told, which
runs the script's function ``work``. It has one thread and no lock of several processes, so that children share nothing
with each other, nor with the process that kills them. A child is killed with SIGKILL, after some seconds or right
before one of its operations on the disk. One that hangs is told to print where it does, and ended.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import importlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import psutil
from tqdm import tqdm

HANGS_AFTER = 120  # seconds without use of the processor: on a busy machine a child may need minutes, but goes on
ENDS_AFTER = 1500  # seconds, from which on a child is ended whatever it does
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# Compiled files are written with os.replace, and only the first time: operations would not be numbered alike.
SURROUNDINGS = {**ONE_THREAD, "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
# pyarrow's allocator has a thread of its own otherwise
FORKS = {**SURROUNDINGS, "JE_ARROW_MALLOC_CONF": "background_thread:false"}


class Trial(Protocol):
    """One thing that is written while it is killed, in a folder of its own."""

    job: dict[str, Any]
    """What the script's ``work`` is called with, as JSON takes it."""

    seconds: float
    """How long it takes without interruption."""

    operations: int
    """How many operations on the disk it takes."""

    def check_killed(self) -> bool:
        """Check what a killed child left; return whether it had finished."""

    def check_finished(self) -> None:
        """Check that all is there and nothing is left over, then remove it."""


class Children:
    """A process that imports a script and forks a child for each job that is to be killed.

    Use it as a context manager; when the block ends, so does the process.

    Args:
        script: the module that has ``work``.
    """

    def __init__(self, script: str) -> None:
        self._command = [sys.executable, str(Path(__file__).resolve()), script]

    def __enter__(self) -> Children:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env={**os.environ, **FORKS},
            start_new_session=True,
        )  # fmt: skip
        assert self._process.stdout.readline() == b"ready\n", "the script could not be imported"
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()

    def killed(self, job: dict[str, Any], *, seconds: float | None = None, operation: int | None = None) -> bool:
        """Let a child do a job and kill it.

        Args:
            job: what ``work`` is called with.
            seconds: kill it so long after it has begun.
            operation: let it kill itself right before its n-th operation on the disk (fsync, rename, replace, removal),
                counted from 1.

        Returns:
            Whether it was killed; if not, it had finished before.
        """
        self._process.stdin.write(json.dumps([job, operation]).encode() + b"\n")
        pid = int(self._process.stdout.readline())
        if seconds is not None:
            time.sleep(seconds)
            _send(pid, signal.SIGKILL)
        status = self._wait(pid)
        assert status in (0, -signal.SIGKILL), f"a child failed with {status}"
        return status != 0

    def _wait(self, pid: int) -> int:
        """Wait for a child to end; one that hangs says where."""
        used, since = 0.0, time.monotonic()
        while not select.select([self._process.stdout], [], [], 1)[0]:
            with contextlib.suppress(psutil.Error):  # it has just ended
                times = psutil.Process(pid).cpu_times()
                if times.user + times.system > used + 0.05:
                    used, since = times.user + times.system, time.monotonic()
            if time.monotonic() - since > 2 * HANGS_AFTER:
                _send(pid, signal.SIGKILL)
            elif time.monotonic() - since > HANGS_AFTER:
                _send(pid, signal.SIGABRT)  # at which faulthandler prints what every thread does
        return int(self._process.stdout.readline())


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, number)


def kill_at_random(
    children: Children, start: Callable[[int], Trial], work: Callable[..., None], kills: int, rng: random.Random
) -> Iterator[None]:
    """Kill at random moments, each trial until it is done; yields after every kill.

    Args:
        children: of the script that has ``work``.
        start: from the number of a trial to the trial.
        work: what the script's ``work`` is: once all kills are done it ends the last trial in this process.
        kills: how many.
        rng: draws the moments, uniformly over the time that a trial takes without interruption.
    """
    number = 0
    while kills:
        trial, done = start(number), False
        while kills and not done:
            if children.killed(trial.job, seconds=rng.uniform(0, trial.seconds)):
                kills -= 1
                done = trial.check_killed()
                yield
            else:
                done = True
        if not done:
            work(**trial.job)
        trial.check_finished()
        number += 1


def kill_at_operations(
    children: Children, start: Callable[[int], Trial], work: Callable[..., None], operations: Iterable[int]
) -> Iterator[None]:
    """Kill right before some operations on the disk, each trial once; yields after every kill, as above."""
    for operation in operations:
        trial = start(operation)
        done = True
        if children.killed(trial.job, operation=operation):
            done = trial.check_killed()
            yield
        if not done:
            work(**trial.job)
        trial.check_finished()


def options(description: str, kills: int) -> argparse.ArgumentParser:
    """The options that both scripts take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--kills", type=int, default=kills, help="how many SIGKILLs at random moments")
    parser.add_argument("--seed", type=int, default=1, help="fixes the moments")
    parser.add_argument("--encoder", choices=("static", "minilm"), default="static")
    parser.add_argument("--boundaries", type=int, default=0, metavar="N", help="kill at every N-th operation too")
    parser.add_argument("--first", type=int, default=1, help="number of the first of these operations")
    return parser


class Operations:
    """Counts this process's operations on the disk while it is entered; kills the process right before the n-th."""

    WATCHED = ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink"), (shutil, "rmtree"))

    def __init__(self, die_before: int | None = None) -> None:
        self.count, self.die_before = 0, die_before

    def __enter__(self) -> Operations:
        self._restored = [(module, name, getattr(module, name)) for module, name in self.WATCHED]
        for module, name, operation in self._restored:
            setattr(module, name, self._watch(operation))
        return self

    def __exit__(self, *error: object) -> None:
        for restored in self._restored:
            setattr(*restored)

    def _watch(self, operation: Callable) -> Callable:
        def watched(*args, **kwargs):
            self.count += 1
            if self.count == self.die_before:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return watched


def main() -> None:
    """Import the script; fork a child for each line on standard input, and say its process id and how it ended."""
    gc.disable()  # what is imported lives as long as this process
    script = importlib.import_module(sys.argv[1])
    gc.freeze()
    gc.enable()
    tqdm.set_lock(threading.RLock())  # multiprocessing's would be shared by all children, those killed with it too
    faulthandler.enable()
    print("ready", flush=True)
    for line in sys.stdin:
        tasks = Path("/proc/self/task")
        assert len(list(tasks.iterdir()) if tasks.exists() else threading.enumerate()) == 1, "a fork has but one thread"
        if (pid := os.fork()) == 0:
            be_child(script, *json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def be_child(script: Any, job: dict[str, Any], operation: int | None) -> None:
    """Do a job and end."""
    faulthandler.dump_traceback_later(ENDS_AFTER, exit=True)
    try:
        with Operations(operation):
            script.work(**job)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
