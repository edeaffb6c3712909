"""The trainer's side of refreshing negatives while training goes on."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import TrainerCallback

from pt_dance.engines.sending import dump
from pt_dance.engines.worker import end
from pt_dance.index.dense_index import DenseIndex
from pt_dance.storage.folders import inherited_lock
from pt_dance.storage.texts import first_line
from pt_dance.training import checkpoints
from pt_dance.training.processes import Processes
from pt_dance.training.refresh import refresher
from pt_dance.training.refresh.journal import Journal, Switch
from pt_dance.training.refresh.refresher import Work
from pt_dance.training.refresh.tables import Exchange
from pt_dance.training.run_folder import EXCHANGE, JOURNAL
from pt_dance.training.schedule import Span

_PAUSE = 0.02  # seconds between two looks at the folder
_KEPT = "what was finished is kept, and the same call goes on from there"
# By what torchrun tells a process which one of a job it is; the refresher is none.
_OF_A_JOB = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Refreshes(TrainerCallback):
    """The tables of negatives that a round learns from, one after the other, and the process that makes them.

    Every ``refresh_every`` steps the trainer hands over its weights. The refresher takes the newest, encodes the
    corpus, mines and publishes a table; meanwhile training goes on with the table before. Each batch that is made
    asks which table it has: the newest that is there. A change of tables is in the journal, on the disk, before the
    batch is used; a fit that goes on after an interruption, or that replays another one, follows the journal. Where
    the weights that a table was mined with are more than ``max_staleness`` steps old and newer ones were handed over,
    the batch waits for these.

    With several processes the first one decides, and the others are told, batch by batch.

    Args:
        folder: Of the round.
        round_: ``Round``.
        span: Its steps.
        processes: Those that train together.
        replayed: The journal of the run that is repeated, None where the tables decide.
        place: Starts the refresher elsewhere, as :meth:`pt_dance.engines.Ray.place` does; on this machine where None.
        measure: Measures the index of the weights that a table is mined with, see
            :func:`~pt_dance.training.validation.measure_index`; None measures nothing.

    Attributes:
        exchange: Where weights and tables are.
        journal: Of this round.
        measure: As given.
        work: What the refresher does; set before training begins.
    """

    work: Work

    def __init__(
        self, folder: Path, round_: Any, span: Span, processes: Processes, replayed: Journal | None = None,
        place: Callable[[str, Path, bytes], Any] | None = None,
        measure: Callable[[DenseIndex], dict[str, float]] | None = None,
    ):  # fmt: skip
        self.exchange = Exchange(folder / EXCHANGE)
        self.journal = Journal(folder / JOURNAL)
        self.every: int = round_.refresh_every
        self.longest: int = round_.max_staleness or 4 * self.every
        self.batches_per_step = int(round_.training_arguments.get("gradient_accumulation_steps", 1))
        self._span = span
        self._checkpoints = folder / "checkpoints"
        self._name = f"round {int(folder.name)}"
        self._processes = processes
        self._replayed = replayed
        self._left_out = 0
        self._handed_over = 0
        self._place = place
        self.measure = measure
        self._process: Any = None

    @property
    def replays(self) -> bool:
        """Whether the journal of another run is followed."""
        return self._replayed is not None

    def read(self, version: int) -> dict[str, Any]:
        """Return the arrays of a version, see :meth:`Exchange.read`: it is named by its step in units of ``every``."""
        return self.exchange.read(version * self.every)

    def report(self) -> dict[str, Any]:
        """Return what the history tells, see :meth:`Journal.report`."""
        return self.journal.report(self._span.steps, self.batches_per_step)

    # ------------------------------------------------------------------ while training goes on

    @contextlib.contextmanager
    def beside(self, done: int) -> Iterator[None]:
        """Have a refresher while the block is trained in; it is gone when the block ends.

        Args:
            done: Steps of the round that are trained already.

        Raises:
            BlockingIOError: If another refresher is at work in the folder and does not end.
            ValueError: If the sources, filters or teacher cannot be handed to another process.
        """
        self._left_out = done * self.batches_per_step
        if not self._processes.is_first:
            yield
            return
        self.exchange.folder.mkdir(parents=True, exist_ok=True)
        with _written(self.work, self._name) as given:
            busy = f"another refresher is at work in {str(self.exchange.folder)!r}: end the fit it belongs to"
            with inherited_lock(self.exchange.folder / "lock", busy) as lock:
                self._recover(done)
                if self._place is None:
                    process = _started(self.exchange.folder, given, lock)
                    self._process = SimpleNamespace(poll=process.poll, end=partial(end, process))
            if self._place is not None:
                self._process = self._place(refresher.__name__, self.exchange.folder, given.read())
        try:
            yield
        finally:
            self._process.end()
            self._process = None

    def version(self, batch: int) -> int:
        """Return which version of the negatives a batch learns from, by its number in the round.

        Raises:
            RuntimeError: If the refresher ended.
        """
        if batch < self._left_out:  # trained already
            return 0
        return self._processes.from_first(partial(self._decide, batch)) // self.every

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Hand the weights over if it is time; the trainer calls this."""
        self.after_step(state.global_step - self._span.first_step, model)

    def after_step(self, step: int, model: torch.nn.Module) -> None:
        """Hand the weights over if it is time.

        Args:
            step: Steps of the round that are taken.
            model: With the weights.
        """
        if not self._processes.is_first or step % self.every or step >= self._span.steps:
            return
        if self._replayed is not None:
            is_wanted = step in {switch.step for switch in self._replayed.switches}
        else:
            is_wanted = step > self.journal.last.step  # what was used after an earlier start is there
        if is_wanted and step not in self.exchange.tables():
            older = self.exchange.weights()
            self.exchange.hand_over(step, model)
            if self._replayed is None:
                self.exchange.withdraw(older)
            self._handed_over = step
        self._tidy()

    def _decide(self, batch: int) -> int:
        """Return the step of the weights that a batch's negatives were mined with; a change is journalled before."""
        current = self.journal.step_at(batch)
        if batch <= self.journal.last.batch:
            return current
        self._check()
        started = time.perf_counter()
        if self._replayed is not None:
            newest = self._replayed.step_at(batch)
            while newest != current and newest not in self.exchange.tables():
                self._pause()
        else:
            step = batch // self.batches_per_step
            while (newest := max([current, *self.exchange.tables()])) < min(self._handed_over, step - self.longest):
                self._pause()
        if newest != current:
            waited = time.perf_counter() - started
            about = self.exchange.about(newest)
            self.journal.add(Switch(batch, newest, about["seconds"], waited, about.get("measured", {})))
        return newest

    def _pause(self) -> None:
        self._check()
        time.sleep(_PAUSE)

    def _check(self) -> None:
        status = None if self._process is None else self._process.poll()
        if status is None:
            return
        said = self.exchange.failure()
        if said is None:
            said = f"it was ended by signal {-status}" if status < 0 else f"it ended with status {status}"
        log = self.exchange.folder / "refresher.log"
        raise RuntimeError(f"the refresher beside {self._name} failed: {said} (see {str(log)!r}); {_KEPT}")

    # ------------------------------------------------------------------ what is left on the disk

    def _recover(self, done: int) -> None:
        """Keep of an earlier start what belongs to the steps that are trained, and what the journal names."""
        exchange = self.exchange
        exchange.forget_failure()
        exchange.put_back()
        named = {switch.step for switch in self.journal.switches}
        exchange.drop([step for step in exchange.tables() if step > done and step not in named])
        there = exchange.tables()
        exchange.withdraw([step for step in exchange.weights() if step > done or step in there])
        if self._replayed is None:
            exchange.withdraw(exchange.weights()[:-1])
        self._handed_over = max([0, *exchange.weights()])

    def _tidy(self) -> None:
        """Remove tables that no batch needs again, also if training is killed now."""
        if (checkpoint := checkpoints.newest(self._checkpoints)) is None:
            return
        again = (checkpoints.step_of(checkpoint) - self._span.first_step) * self.batches_per_step
        first = self.journal.step_at(again)
        self.exchange.drop([step for step in self.exchange.tables() if step < first])


