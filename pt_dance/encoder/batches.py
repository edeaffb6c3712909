"""Fast encoding: batches of like length by token budget, tokenised in the background while the model runs.

Nothing here changes what a model computes: every text is tokenised once, exactly as ``SentenceTransformer`` would
tokenise it, and only the company it keeps in a batch differs.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Router
from torch import nn

from pt_dance.encoder.packed import packed
from pt_dance.encoder.reading import Reader, TransformerReader, reader_for
from pt_dance.storage.texts import lone_surrogate

READ_AT_ONCE = 1024
"""Texts tokenised in one go: what waits in memory besides the batches in flight."""

_BATCHES_AHEAD = 8
_ROWS_PER_COPY = 4096


def batches(reader: Reader, texts: list[str], budget: int, most: int) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Cut texts into batches of like length.

    Args:
        reader: How to tokenise.
        texts: All texts that are there; the longest come first, so that too large a batch fails at once.
        budget: Tokens in a batch, padding included; a longer text has a batch to itself.
        most: Texts in a batch at most.

    Yields:
        The positions of a batch's texts, and the model's input for them.
    """
    order = np.argsort(np.fromiter((-len(text) for text in texts), np.int64, len(texts)), kind="stable")
    for start in range(0, len(order), READ_AT_ONCE):
        positions = order[start : start + READ_AT_ONCE]
        tokens = reader.read([texts[position] for position in positions])
        if reader.bags:
            for first in range(0, len(positions), most):
                rows = np.arange(first, min(first + most, len(positions)))
                yield positions[rows], tokens.features(rows)
            continue
        by_length = np.argsort(-tokens.lengths, kind="stable")
        first = 0
        while first < len(by_length):
            size = max(1, min(most, budget // max(1, int(tokens.lengths[by_length[first]]))))
            rows = by_length[first : first + size]
            yield positions[rows], tokens.features(rows)
            first += size


class Ahead:
    """Iterates over ``items`` in a thread of its own, a few items ahead of its readers, who may be several threads."""

    def __init__(self, items: Iterable, size: int):
        self._queue: queue.Queue = queue.Queue(size)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(items,), daemon=True, name="pt_dance-tokenizer")

    def _fill(self, items: Iterable) -> None:
        try:
            for item in items:
                if not self._put(("item", item)):
                    return
            self._put(("end", None))
        except BaseException as error:  # it is raised again where the items are read
            self._put(("error", error))

    def _put(self, message: tuple[str, Any]) -> bool:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(message, timeout=0.1)
                return True
        return False

    def __enter__(self) -> Ahead:
        self._thread.start()
        return self

    def __iter__(self) -> Iterator:
        while not self._stopped.is_set():
            try:
                kind, value = self._queue.get(timeout=0.1)
            except queue.Empty:
                continue
            if kind == "item":
                yield value
                continue
            self._put((kind, value))  # for the other readers
            if kind == "error":
                raise value
            return

    def stop(self) -> None:
        """Let the readers and the thread come to an end."""
        self._stopped.set()

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode and afterwards every module back in the mode it was found in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def forward(model: SentenceTransformer, features: dict[str, Any], task: str, bfloat16: bool = False) -> torch.Tensor:
    """Vectors (rows, dim) float32 of one batch, on the model's device; gradients are kept where they are on."""
    device = model.device
    features = {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in features.items()
    }
    if isinstance(model[0], Router):
        features |= {"task": task, "modality": "text"}
    with torch.autocast(device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext():
        vectors = model(features, task=task)["sentence_embedding"]
    if model.truncate_dim is not None:
        vectors = vectors[..., : model.truncate_dim]
    return vectors.float()


def encode(
    model: SentenceTransformer,
    texts: Sequence[str],
    task: str,
    *,
    dim: int,
    budget: int,
    most: int | None = None,
    bfloat16: bool = False,
    pack: bool = False,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Encode texts, leaving the model in the mode it was in.

    Args:
        model: A model that ends with a ``Normalize`` iff its similarity is cosine.
        texts: The texts.
        task: "query" or "document".
        dim: Length of the vectors.
        budget: Tokens in a batch.
        most: Texts in a batch at most.
        bfloat16: Whether the model runs under bfloat16 autocast.
        pack: Whether linear layers multiply with oneDNN, see :mod:`pt_dance.encoder.packed`; on a CPU.
        progress: Called with the number of texts done.

    Returns:
        Array (len(texts), dim), float32, in the order of ``texts``.
    """
    texts = list(texts)
    vectors = np.empty((len(texts), dim), np.float32)
    reader = reader_for(model, task)
    workers = _workers(model, reader, texts, budget)
    cut = batches(reader, texts, budget, most or READ_AT_ONCE)
    if model.device.type == "cuda":
        cut = ((positions, {k: _pinned(v) for k, v in features.items()}) for positions, features in cut)
    run = _in_parallel if workers > 1 else _in_turn
    with (
        evaluating(model),
        packed(model, pack),
        Ahead(cut, _BATCHES_AHEAD + workers) as ready,
        contextlib.closing(run(model, ready, task, bfloat16, vectors, workers)) as running,
    ):
        for done in running:
            if progress is not None:
                progress(done)
    if bfloat16 and len(vectors) and isinstance(model[-1], Normalize):
        # Lengths computed in bfloat16 are off by up to 1e-3, which would pass for differences in score.
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors


def _workers(model: SentenceTransformer, reader: Reader, texts: list[str], budget: int) -> int:
    """How many batches to run at once."""
    if model.device.type != "cpu" or not isinstance(reader, TransformerReader):
        return 1
    if any(getattr(getattr(module, "config", None), "output_hidden_states", False) for module in model.modules()):
        return 1  # recording them is not safe between threads in every release of transformers
    # A token is four characters or so; with less than a batch each, threads had better share a batch.
    threads = torch.get_num_threads()
    return threads if sum(map(len, texts)) // 4 >= threads * budget else 1


def _pinned(value: Any) -> Any:
    return value.pin_memory() if isinstance(value, torch.Tensor) else value


def _in_turn(
    model: SentenceTransformer, ready: Ahead, task: str, bfloat16: bool, vectors: np.ndarray, workers: int
) -> Iterator[int]:
    """One batch after the other; yields how many texts are done."""
    waiting: list[tuple[np.ndarray, torch.Tensor]] = []
    rows = 0
    # Copying vectors off a GPU waits for the work queued there, so it is done for many batches at once.
    rows_per_copy = 1 if model.device.type == "cpu" else _ROWS_PER_COPY

    def collect() -> None:
        if waiting:
            done = torch.cat([part for _, part in waiting]).cpu().numpy()
            vectors[np.concatenate([positions for positions, _ in waiting])] = done
            waiting.clear()

    for positions, features in ready:
        with torch.no_grad():
            waiting.append((positions, forward(model, features, task, bfloat16)))
        rows += len(positions)
        if rows >= rows_per_copy:
            collect()
            rows = 0
        yield len(positions)
    collect()


def _in_parallel(
    model: SentenceTransformer, ready: Ahead, task: str, bfloat16: bool, vectors: np.ndarray, workers: int
) -> Iterator[int]:
    """A batch for every core; yields how many texts are done.

    On a CPU this beats sharing every operation between the cores: no core waits for another after each of the hundreds
    of operations of a forward pass, and a batch stays in its core's cache.
    """
    results: queue.SimpleQueue = queue.SimpleQueue()
    threads_before = torch.get_num_threads()
    started = threading.Barrier(workers + 1)

    def work() -> None:
        try:
            torch.set_num_threads(1)
            started.wait()
            with torch.no_grad():
                for positions, features in ready:
                    vectors[positions] = forward(model, features, task, bfloat16).numpy()
                    results.put(len(positions))
            results.put(None)
        except BaseException as error:  # it is raised again in the thread that asked
            results.put(error)

    threads = [threading.Thread(target=work, daemon=True, name="pt_dance-encoder") for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        started.wait()
        # The setting is each thread's own, but new threads begin with the one that was made last.
        torch.set_num_threads(threads_before)
        at_work = workers
        while at_work:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            if result is None:
                at_work -= 1
            else:
                yield result
    finally:
        ready.stop()
        for thread in threads:
            thread.join()


def checked(texts: Iterable[str], task: str) -> list[str]:
    """The texts as a list, each of them a string.

    Raises:
        TypeError: If ``texts`` is one string, or a text is no string; names its position.
        ValueError: If a text is no valid Unicode; names its position.
    """
    if isinstance(texts, (str, bytes)):
        raise TypeError(f"Texts are given as a list of strings, not as one {type(texts).__name__}.")
    kind = "query" if task == "query" else "document"
    texts = list(texts)
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"The text of {kind} number {position} is {text!r}, not a string; give it a text or drop it."
            )
        if (place := lone_surrogate(text)) is not None:
            raise ValueError(
                f"The text of {kind} number {position} is no valid Unicode (a lone surrogate at character {place}); "
                "clean it or drop it."
            )
    return texts
