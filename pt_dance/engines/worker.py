"""What runs in a worker: one thing made at a time, and asked again and again."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pt_dance.storage.folders import inherited_lock


class WorkerTracebackError(Exception):
    """Where in a worker an error came from; the cause of that error in the process that asked."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class Workplace:
    """Keeps what the last task needed: an encoder, a range of an index, a pipeline."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._work: Any = None

    def do(self, key: str, get: Callable[[], Callable], numbers: tuple[int, ...], task: Any) -> Any:
        """Return the answer to a task.

        Args:
            key: Tells what is to be made from anything else.
            get: Gets the function that makes it; only called where it is not there yet.
            numbers: What that function is called with.
            task: What the made thing is called with.
        """
        if self._key != key:
            self.forget()  # what is no longer needed goes first: two encoders may not fit
            self._work = get()(*numbers)
            self._key = key
        return self._work(task)

    def answer(self, key: str, get: Callable[[], Callable], numbers: tuple[int, ...], task: Any) -> tuple[bool, Any]:
        """Return whether a task went well, and the answer or the :class:`Failure`; see :meth:`do`."""
        try:
            return True, self.do(key, get, numbers, task)
        except Exception as error:
            return False, Failure.of(error)

    def forget(self) -> None:
        """Free the memory of what the last task needed."""
        self._key = self._work = None


class Worker(Workplace):
    """A worker of Ray.

    Args:
        paths: Where the program that asks finds its modules; its functions may be in any of them.
    """

    def __init__(self, paths: list[str]) -> None:
        sys.path += [path for path in paths if path not in sys.path]
        super().__init__()

    def pid(self) -> int:
        """Return the number of this process."""
        return os.getpid()

    def run(self, key: str, sent: list, numbers: tuple[int, ...], task: Any) -> tuple[bool, Any]:
        """Return whether a task went well, and the answer or the error; see :meth:`Workplace.answer`.

        Args:
            key: Tells what is to be made from anything else.
            sent: A reference to the function that makes it; in a list, since Ray would resolve a bare one itself, and
                an error would not be caught here.
            numbers: What that function is called with.
            task: What the made thing is called with.
        """
        import ray

        return self.answer(key, lambda: ray.get(sent[0]), numbers, task)


class Placed:
    """Has a program on its machine, which ends with it.

    Args:
        paths: Where the program finds its modules.
    """

    def __init__(self, paths: list[str]) -> None:
        self._paths = paths
        self._program: subprocess.Popen | None = None

    def start(self, module: str, folder: str, given: bytes) -> None:
        """Start ``python -m MODULE PARENT FOLDER``.

        Args:
            module: Of the program, which has to end when PARENT does.
            folder: Has the file ``lock``, which the program holds, and what the program prints, ``MODULE.log``.
            given: Its standard input.

        Raises:
            BlockingIOError: If another program is at work in the folder and does not end.
        """
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, self._paths))}
        command = [sys.executable, "-m", module, str(os.getpid()), folder]
        name = module.rpartition(".")[2]
        busy = f"another program is at work in {folder!r}: end what it belongs to"
        with (
            inherited_lock(Path(folder, "lock"), busy) as lock, open(f"{folder}/{name}.log", "w") as log,
            tempfile.TemporaryFile() as file,
        ):  # fmt: skip
            file.write(given)
            file.seek(0)
            self._program = subprocess.Popen(
                command, stdin=file, stdout=log, stderr=log, env=environment, pass_fds=lock
            )

    def poll(self) -> int | None:
        """Return the status with which the program ended, None while it works."""
        return None if self._program is None else self._program.poll()

    def end(self) -> None:
        """End the program."""
        if self._program is not None:
            end(self._program)


def end(program: subprocess.Popen) -> None:
    """End a program, with patience at first."""
    program.terminate()
    try:
        program.wait(10)
    except subprocess.TimeoutExpired:
        program.kill()
        program.wait()


class Failure:
    """An error on its way to another process: pickling it alone would lose where it came from."""

    def __init__(self, error: Exception, came_from: str) -> None:
        self.error, self.came_from = error, came_from

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Return an error that can be sent, with its traceback as its cause."""
        came_from = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        try:
            pickle.loads(pickle.dumps(error))  # our own, made a line before
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        error.__traceback__ = None
        return cls(error, came_from)

    def original(self) -> Exception:
        """Return the error, caused by its traceback in the worker."""
        self.error.__cause__ = WorkerTracebackError(self.came_from)
        return self.error
