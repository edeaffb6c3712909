"""What runs in a worker: one thing made at a time, and asked again and again."""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from typing import Any


class WorkerTracebackError(Exception):
    """Where in a worker an error came from; the cause of that error in the process that asked."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class Worker:
    """Keeps what the last task needed: an encoder, a range of an index, a pipeline.

    Args:
        paths: Where the program that asks finds its modules; its functions may be in any of them.
    """

    def __init__(self, paths: list[str]) -> None:
        sys.path += [path for path in paths if path not in sys.path]
        self._key: str | None = None
        self._work: Any = None

    def pid(self) -> int:
        """Return the number of this process."""
        return os.getpid()

    def run(self, key: str, sent: list, numbers: tuple[int, ...], task: Any) -> tuple[bool, Any]:
        """Return whether a task went well, and the answer or the error.

        Args:
            key: Tells what is to be made from anything else.
            sent: A reference to the function that makes it; in a list, since Ray would resolve a bare one itself, and
                an error would not be caught here.
            numbers: What that function is called with.
            task: What the made thing is called with.
        """
        import ray

        try:
            if self._key != key:
                # What is no longer needed goes first: two encoders may not fit.
                self._key = self._work = None
                self._work = ray.get(sent[0])(*numbers)
                self._key = key
            return True, self._work(task)
        except Exception as error:
            return False, _portable(error)


def _portable(error: Exception) -> Failure:
    """Return an error that can be sent, with its traceback as its cause."""
    came_from = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        pickle.loads(pickle.dumps(error))  # our own, made a line before
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.__traceback__ = None
    return Failure(error, came_from)


class Failure:
    """An error on its way to another process: pickling it alone would lose where it came from."""

    def __init__(self, error: Exception, came_from: str) -> None:
        self.error, self.came_from = error, came_from

    def original(self) -> Exception:
        """Return the error, caused by its traceback in the worker."""
        self.error.__cause__ = WorkerTracebackError(self.came_from)
        return self.error
