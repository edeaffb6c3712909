"""A first look at products in bfloat16, which some CPUs multiply four times as fast as float32.

It only says which pairs *may* reach a threshold, by a bound that holds for every vector, so that the results of
exact search stay the same to the bit. A short timed probe decides whether it pays on this machine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from threadpoolctl import ThreadpoolController

# Smaller blocks wait for memory, not for products.
LEAST_QUERIES = 32
_PAYS_FROM = 1.5
HALF_ULP = 2.0**-8  # relative rounding error of bfloat16
_lock = threading.Lock()
_decided: bool | None = None


class Prefilter:
    """Queries in bfloat16, to be multiplied with blocks of documents.

    Args:
        queries: ``float32`` (q, d).
        norms: Their lengths, (q,).
    """

    def __init__(self, queries: np.ndarray, norms: np.ndarray) -> None:
        self._norms = norms
        self._half = torch.from_numpy(queries).bfloat16()
        self._rounding = _lengths(queries - self._half.float().numpy())
        self._room: torch.Tensor | None = None
        self._passed: np.ndarray | None = None

    def error(self, norm: float, rounding: float, dimension: int) -> np.ndarray:
        """Return how far a sum of products can be from the exact product, before its own rounding, ``float64`` (q,).

        With ``q = q' + r`` and ``d = d' + s`` (rounded plus rest), ``q.d - q'.d' = r.d + q'.s``, at most ``|r||d| +
        |q'||s|``; the sum in float32 adds its own error.

        Args:
            norm: Upper bound of the documents' lengths.
            rounding: Upper bound of what their rounding to bfloat16 changes, as a length.
            dimension: Numbers in a vector.
        """
        error = self._rounding * norm + self._norms * rounding * 1.01
        error += (2 * dimension + 16) * 2.0**-24 * self._norms * norm * 1.02
        # Numbers too small for bfloat16's products to see.
        return error + 2e-38 * dimension * (self._norms + norm) + 1e-35

    def passing(
        self, docs: np.ndarray, threshold: np.ndarray, products: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Return which products of queries and documents, in bfloat16, reach a query's threshold.

        Args:
            docs: ``float32`` (n, d).
            threshold: ``float32`` (q,). Rounding is monotone, so sums that reach it do so after rounding, too.
            products: What :meth:`products` gave for these documents, if it was asked last.

        Returns:
            Flat positions in (q, n), ``int64``, and their products, ``float32``; None if this look would not help.
        """
        if not (threshold > 0).all():
            return None
        found = self.products(docs) if products is None else products
        # Positive numbers are ordered as their bits are, and cutting bits off rounds them down.
        least = (threshold.view(np.int32) >> 16).astype(np.int16)
        passed = self._passed[: found.size].reshape(found.shape)
        np.greater_equal(found, least[:, None], out=passed)
        at = np.flatnonzero(passed)
        if len(at) > passed.size // 8:
            return None
        return at, _as_float32(found.reshape(-1)[at])

    def products(self, docs: np.ndarray) -> np.ndarray:
        """Return the bits of the products of queries and documents in bfloat16.

        Args:
            docs: ``float32`` (n, d).

        Returns:
            ``int16`` (q, n), in memory that the next call writes to again.
        """
        shape = len(self._half), len(docs)
        if self._room is None or self._room.numel() < shape[0] * shape[1]:
            self._room = torch.empty(shape[0] * shape[1], dtype=torch.bfloat16)
            self._passed = np.empty(shape[0] * shape[1], dtype=bool)
        products = self._room[: shape[0] * shape[1]].view(shape)
        torch.mm(self._half, _tensor(docs).bfloat16().T, out=products)
        return products.view(torch.int16).numpy()


def kth_largest(products: np.ndarray, k: int) -> np.ndarray:
    """Return the k-th largest product of each query, ``float32`` (q,), right where it is positive.

    Args:
        products: As :meth:`Prefilter.products` gives them, (q, n).
        k: 1 to n.
    """
    # As whole numbers, the bits of negative products are in the wrong order, but below those of all others.
    place = products.shape[1] - k
    return _as_float32(np.partition(products, place, axis=1)[:, place])


def rounding(docs: np.ndarray) -> float:
    """Return an upper bound of what rounding the vectors of a block to bfloat16 changes, as a length."""
    largest = 0.0
    for start in range(0, len(docs), 256):  # pieces that stay in a core's cache
        part = docs[start : start + 256]
        largest = max(largest, _lengths(part - _tensor(part).bfloat16().float().numpy()).max())
    return float(largest)


def _as_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.int32) << 16).view(np.float32)


def _lengths(rows: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("ij,ij->i", rows, rows).astype(np.float64)) * (1 + 2 * rows.shape[1] * 2.0**-24)


def _tensor(rows: np.ndarray) -> torch.Tensor:
    # Torch takes no memory that must not be written; the files of an index are mapped so that writing would not reach
    # them.
    return torch.from_numpy(rows if rows.flags.writeable else np.array(rows))


def use_one_thread() -> None:
    """Keep torch's operations in the calling thread to that thread; others are not touched."""
    # Torch sets a new thread's number of threads when it is first asked for, so ask before changing it.
    torch.get_num_threads()
    _openmp().limit(limits=1)


@cache
def _openmp() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="openmp")


def pays(dimension: int = 384) -> bool:
    """Return whether bfloat16 is worth it on this machine: measured once, for some milliseconds."""
    global _decided
    with _lock:
        if _decided is None:
            _decided = _probe(dimension)
        return _decided


def _probe(dimension: int) -> bool:
    rng = np.random.default_rng(0)
    queries, docs = (rng.standard_normal((n, dimension), dtype=np.float32) for n in (128, 1024))
    norms = _lengths(queries)
    look = Prefilter(queries, norms)
    exact = queries @ docs.T
    threshold = np.partition(exact, -20, axis=1)[:, -20]
    norm, rest = float(_lengths(docs).max()), rounding(docs)

    def seconds(work: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times)

    reach = (threshold * (1 - HALF_ULP) - 2 * look.error(norm, rest, dimension)).astype(np.float32)
    found = look.passing(docs, reach)
    if found is None or not np.isin(np.flatnonzero(exact >= threshold[:, None]), found[0]).all():
        return False
    plain = seconds(lambda: np.flatnonzero(np.matmul(queries, docs.T) >= threshold[:, None]))
    return plain >= _PAYS_FROM * seconds(lambda: look.passing(docs, reach))
