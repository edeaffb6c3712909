"""Who is found how often: nearest neighbours between two sets of vectors, and how unevenly they fall."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import entr
from scipy.stats import skew

_BLOCK_CELLS = 1 << 21


def nearest(anchors: np.ndarray, found: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Search ``found``, (n, d), exactly with anchors, (a, d), by dot product, block by block.

    Returns:
        Positions in ``found``, int64 (a, k), best first, equal ones in their order; and the dot products, (a, k). Where
        n is smaller, k is n.
    """
    k = min(k, len(found))
    rows, scores = np.empty((len(anchors), k), dtype=np.int64), np.empty((len(anchors), k))
    size = max(_BLOCK_CELLS // len(found), 1)
    for start in range(0, len(anchors), size):
        dots = anchors[start : start + size] @ found.T
        best = np.argsort(-dots, axis=1, kind="stable")[:, :k]
        rows[start : start + size] = best
        scores[start : start + size] = np.take_along_axis(dots, best, axis=1)
    return rows, scores


def times_found(rows: np.ndarray, weights: np.ndarray, number: int) -> np.ndarray:
    """Return N_k: how often each of ``number`` vectors is among the nearest ``rows`` (a, k) of the anchors, (r, n).

    Each anchor counts as often as its ``weights`` (r, a) say.
    """
    anchors, k = rows.shape
    hits = csr_matrix((np.ones(rows.size), rows.ravel(), np.arange(0, rows.size + 1, k)), shape=(anchors, number))
    return np.asarray((hits.T @ weights.T).T)


def unevenness(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Say how unevenly counts (r, n) fall, each measure (r,).

    Returns:
        ``skewness`` (Radovanović et al., 2010; 0 where all are found equally often), ``Gini`` (0 equally, towards 1
        where one takes all), ``entropy`` (of the shares, over log n: 1 equally, 0 where one takes all) and
        ``never found`` (share of vectors).
    """
    n = counts.shape[1]
    total = counts.sum(axis=1, keepdims=True)
    ordered = np.sort(counts, axis=1)
    spread = counts.std(axis=1) > 0
    skewness = np.zeros(len(counts))
    skewness[spread] = skew(counts[spread], axis=1)
    return {
        "skewness": skewness,
        "Gini": (ordered @ (2 * np.arange(1, n + 1) - n - 1)) / (n * total[:, 0]),
        "entropy": entr(counts / total).sum(axis=1) / np.log(n) if n > 1 else np.ones(len(counts)),
        "never found": (counts == 0).mean(axis=1),
    }
