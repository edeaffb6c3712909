"""Several processes that call the same ``fit``, as ``torchrun`` starts them: who works, who waits, and who failed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from sentence_transformers import SentenceTransformer

from pt_dance.engines.ranks import Ranks, serve
from pt_dance.engines.worker import Workplace
from pt_dance.storage.writing import number_of_processes

# Mining and indexing may take days, during which the other processes wait.
_LONGEST_WAIT = timedelta(days=30)
# What tells torch.distributed's errors from others: most of them are plain RuntimeErrors.
_SAID = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


class _Roll:
    """Tells whether the processes of the job are there, by connections that each keeps as long as it lives.

    New connections to one that is gone would be waited for, as it may only be late.
    """

    def __init__(self) -> None:
        self._world: Any = None
        self._group: Any = None

    def call(self) -> None:
        """Wait until all are here.

        Raises:
            RuntimeError: If one of them is gone, now or at an earlier call.
        """
        if self._world is not dist.group.WORLD:
            self._world, self._group = dist.group.WORLD, dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
        if self._group is None:
            raise dist.DistError("a process was gone already")
        try:
            dist.barrier(group=self._group)
        except RuntimeError:
            group, self._group = self._group, None
            dist.destroy_process_group(group)  # so that those hear of it who wait for this one
            raise


_roll = _Roll()


class Processes:
    """The processes of a job; with one, nothing is sent and nobody waits.

    The first one alone writes what a run keeps. The others wait for it, however long it takes, and then read. While
    they wait they do their share of what it gives to its ``engine``. What is decided is sent as JSON.

    Args:
        on_cpu: Whether training is on a CPU.

    Attributes:
        count: How many processes there are.
        is_first: Whether this is the one that writes.
        engine: Of the first one: all of them as workers. None in the others, and where there are no others.
    """

    def __init__(self, *, on_cpu: bool):
        self.count = number_of_processes()
        self.is_first = True
        self.engine: Ranks | None = None
        self._group: Any = None
        self._place = Workplace()
        if self.count > 1:
            PartialState(cpu=on_cpu, timeout=_LONGEST_WAIT)
            with self.together():
                _roll.call()
                # the default group may be one of GPUs, which waiting would keep busy, or made by the user's script
                self._group = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
            self.is_first = dist.get_rank() == 0
            if self.is_first:
                self.engine = Ranks(self.count, "cpu" if on_cpu else None, self._give_work, self._collect)

    def check_same(self, settings: dict[str, object]) -> None:
        """Refuse to train where the processes were not given the same.

        Args:
            settings: What the fit depends on, as JSON values.

        Raises:
            ValueError: In all of the processes; says what differs where it is known.
        """
        if self.count == 1:
            return
        firsts = self._broadcast(settings)
        differing = [name for name in settings if settings[name] != firsts.get(name)]
        wrong = torch.tensor(len(differing))
        with self.together():
            dist.all_reduce(wrong, dist.ReduceOp.MAX, group=self._group)
        if wrong:
            names = f" ({', '.join(differing)})" if differing else ""
            raise ValueError(
                f"the {self.count} processes of the job call fit with different settings or data{names}; "
                "give all of them the same"
            )

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first process go through the block while the others wait; then they do, and find it done.

        Raises:
            RuntimeError: In the others, where the first one failed.
        """
        if not self.is_first:
            self._broadcast()
        try:
            yield
        except BaseException:
            if self.is_first:
                self._tell_failure()
            raise
        if self.is_first:
            self._broadcast(True)

    def from_first(self, work: Callable[[], Any]) -> Any:
        """Return what ``work`` gives in the first process, which alone calls it; JSON values.

        Raises:
            RuntimeError: In the others, where it failed.
        """
        if not self.is_first:
            return self._broadcast()
        try:
            value = work()
        except BaseException:
            self._tell_failure()
            raise
        return self._broadcast(value)

    def wait(self) -> None:
        """Wait until all processes have come to here.

        Raises:
            RuntimeError: Where one of them is gone.
        """
        if self.count > 1:
            with self.together():
                dist.barrier(group=self._group)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Do what takes all processes; where one of them is gone, say so in one sentence.

        Raises:
            RuntimeError: Where one of them is gone.
        """
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not _is_of_another(error):
                raise
            raise RuntimeError(
                f"one of the {self.count} processes of the job ended early (its own error, if any, says why), so that "
                "the others cannot go on; what was finished is kept, and the same call goes on from there"
            ) from None

    def close(self) -> None:
        """End the waiting for each other."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _tell_failure(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._send({"failed": True})

    def _broadcast(self, value: object = None) -> Any:
        """Send a value from the first process to the others; return it in all of them."""
        if self.count == 1:
            return value
        with self.together():
            message = self._send({"value": value})
            while "work" in message:  # the others alone hear of it
                self._collect(serve(self._place, dist.get_rank(), self._send_bytes(b"")))
                message = self._send({})
        self._place.forget()
        if self.engine is not None:
            self.engine.forget()
        if "failed" in message:
            raise RuntimeError(
                f"the first of the {self.count} processes of the job failed, for which the others waited; its own "
                "error says why"
            )
        return value if self.is_first else message["value"]

    def _send(self, message: dict) -> dict:
        if self.count == 1:
            return message
        if self.engine is not None:
            self.engine.settle()
        return json.loads(self._send_bytes(json.dumps(message).encode()))

    def _send_bytes(self, data: bytes) -> bytes:
        """Send bytes from the first process to the others; return them in all of them."""
        size = torch.tensor(len(data) if self.is_first else 0)
        dist.broadcast(size, 0, group=self._group)
        content = torch.frombuffer(bytearray(data if self.is_first else int(size)), dtype=torch.uint8)
        dist.broadcast(content, 0, group=self._group)
        return data if self.is_first else content.numpy().tobytes()

    def _give_work(self, data: bytes) -> None:
        with self.together():
            self._send({"work": True})
            self._send_bytes(data)

    def _collect(self, answer: bytes = b"") -> list[bytes]:
        """Bring bytes from the others to the first process; return them there."""
        answers: list = [b""] * self.count
        with self.together():
            dist.gather_object(answer, answers if self.is_first else None, group=self._group)
        return answers[1:]


def freeze_unused(model: SentenceTransformer) -> None:
    """Freeze the weights that no embedding depends on, such as a BERT's pooler, which get no gradient anyway.

    For other weights without a gradient, processes that train together would wait.

    Args:
        model: The model to be trained; its mode, gradients and the random numbers stay as they are.
    """
    was_training = model.training
    model.eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = torch.zeros((), device=model.device)
    for task in ("query", "document"):
        features = model.preprocess(["a text"], task=task)
        features = {name: v.to(model.device) if isinstance(v, torch.Tensor) else v for name, v in features.items()}
        total = total + model(features)["sentence_embedding"].sum()
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    model.train(was_training)


def _is_of_another(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in _SAID)
