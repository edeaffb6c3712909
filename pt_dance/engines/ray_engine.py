"""Ray: work on more processes, or more machines."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import dill
import torch

from pt_dance.engines.private_cluster import PrivateCluster
from pt_dance.engines.sending import dumps
from pt_dance.engines.worker import Placed, Worker
from pt_dance.storage import options
from pt_dance.storage.engine import WorkerDiedError

_RETRIES = 3  # of a task whose worker died
_RESTARTS = 100  # of a worker, over all tasks
_AHEAD = 4  # tasks that may be begun for each worker while an earlier one is not answered
_LOOK = 5.0  # seconds between two looks at whether the cluster lives
_SETTLED = 10.0  # seconds in which it is seen to be gone after its workers

_sending = threading.Lock()
_open: weakref.WeakSet[Ray] = weakref.WeakSet()


class Ray:
    """Workers of Ray (``pip install 'pt_dance[ray]'``) for encoding, search, mining and a teacher's scores.

    Bytes of an index, results and negatives are those of one process. The workers start when they are first needed, and
    are kept until :meth:`close`, or the end of a ``with`` block or of the program::

        with engines.Ray(workers=2) as engine:
            index = DenseIndex("runs/index", encoder).indexer(engine=engine).index(corpus)

    For small jobs one process is faster: a worker is a process that has to import everything first.

    Without an address a cluster of this program's own is started on this machine, with no dashboard. It listens on the
    machine's addresses, but answers nobody without the program's token, and it ends with the program, killed or not; a
    Ray that the program is connected to is used as it is. Work that was interrupted (a worker, Ray itself or the
    program was killed) is gone on with, by a restarted worker or by the same call. A task whose worker dies four times
    ends in an error that names it.

    Args:
        workers: How many processes work.
        cpus_per_worker: CPUs that Ray counts for each, and threads each takes where ``OMP_NUM_THREADS`` says nothing.
        gpus_per_worker: GPUs for each, or parts of one. A worker with a GPU encodes and searches there.
        address: Of a Ray cluster, see ``ray.init``; its machines must see corpora and indexes under the same paths and
            have pt_dance installed.

    Raises:
        ImportError: If Ray is not installed.
        ValueError: If a number makes no sense.
    """

    device: str | None = None  # a worker sees no GPU but its own

    def __init__(
        self, workers: int = 2, cpus_per_worker: int = 1, gpus_per_worker: float = 0, address: str | None = None
    ) -> None:
        self.workers = options.whole("workers", workers)
        self.cpus_per_worker = options.whole("cpus_per_worker", cpus_per_worker)
        self.gpus_per_worker = options.number("gpus_per_worker", gpus_per_worker, lowest=0)
        if address is not None and not isinstance(address, str):
            raise TypeError(f"address={address!r} must be the address of a Ray cluster, or None")
        self.address = address
        if importlib.util.find_spec("ray") is None:
            raise ImportError("engines.Ray needs Ray, which is not installed: pip install 'pt_dance[ray]'")
        self._actors: list[Any] = []
        self._searching: tuple[Any, str, Any] | None = None  # what the last broadcast was with, and as what it was sent
        self._cluster: PrivateCluster | None = None  # where it is this program's own
        self._stop: Callable[[], object] | None = None

    # --- its life -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the workers, and the cluster where it is this program's own; the next use starts them again."""
        self._actors, self._cluster, self._searching = [], None, None
        _open.discard(self)
        if self._stop is not None:
            stop, self._stop = self._stop, None
            stop()

    def __enter__(self) -> Ray:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Ray(workers={self.workers})"

    def __reduce__(self) -> tuple:
        # In a worker, what has an engine does its part itself.
        return type(None), ()

    def _started(self) -> list[Any]:
        """Return the workers, started if they are not there."""
        import ray

        if self._actors and self._alive():
            return self._actors
        self.close()
        if _open:
            raise ValueError(
                f"{next(iter(_open))!r} is open in this process already: use that one, or close() it first"
            )
        if not ray.is_initialized():
            if self.address is None:
                self._cluster = PrivateCluster.start(self.workers * self.cpus_per_worker)
            else:
                ray.init(address=self.address, log_to_driver=False)
            self._stop = weakref.finalize(self, ray.shutdown if self._cluster is None else self._cluster.stop)
        _open.add(self)
        there = ray.cluster_resources()
        for name, each in (("CPU", self.cpus_per_worker), ("GPU", self.gpus_per_worker)):
            if each * self.workers > there.get(name, 0):
                self.close()
                raise ValueError(
                    f"{self.workers} workers with {each:g} {name}s each do not fit in Ray's {there.get(name, 0):g} "
                    f"{name}s: take fewer"
                )
        remote = ray.remote(Worker).options(
            num_cpus=self.cpus_per_worker,
            num_gpus=self.gpus_per_worker,
            max_restarts=_RESTARTS,
            max_task_retries=_RETRIES,
            scheduling_strategy="SPREAD",
        )
        self._actors = [remote.remote(sys.path) for _ in range(self.workers)]
        return self._actors

    def _alive(self) -> bool:
        import ray

        return ray.is_initialized() and (self._cluster is None or self._cluster.alive())

    def place(self, module: str, folder: Path, given: bytes) -> PlacedProgram:
        """Start a program beside the workers, on a machine that has room for as much as a worker takes.

        Args:
            module: Of the program, see :meth:`pt_dance.engines.worker.Placed.start`.
            folder: That it works in.
            given: Its standard input.

        Raises:
            BlockingIOError: If another program is at work in the folder and does not end.
            ValueError: If there is no room.
        """
        import ray

        self._started()
        # in a cluster of its own Ray counts the workers' CPUs and no more
        each = (0, 0) if self._cluster is not None else (self.cpus_per_worker, self.gpus_per_worker)
        there = ray.cluster_resources()
        for name, count in zip(("CPU", "GPU"), each, strict=True):
            if count * (self.workers + 1) > there.get(name, 0):
                raise ValueError(
                    f"{self.workers} workers and one process beside them, with {count:g} {name}s each, do not fit in "
                    f"Ray's {there.get(name, 0):g} {name}s: take fewer"
                )
        actor: Any = ray.remote(Placed).options(num_cpus=each[0], num_gpus=each[1]).remote(sys.path)
        try:
            ray.get(actor.start.remote(module, str(folder), given))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        return PlacedProgram(actor)

    # --- its work -----------------------------------------------------------------------------------------------------

    def map(
        self, make: Callable[[], Callable[[Any], Any]], tasks: Iterable[Any], what: str
    ) -> Generator[Any, None, None]:
        """Yield the answer to every task, in order; see :class:`pt_dance.storage.engine.Engine`."""
        actors = self._started()
        key, sent = _send(make, what)
        free, ahead = list(actors), _AHEAD * len(actors)
        running: dict[Any, tuple[int, Any]] = {}
        answers: dict[int, Any] = {}
        left = enumerate(tasks)
        told = 0

        def ask() -> None:
            while free and len(running) + len(answers) < ahead and (numbered := next(left, None)) is not None:
                actor = free.pop()
                running[actor.run.remote(key, [sent], (), numbered[1])] = numbered[0], actor

        ask()
        while running:
            for reference in self._finished(running):
                number, actor = running.pop(reference)
                free.append(actor)
                answers[number] = self._answer(reference, what, number)
            # Nobody is idle while something is done with the answers.
            ask()
            while told in answers:
                yield answers.pop(told)
                told += 1
            ask()

    def broadcast(self, make: Callable[[int], Callable[[Any], Any]], tasks: Iterable[Any], what: str) -> Iterator[list]:
        """Yield for every task the answers of all workers; see :class:`pt_dance.storage.engine.Engine`."""
        actors = self._started()
        if self._searching is None or self._searching[0] is not make:
            self._searching = make, *_send(make, what)
        _, key, sent = self._searching
        numbered = enumerate(tasks)
        asked: list[tuple[int, list]] = []
        while True:
            # One ahead, which the workers begin with while the answers to the one before are put together.
            while len(asked) < 2 and (numbered_task := next(numbered, None)) is not None:
                number, task = numbered_task
                asked.append((number, [a.run.remote(f"{key} {n}", [sent], (n,), task) for n, a in enumerate(actors)]))
            if not asked:
                return
            number, references = asked.pop(0)
            waiting = dict.fromkeys(references)
            while waiting:
                for reference in self._finished(waiting):
                    del waiting[reference]
            yield [self._answer(reference, what, number) for reference in references]

    def _finished(self, running: Iterable[Any]) -> list[Any]:
        """Wait for some of the tasks and return those that are done."""
        import ray

        while True:
            done, _ = ray.wait(list(running), num_returns=1, timeout=_LOOK)
            if done:
                return done
            if not self._alive():
                self._end()

    def _answer(self, reference: Any, what: str, number: int) -> Any:
        """Return a task's answer, or raise its error."""
        import ray

        try:
            good, answer = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise RuntimeError(f"a worker could not be started for {what}: {error.cause}") from None
        except ray.exceptions.RayError:
            self._look_again()
            raise WorkerDiedError(
                f"a worker died {_RETRIES + 1} times at part {number} of the work with {what} (killed, out of memory, "
                "or crashed in a library); what was finished is kept"
            ) from None
        if not good:
            raise answer.original()
        return answer

    def _look_again(self) -> None:
        """Raise an error if a worker died with Ray itself, which is seen to be gone some moments after its workers."""
        patience = time.monotonic() + _SETTLED
        while time.monotonic() < patience:
            if not self._alive():
                self._end()
            time.sleep(0.1)

    def _end(self) -> NoReturn:
        self.close()
        raise RuntimeError(
            "Ray's own processes on this machine ended early (killed, or out of memory), so that its workers "
            "are gone; what was finished is kept, and the same call goes on from there"
        )


