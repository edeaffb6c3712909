"""Kill processes that write, and see what they leave: what ``kill_indexing.py`` and ``kill_fit.py`` have in common.

Each child is a Python process started anew: it shares no lock, no thread and no open file with the one that kills it.
It imports the script it is named, says so, and runs the script's function ``work`` once it is told with what. Then it
is killed with SIGKILL, after some seconds or right before one of its operations on the disk. A child that hangs is told
to print where it does, and ended.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import psutil

HANGS_AFTER = 120  # seconds without use of the processor: on a busy machine a child may need minutes, but goes on
ENDS_AFTER = 1500  # seconds, from which on a child is ended whatever it does
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# Compiled files are written with os.replace, and only the first time: operations would not be numbered alike.
SURROUNDINGS = {**ONE_THREAD, "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}


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


def killed(script: str, job: dict[str, Any], *, seconds: float | None = None, operation: int | None = None) -> bool:
    """Let a child do a job and kill it.

    Args:
        script: the module that has ``work``.
        job: what ``work`` is called with.
        seconds: kill it so long after it has begun.
        operation: let it kill itself right before its n-th operation on the disk (fsync, rename, replace, removal),
            counted from 1.

    Returns:
        Whether it was killed; if not, it had finished before.
    """
    command = [sys.executable, str(Path(__file__).resolve()), script]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **SURROUNDINGS}
    )
    try:
        assert child.stdout.readline() == "ready\n", "a child could not start"
        child.stdin.write(json.dumps([job, operation]) + "\n")
        child.stdin.flush()
        if seconds is not None:
            time.sleep(seconds)
            child.kill()
        status = _wait(child)
    finally:
        child.kill()
        child.communicate()
    assert status in (0, -signal.SIGKILL), f"a child failed with {status}"
    return status != 0


def _wait(child: subprocess.Popen) -> int:
    """Wait for a child to end; one that hangs says where."""
    used, since = 0.0, time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(1)
        with contextlib.suppress(psutil.Error):  # it has just ended
            times = psutil.Process(child.pid).cpu_times()
            if times.user + times.system > used + 0.05:
                used, since = times.user + times.system, time.monotonic()
        if time.monotonic() - since > HANGS_AFTER:
            child.send_signal(signal.SIGABRT)  # at which faulthandler prints what every thread does
            return child.wait(HANGS_AFTER)


def kill_at_random(
    script: str, start: Callable[[int], Trial], work: Callable[..., None], kills: int, rng: random.Random
) -> Iterator[None]:
    """Kill at random moments, each trial until it is done; yields after every kill.

    Args:
        script: the module that has ``work``.
        start: from the number of a trial to the trial.
        work: what the script's ``work`` is: once all kills are done it ends the last trial in this process.
        kills: how many.
        rng: draws the moments, uniformly over the time that a trial takes without interruption.
    """
    number = 0
    while kills:
        trial, done = start(number), False
        while kills and not done:
            if killed(script, trial.job, seconds=rng.uniform(0, trial.seconds)):
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
    script: str, start: Callable[[int], Trial], work: Callable[..., None], operations: Iterable[int]
) -> Iterator[None]:
    """Kill right before some operations on the disk, each trial once; yields after every kill, as above."""
    for operation in operations:
        trial = start(operation)
        done = True
        if killed(script, trial.job, operation=operation):
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
    """Be the child."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(ENDS_AFTER, exit=True)
    script = importlib.import_module(sys.argv[1])
    print("ready", flush=True)
    line = sys.stdin.readline()
    if not line:  # whoever started this is gone
        return
    job, operation = json.loads(line)
    with Operations(operation):
        script.work(**job)


if __name__ == "__main__":
    main()
