"""A first look at products in bfloat16, which some CPUs multiply four times as fast as float32.

It only says which pairs *may* reach a threshold, by a bound that holds for every vector, so that nothing is lost. A
short timed probe decides whether it pays on this machine.
"""

from __future__ import annotations

import timeit
from functools import cache

import numpy as np
import torch

from pt_dance.retriever.search.vectors import UNIT, half, lengths

# Smaller blocks wait for memory, not for products.
LEAST_QUERIES = 32
HALF_ULP = 2.0**-8  # relative rounding error of bfloat16
_PAYS_FROM = 1.5


class Prefilter:
    """Queries, ``float32`` (q, d) of lengths ``norms``, in bfloat16, to be multiplied with blocks of documents."""

    def __init__(self, queries: np.ndarray, norms: np.ndarray) -> None:
        self._norms = norms
        self._half = half(queries)
        self._rounding = lengths(queries - self._half.float().numpy())
        self._room = torch.empty(0, dtype=torch.bfloat16)
        self._passed = np.empty(0, dtype=bool)

    def error(self, norm: float, rounding: float) -> np.ndarray:
        """Return how far a sum of products can be from the exact product, before its own rounding, ``float64`` (q,).

        With ``q = q' + r`` and ``d = d' + s`` (rounded plus rest; ``rounding`` bounds ``|s|``, ``norm`` ``|d|``) the
        products differ by ``r.d + q'.s``, at most ``|r||d| + |q'||s|``; the sum in float32 adds its own error.
        """
        dimension = self._half.shape[1]
        error = self._rounding * norm + self._norms * rounding * 1.01
        error += (2 * dimension + 16) * UNIT * self._norms * norm * 1.02
        # Numbers too small for bfloat16's products to see.
        return error + 2e-38 * dimension * (self._norms + norm) + 1e-35

    def products(self, docs: np.ndarray) -> np.ndarray:
        """Return the bits of the products with documents, ``int16`` (q, n), in memory that the next call overwrites."""
        shape = len(self._half), len(docs)
        if len(self._room) < shape[0] * shape[1]:
            self._room = torch.empty(shape[0] * shape[1], dtype=torch.bfloat16)
            self._passed = np.empty(len(self._room), dtype=bool)
        products = self._room[: shape[0] * shape[1]].view(shape)
        torch.mm(self._half, half(docs).T, out=products)
        return products.view(torch.int16).numpy()

    def passing(self, products: np.ndarray, threshold: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Return flat positions and values of the :meth:`products` that reach a query's threshold, ``float32`` (q,).

        None if this look would not help.
        """
        if not (threshold > 0).all():
            return None
        # Positive numbers are ordered as their bits are, and cutting bits off rounds them down. Rounding is monotone:
        # sums that reach the threshold do so after rounding, too.
        least = (threshold.view(np.int32) >> 16).astype(np.int16)
        passed = self._passed[: products.size].reshape(products.shape)
        np.greater_equal(products, least[:, None], out=passed)
        at = np.flatnonzero(passed)
        return None if len(at) > passed.size // 8 else (at, _as_float32(products.reshape(-1)[at]))


def kth_largest(products: np.ndarray, k: int) -> np.ndarray:
    """Return the k-th largest of the bits of each query's products, ``float32`` (q,), right where it is positive."""
    # As whole numbers, the bits of negative products are in the wrong order, but below those of all others.
    place = products.shape[1] - k
    return _as_float32(np.partition(products, place, axis=1)[:, place])


def _as_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.int32) << 16).view(np.float32)


@cache
def pays() -> bool:
    """Return whether bfloat16 is worth it on this machine: measured once, for some milliseconds."""
    rng = np.random.default_rng(0)
    queries, docs = (rng.standard_normal((n, 384), dtype=np.float32) for n in (128, 1024))
    look = Prefilter(queries, lengths(queries))
    threshold = np.full(128, 30, dtype=np.float32)  # of products with a deviation of 20

    plain = timeit.repeat(lambda: np.flatnonzero(np.matmul(queries, docs.T) >= threshold[:, None]), number=1)
    looked = timeit.repeat(lambda: look.passing(look.products(docs), threshold), number=1)
    return min(plain) >= _PAYS_FROM * min(looked)