class PlacedProgram:
    """A program on some machine of a cluster."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def poll(self) -> int | None:
        """Return the status with which it ended, as if killed where its machine is gone; None while it works."""
        import ray

        try:
            return ray.get(self._actor.poll.remote())
        except ray.exceptions.RayError:
            return -signal.SIGKILL

    def end(self) -> None:
        """End it."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._actor.end.remote())
        ray.kill(self._actor)


def _send(make: Any, what: str) -> tuple[str, Any]:
    """Return a key for what is made, and a reference to what makes it, in Ray's memory."""
    import ray

    try:
        with _for_any_device():
            sent = ray.put(make)
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise TypeError(
            f"{what} cannot be sent to another process ({reason}): give "
            "pt_dance.engines.LazyPipeline(lambda: ...), whose function makes it there"
        ) from None
    return sent.hex(), sent


@contextlib.contextmanager
def _for_any_device() -> Iterator[None]:
    """Let models on a GPU go to the worker's own device: Ray's workers number their GPUs anew, and may have none."""
    import ray

    if not torch.cuda.is_available():
        yield
        return
    with _sending:  # for the whole process
        others = ray.cloudpickle.CloudPickler.dispatch.get(torch.Tensor)
        ray.util.register_serializer(torch.Tensor, serializer=dumps, deserializer=dill.loads)
        try:
            yield
        finally:
            ray.util.deregister_serializer(torch.Tensor)
            if others is not None:
                ray.cloudpickle.CloudPickler.dispatch[torch.Tensor] = others
