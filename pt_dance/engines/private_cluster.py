"""A Ray cluster of this program's own, on this machine: started quietly, gone with the program without a trace."""

from __future__ import annotations

import contextlib
import glob
import importlib
import logging
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pt_dance.engines import reaper
from pt_dance.storage.texts import first_line

try:
    import fcntl
except ImportError:  # Windows has no flock: folders of killed programs stay there
    fcntl = None  # type: ignore[assignment]

_PREFIX = "pt_dance-ray-"
_LOCK = "owner"
# Sockets lie in the folder, and their paths may not be longer than 107 bytes, 62 of which are Ray's.
_LONGEST = 107 - 62 - len(_PREFIX) - 10
_SERVERS = ("raylet", "gcs_server")
_SURROUNDINGS = {
    # Ray listens on the machine's addresses: nobody is heard without the token, which the program's own processes have.
    # Ray keeps it as long as the program runs, so that all of its clusters have the same.
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray ends a worker when memory runs out, and would try its task again without end.
    "RAY_task_oom_retries": "3",
    # Workers are as nice as the program, which waits for them; by default they are nicer than all else (15).
    "RAY_worker_niceness": "0",
}


class PrivateCluster:
    """Ray on this machine with a folder of its own; one a process.

    Args:
        cpus: How many CPUs Ray counts.
    """

    def __init__(self, cpus: int) -> None:
        import ray

        end_stale()
        base = tempfile.gettempdir()
        self.folder = tempfile.mkdtemp(prefix=_PREFIX, dir=base if len(base) <= _LONGEST else "/tmp")
        self._lock = _lock_new(self.folder)
        command = [sys.executable, "-I", "-S", reaper.__file__, self.folder, str(os.getpid())]
        # In a session of its own, so that Ctrl-C does not end it before its time.
        self._reaper = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
            start_new_session=True,
        )  # fmt: skip
        try:
            with _environment(_SURROUNDINGS):
                # Ray reads its surroundings once, which may have been before.
                importlib.import_module("ray._raylet").Config.initialize("")
                ray.init(
                    address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False,
                    configure_logging=False, logging_level=logging.ERROR, _temp_dir=self.folder,
                )  # fmt: skip
            _silence()
            self._servers = {
                pid: started
                for pid in reaper.processes_of(self.folder, os.getpid())
                if (status := reaper.status_of(pid)) is not None and status[0] in _SERVERS and (started := status[2])
            }
        except BaseException:
            self.stop()
            raise

    @classmethod
    def start(cls, cpus: int) -> PrivateCluster:
        """Start a cluster; again where Ray, which waits for itself half a minute, gave up on a busy machine.

        Raises:
            RuntimeError: If Ray cannot be started.
        """
        for tries_left in (2, 1, 0):
            try:
                return cls(cpus)
            except Exception as error:
                if not tries_left:
                    raise RuntimeError(
                        f"Ray could not be started on this machine ({first_line(error)}): try again when it is less "
                        "busy, or leave the engine out"
                    ) from error
        raise AssertionError  # for type checkers

    def alive(self) -> bool:
        """Return whether Ray's own processes are still there, as far as the system tells."""
        for pid, started in self._servers.items():
            status = reaper.status_of(pid)
            if status is None or status[1] == "Z" or status[2] != started:
                return False
        return True

    def stop(self) -> None:
        """End all processes and remove the folder; a second call does nothing."""
        import ray

        ray.shutdown()
        with contextlib.suppress(OSError):
            self._reaper.stdin.close()  # type: ignore[union-attr]
        self._reaper.wait()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def end_stale() -> None:
    """End what is left of the clusters of programs that are gone, should their reapers have been killed, too."""
    if fcntl is None:
        return
    for base in {tempfile.gettempdir(), "/tmp"}:
        for lock in glob.glob(f"{glob.escape(base)}/{_PREFIX}*/{_LOCK}"):
            with contextlib.suppress(OSError), open(lock, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                reaper.end(os.path.dirname(lock), os.getpid())


def _lock_new(folder: str) -> int | None:
    """Return an open file that tells others, by its lock, that a folder's program lives."""
    if fcntl is None:
        return None
    beside = Path(folder, f".{_LOCK}")
    file = os.open(beside, os.O_CREAT | os.O_RDONLY, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX)
    os.rename(beside, Path(folder, _LOCK))  # it is never seen without the lock
    return file


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _silence() -> None:
    """Keep Ray from printing pages of advice when a worker dies, which it does whatever ``log_to_driver`` says."""
    from ray._private import worker

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *_, **__: None
