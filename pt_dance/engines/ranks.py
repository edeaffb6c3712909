"""The processes of one job, as ``torchrun`` starts them, as workers: the first one leads, and each does its share.

Nothing is scheduled: of each block of as many tasks as there are processes, every process has the one with its number.
"""

from __future__ import annotations

import functools
import itertools
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import dill

from pt_dance.engines.sending import dumps
from pt_dance.engines.worker import Failure, Workplace


@dataclass
class _Work:
    """What is made in every process, and is called with the tasks.

    Attributes:
        key: Tells it from anything else.
        make: The function that makes it.
        is_numbered: Whether that is called with the number of its process.
        sent: The same function, as bytes.
    """

    key: str
    make: Callable
    is_numbered: bool
    sent: bytes


class Ranks:
    """The processes of a job as an engine, in the first of them; the others :func:`serve`.

    Each of them gets what makes the work, as a worker of :class:`pt_dance.engines.Ray` does. What cannot be sent, such
    as a pipeline of Java objects, works in the first process alone.

    Args:
        workers: How many processes there are, this one among them.
        device: Where they encode; each on its own GPU if there are any, where None.
        tell: Sends bytes to all others.
        collect: Waits for bytes from each of the others, in their order.
    """

    def __init__(
        self, workers: int, device: str | None, tell: Callable[[bytes], None], collect: Callable[[], list[bytes]]
    ) -> None:
        self.workers, self.device = workers, device
        self._tell, self._collect = tell, collect
        self._place = Workplace()
        self._keys = map(str, itertools.count())
        self._there: str | None = None  # the key of what the others have
        self._searching: _Work | None = None  # what the last broadcast was with
        self._asked: Callable[[], list[bytes]] | None = None  # waits, once, for what the others answer

    def map(
        self, make: Callable[[], Callable[[Any], Any]], tasks: Iterable[Any], what: str
    ) -> Generator[Any, None, None]:
        """Yield the answer to every task, in order; see :class:`pt_dance.storage.engine.Engine`."""
        try:
            work = _Work(next(self._keys), make, False, dumps(make))
        except Exception:  # whatever an object of the user's says
            yield from map(make(), tasks)
            return
        left = iter(tasks)
        for answers in self._blocks(work, iter(lambda: list(itertools.islice(left, self.workers)), [])):
            yield from answers

    def broadcast(self, make: Callable[[int], Callable[[Any], Any]], tasks: Iterable[Any], what: str) -> Iterator[list]:
        """Yield for every task the answers of all processes; see :class:`pt_dance.storage.engine.Engine`."""
        if self._searching is None or self._searching.make is not make:
            self._searching = _Work(next(self._keys), make, True, dumps(make))
        return self._blocks(self._searching, ([task] * self.workers for task in tasks))

    def _blocks(self, work: _Work, blocks: Iterator[list]) -> Iterator[list]:
        answers: list = []
        for block in blocks:
            others = self._ask(work, block[1:])
            if answers:
                yield answers  # meanwhile the others have begun with the next block
            answers = [self._place.do(work.key, lambda: work.make, (0,) if work.is_numbered else (), block[0])]
            answers += map(_opened, others())
        if answers:
            yield answers

    def _ask(self, work: _Work, tasks: list) -> Callable[[], list[bytes]]:
        self.settle()
        self._tell(dill.dumps((work.key, b"" if work.key == self._there else work.sent, work.is_numbered, tasks)))
        self._there = work.key
        self._asked = functools.cache(lambda: self._collect()[: len(tasks)])
        return self._asked

    def settle(self) -> None:
        """Wait for what was asked and not answered: until then the others hear nothing else."""
        if self._asked is not None:
            asked, self._asked = self._asked, None
            asked()

    def forget(self) -> None:
        """Free the memory of what was last made, which the others do, too."""
        self._there = self._searching = self._asked = None
        self._place.forget()


def serve(place: Workplace, number: int, asked: bytes) -> bytes:
    """Answer the first process in another one.

    Args:
        place: Of this process.
        number: Of this process, from 1.
        asked: What the first process told.

    Returns:
        What it collects.
    """
    key, sent, is_numbered, tasks = dill.loads(asked)
    if number > len(tasks):
        return b""
    answered = place.answer(key, lambda: dill.loads(sent), (number,) if is_numbered else (), tasks[number - 1])
    try:
        return pickle.dumps(answered)
    except Exception as error:
        return pickle.dumps((False, Failure.of(error)))


def _opened(answered: bytes) -> Any:
    good, answer = pickle.loads(answered)  # by another process of this job
    if not good:
        raise answer.original()
    return answer