@contextlib.contextmanager
def _written(work: Work, name: str) -> Iterator[Any]:
    """Give a file without a name with what a refresher is to do."""
    with tempfile.TemporaryFile() as file:
        try:
            dump(work, file)
        except Exception as error:  # whatever an object of the user's says
            raise ValueError(
                f"the sources, filters, teacher or measures of {name} cannot be handed to the refresher, a process of "
                f"its own ({first_line(error)}); make what cannot inside a function of the dense retriever, or refresh "
                "between rounds"
            ) from None
        file.seek(0)
        yield file


def _started(folder: Path, given: Any, lock: list[int]) -> subprocess.Popen:
    command = [sys.executable, "-m", "pt_dance.training.refresh.refresher", str(os.getpid()), str(folder)]
    with open(folder / "refresher.log", "w") as log:
        return subprocess.Popen(command, stdin=given, stdout=log, stderr=log, env=surroundings(), pass_fds=lock)


def surroundings() -> dict[str, str]:
    """Return the environment of a refresher: the cores, and the GPU if there is one, that training leaves."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_A_JOB and not name.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_"))
    }
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of the job's processes, as torchrun says
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores - here * torch.get_num_threads()))
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    if (gpus := torch.cuda.device_count()) > here:
        # the only one that it sees, which is where an encoder goes that was on a GPU
        environment["CUDA_VISIBLE_DEVICES"] = (os.environ.get("CUDA_VISIBLE_DEVICES") or str(gpus - 1)).split(",")[-1]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return environment
