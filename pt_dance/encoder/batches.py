"""Fast encoding: batches of texts of like length, cut by a budget of tokens, tokenised while the model runs in threads.

Nothing here changes what a model computes: every text is tokenised once, exactly as ``SentenceTransformer`` would
tokenise it, and only the other texts of its batch differ.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Router
from torch import nn

from pt_dance.encoder.precision import ONEDNN, onednn_is_there, with_onednn
from pt_dance.encoder.reading import Reader, TransformerReader, prompt_for, reader_for
from pt_dance.storage.engine import in_order
from pt_dance.storage.texts import checked_texts

READ_AT_ONCE = 1024  # texts tokenised in one go: what waits in memory besides the batches in flight
_BUDGET, _BUDGET_ON_A_GPU = 1024, 65536
_BATCHES_AHEAD = 8
_ROWS_PER_COPY = 4096


def batches(reader: Reader, texts: list[str], budget: int, most: int) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """Cut texts into batches of like length, the longest first, so that too large a batch fails at once.

    A batch has at most ``budget`` tokens, padding included, unless it is of one text, and at most ``most`` texts.

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
        for rows in groups_of_like_length(tokens.lengths, budget, most):
            yield positions[rows], tokens.features(rows)


def groups_of_like_length(lengths: np.ndarray, budget: int, most: int) -> Iterator[np.ndarray]:
    """Cut texts of so many tokens into groups, the longest first.

    A group has at most ``budget`` tokens, padding included, unless it is of one text, and at most ``most`` texts.

    Yields:
        The positions of a group's texts.
    """
    by_length = np.argsort(-lengths, kind="stable")
    first = 0
    while first < len(by_length):
        size = max(1, min(most, budget // max(1, int(lengths[by_length[first]]))))
        yield by_length[first : first + size]
        first += size


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
    """Return vectors (rows, dim) float32 of one batch, on the model's device; gradients are kept where they are on."""
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


def dim_of(model: SentenceTransformer) -> int:
    """Return the length of a model's vectors; where it does not say, a text is encoded."""
    dim = model.get_embedding_dimension()
    if dim is None:
        with evaluating(model), torch.no_grad():
            dim = encode_with_gradients(model, ["dimension"], "document", 1).shape[1]
    return int(dim)


def encode_with_gradients(model: SentenceTransformer, texts: list[str], task: str, size: int) -> torch.Tensor:
    """Encode texts as sentence-transformers would, ``size`` at a time; a tensor (len(texts), dim) on its device."""
    if not texts:
        return torch.empty((0, dim_of(model)), device=model.device)
    prompt = prompt_for(model, task)
    blocks = (texts[start : start + size] for start in range(0, len(texts), size))
    return torch.cat([forward(model, model.preprocess(block, prompt=prompt, task=task), task) for block in blocks])


def encode(
    model: SentenceTransformer,
    texts: Sequence[str],
    task: str,
    *,
    dim: int,
    precision: str = "float32",
    budget: int | None = None,
    most: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Encode texts, leaving the model in the mode it was in.

    Args:
        model: A model that ends with a ``Normalize`` iff its similarity is cosine.
        texts: The texts.
        task: "query" or "document".
        dim: Length of the vectors.
        precision: One of :data:`pt_dance.encoder.precision.PRECISIONS`.
        budget: Tokens in a batch; 1,024 on a CPU and 65,536 elsewhere when ``None``.
        most: Texts in a batch at most.
        progress: Called with the number of texts done.

    Returns:
        Array (len(texts), dim), float32, in the order of ``texts``.
    """
    texts = list(texts)
    on_cpu = model.device.type == "cpu"
    budget = budget or (_BUDGET if on_cpu else _BUDGET_ON_A_GPU)
    vectors = np.empty((len(texts), dim), np.float32)
    reader = reader_for(model, task)
    tokens = sum(map(len, texts)) // 4  # a token is four characters or so
    many = tokens >= 2 * budget or len(texts) >= READ_AT_ONCE
    waiting: list[tuple[np.ndarray, torch.Tensor]] = []
    rows_per_copy = 1 if on_cpu else _ROWS_PER_COPY
    rows = 0

    def collect() -> None:
        # Copying vectors off a GPU waits for the work queued there, so it is done for many batches at once.
        if waiting:
            done = torch.cat([part for _, part in waiting]).cpu().numpy()
            vectors[np.concatenate([positions for positions, _ in waiting])] = done
            waiting.clear()

    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        # Laying weights out costs more than a few texts gain by it; either way products are made in float32.
        running = with_onednn(model) if precision == ONEDNN and many and onednn_is_there(model) else model

        def run(features: dict[str, Any]) -> torch.Tensor:
            with torch.no_grad():
                return forward(running, features, task, precision == "bfloat16")

        cut = batches(reader, texts, budget, most or READ_AT_ONCE)
        if many:
            cores = torch.get_num_threads()
            workers = cores if _may_share(model, reader) and tokens >= cores * budget else 1
            done = _in_threads(run, cut, workers, cores // workers)
        else:
            done = ((positions, run(features)) for positions, features in cut)
        for positions, part in stack.enter_context(contextlib.closing(done)):
            waiting.append((positions, part))
            rows += len(positions)
            if rows >= rows_per_copy:
                collect()
                rows = 0
            if progress is not None:
                progress(len(positions))
        collect()
    if precision == "bfloat16" and len(vectors) and isinstance(model[-1], Normalize):
        # Lengths computed in bfloat16 are off by up to 1e-3, which would pass for differences in score.
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors


def _may_share(model: SentenceTransformer, reader: Reader) -> bool:
    """Return whether several threads may run the model at once, each a batch of its own."""
    if model.device.type != "cpu" or not isinstance(reader, TransformerReader):
        return False
    # Recording hidden states is not safe between threads in every release of transformers.
    configs = (getattr(module, "config", None) for module in model.modules())
    return not any(getattr(config, "output_hidden_states", False) for config in configs)


def _in_threads(
    run: Callable[[dict[str, Any]], torch.Tensor],
    cut: Iterator[tuple[np.ndarray, dict[str, Any]]],
    workers: int,
    threads: int,
) -> Generator[tuple[np.ndarray, torch.Tensor], None, None]:
    """Run batches in threads of their own while the next ones are tokenised in this one; yields them in order.

    On a CPU a batch a core beats sharing every operation between the cores: no core waits for another after each of the
    hundreds of operations of a forward pass, and a batch stays in its core's cache.
    """
    threads_before = torch.get_num_threads()
    started = threading.Barrier(workers + 1)

    def start() -> None:
        torch.set_num_threads(threads)
        started.wait()

    pool = ThreadPoolExecutor(workers, "pt_dance-encoder", start)
    try:
        for _ in range(workers):
            pool.submit(int)
        started.wait()
        # The setting is each thread's own, but new threads begin with the one that was made last.
        torch.set_num_threads(threads_before)
        yield from in_order(pool, lambda batch: (batch[0], run(batch[1])), cut, _BATCHES_AHEAD + workers)
    finally:
        started.abort()
        pool.shutdown(cancel_futures=True)


def checked(texts: Iterable[str], task: str) -> list[str]:
    """Return the texts as a list, each of them a string.

    Raises:
        TypeError: If ``texts`` is one string, or a text is no string; names its position.
        ValueError: If a text is no valid Unicode; names its position.
    """
    if isinstance(texts, (str, bytes)):
        raise TypeError(f"texts are given as a list of strings, not as one {type(texts).__name__}")
    return checked_texts(texts, lambda position: f"the text of {task} number {position}")
