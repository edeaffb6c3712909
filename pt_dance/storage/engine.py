"""What runs work elsewhere: an engine, as index, retrievers, mining and training see it; None is this process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, Protocol


class Engine(Protocol):
    """Workers that make something of their own and answer tasks with it; :class:`pt_dance.engines.Ray` is one.

    Attributes:
        workers: How many.
        device: Where they encode; a GPU where they have one, if None.
    """

    workers: int
    device: str | None

    def map(
        self, make: Callable[[], Callable[[Any], Any]], tasks: Iterable[Any], what: str
    ) -> Generator[Any, None, None]:
        """Yield the answer to every task, in order; any worker may get it.

        Args:
            make: Called once in each worker; gives what is called with the tasks.
            tasks: Read only a few ahead of the answers.
            what: What messages call that which is made.

        Raises:
            WorkerDiedError: If a worker died at the same task several times.
            TypeError: If ``make`` cannot be sent to another process.
            Exception: What a task raised.
        """

    def broadcast(self, make: Callable[[int], Callable[[Any], Any]], tasks: Iterable[Any], what: str) -> Iterator[list]:
        """Yield for every task the answers of all workers, to each of which ``make`` is given its number."""


class WorkerDiedError(RuntimeError):
    """A worker died at one task several times."""


def check_engine(engine: Any) -> Any:
    """Return an engine, or None for this process.

    Raises:
        TypeError: If it is something else.
    """
    if engine is not None and not (hasattr(engine, "map") and hasattr(engine, "broadcast")):
        raise TypeError(f"engine must be a pt_dance.engines.Ray, or None for this process, not {engine!r}")
    return engine


def run(engine: Engine | None, make: Callable[[], Callable[[Any], Any]], tasks: Iterable[Any], what: str) -> Iterator:
    """Yield the answer to every task, in order: by an engine's workers, or in this process."""
    if engine is not None:
        return engine.map(make, tasks, what)
    return map(make(), tasks)


def in_order(pool: Executor, function: Callable[[Any], Any], tasks: Iterable[Any], ahead: int) -> Generator:
    """Yield what a function returns for every task, in order, by a pool's workers that have ``ahead`` tasks at most."""
    running: deque[Future[Any]] = deque()
    try:
        for task in tasks:
            running.append(pool.submit(function, task))
            if len(running) >= ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()
