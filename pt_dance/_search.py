"""Exact search over dense vectors in bounded memory, with results that never depend on how it was cut into blocks.

A matrix product in float32 gives other last bits for other block shapes, so it only finds candidates here. The score of
a pair is defined by :func:`score_pairs` alone: exact products in float64, added up in one fixed order, rounded to
float32. Those bits are the same for every block size, number of threads and device. A document stays a candidate as
long as rounding errors of the product could hide that it belongs to the best k, so nothing is lost; equal scores are
ordered by ``tie_order``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

QUERY_BLOCK = 256
DOC_BLOCK = 4096
# Longer vectors could give dot products that float32 does not hold.
MAX_NORM = 1e18
_PAIR_BLOCK = 512
_UNIT = 2.0**-24  # relative rounding error of float32


def score_pairs(
    queries: np.ndarray,
    docs: np.ndarray | Vectors,
    query_of: np.ndarray,
    row_of: np.ndarray,
    *,
    device: str | None = None,
) -> np.ndarray:
    """Score pairs of a query and a document.

    Args:
        queries: ``float32`` (q, d).
        docs: ``float32`` or ``float16`` (n, d), may be memory-mapped.
        query_of: Query number of each pair, ``int`` (m,).
        row_of: Document row of each pair, ``int`` (m,).
        device: Where to compute; a GPU if there is one by default.

    Returns:
        ``float32`` (m,): dot products, the same bits for a pair whatever the other pairs are.

    Raises:
        IndexError: If a row number is negative or too large.
    """
    query_of, row_of = np.asarray(query_of, dtype=np.int64), np.asarray(row_of, dtype=np.int64)
    if len(row_of) and (row_of.min() < 0 or row_of.max() >= len(docs)):
        raise IndexError(f"document rows must be 0 to {len(docs) - 1}, not {row_of.min()} to {row_of.max()}.")
    return _score_pairs(
        Vectors.of(docs, device), torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32)), query_of, row_of
    )


def exact_search(
    queries: np.ndarray, docs: np.ndarray | Vectors, k: int, **options: object
) -> tuple[np.ndarray, np.ndarray]:
    """Find the best k documents of every query; see :func:`iter_exact_search` for the options.

    Args:
        queries: ``float32`` (q, d).
        docs: ``float32`` or ``float16`` (n, d), may be memory-mapped.
        k: How many documents a query gets.
        **options: ``tie_order``, ``query_block``, ``doc_block``, ``device``, ``progress``.

    Returns:
        Scores, ``float32`` (q, min(k, n)), and rows, ``int64`` of the same shape, best first.
    """
    width = min(k, len(docs))
    scores = np.empty((len(queries), width), dtype=np.float32)
    rows = np.empty((len(queries), width), dtype=np.int64)
    for start, block_scores, block_rows in iter_exact_search(queries, docs, k, **options):
        scores[start : start + len(block_scores)] = block_scores
        rows[start : start + len(block_rows)] = block_rows
    return scores, rows


def iter_exact_search(
    queries: np.ndarray,
    docs: np.ndarray | Vectors,
    k: int,
    *,
    tie_order: np.ndarray | None = None,
    query_block: int = QUERY_BLOCK,
    doc_block: int = DOC_BLOCK,
    device: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Find the best k documents of every query, one block of queries after the other.

    Memory: about ``query_block * doc_block * 4`` bytes plus ``query_block * k * 40``, whatever the number of queries
    and documents.

    Args:
        queries: ``float32`` (q, d), finite.
        docs: ``float32`` or ``float16`` (n, d), finite; may be memory-mapped.
        k: How many documents a query gets, at least 1.
        tie_order: For every row its place in the order of equal scores, e.g. the rank of its docno; the row number by
        default.
        query_block: Queries searched together.
        doc_block: Documents multiplied with them at a time.
        device: Where to compute; a GPU if there is one by default.
        progress: Called with the number of query-document products done since the last call, in documents.

    Yields:
        Number of the first query, scores ``float32`` (b, min(k, n)), rows ``int64`` (b, min(k, n)), best first.

    Raises:
        ValueError: If shapes, k or block sizes make no sense, or a query vector is not finite.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if queries.ndim != 2 or len(docs.shape) != 2 or queries.shape[1] != docs.shape[1]:
        raise ValueError(f"queries of shape {queries.shape} cannot be searched in documents of shape {docs.shape}.")
    if min(k, query_block, doc_block) < 1:
        raise ValueError(f"k, query_block and doc_block must be at least 1, not {k}, {query_block} and {doc_block}.")
    vectors = Vectors.of(docs, device)
    # A query's candidates must not take more room than its products.
    query_block = max(1, min(query_block, query_block * doc_block // (3 * min(k, len(docs)) + 1)))
    for start in range(0, len(queries), query_block):
        block = _Block(torch.from_numpy(queries[start : start + query_block]), vectors, min(k, len(docs)), tie_order)
        for first in range(0, len(docs), doc_block):
            block.add(first, min(first + doc_block, len(docs)))
            if progress is not None:
                progress(min(doc_block, len(docs) - first))
        scores, rows = block.best()
        yield start, scores, rows


class Vectors:
    """The documents' vectors, read block by block; on a GPU they are kept there if they take little of its memory.

    One object can serve many searches: it remembers how long the vectors are.

    Args:
        docs: ``float32`` or ``float16`` (n, d), may be memory-mapped.
        device: Where to compute; a GPU if there is one by default.
    """

    def __init__(self, docs: np.ndarray, device: str | None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.docs = docs
        self.on_device: torch.Tensor | None = None
        self._norms: dict[tuple[int, int], float] = {}
        if self.device.type == "cuda" and docs.nbytes < torch.cuda.mem_get_info(self.device)[0] // 4:
            self.on_device = torch.empty(docs.shape, dtype=torch.from_numpy(docs[:0].copy()).dtype, device=self.device)
            for first in range(0, len(docs), 1 << 16):
                self.on_device[first : first + (1 << 16)] = torch.from_numpy(np.array(docs[first : first + (1 << 16)]))

    @classmethod
    def of(cls, docs: np.ndarray | Vectors, device: str | None) -> Vectors:
        """Wrap an array; vectors that are wrapped already stay what they are."""
        return docs if isinstance(docs, Vectors) else cls(docs, device)

    def __len__(self) -> int:
        return len(self.docs)

    @property
    def shape(self) -> tuple[int, int]:
        """Documents and numbers in a vector."""
        return self.docs.shape

    def block(self, first: int, end: int) -> np.ndarray | torch.Tensor:
        """Rows as float32: an array on the CPU, a tensor elsewhere."""
        if self.on_device is not None:
            return self.on_device[first:end].float()
        rows = np.asarray(self.docs[first:end], dtype=np.float32)
        return rows if self.device.type == "cpu" else torch.from_numpy(np.array(rows)).to(self.device)

    def gather(self, rows: np.ndarray) -> torch.Tensor:
        """Chosen rows as float64 on the device."""
        if self.on_device is not None:
            return self.on_device[torch.from_numpy(rows).to(self.device)].double()
        return torch.from_numpy(self.docs[rows].astype(np.float64)).to(self.device)

    def norm(self, first: int, block: np.ndarray | torch.Tensor) -> float:
        """Upper bound of the lengths of a block's vectors."""
        norm = self._norms.get((first, len(block)))
        if norm is None:
            if isinstance(block, np.ndarray):
                norm = float(np.sqrt(np.einsum("ij,ij->i", block, block).max()))
            else:
                norm = float(torch.linalg.vector_norm(block, dim=1).max())
            if not norm <= MAX_NORM:
                raise ValueError(
                    f"document vectors must be finite and no longer than {MAX_NORM:g}; one of rows {first} to "
                    f"{first + len(block) - 1} is not: index these documents again."
                )
            norm *= 1 + 2 * block.shape[1] * _UNIT  # the rounding errors of its own sum
            self._norms[first, len(block)] = norm
        return norm


def _score_pairs(vectors: Vectors, queries: torch.Tensor, query_of: np.ndarray, row_of: np.ndarray) -> np.ndarray:
    scores = np.empty(len(row_of), dtype=np.float32)
    queries = queries.to(vectors.device).double()
    for start in range(0, len(row_of), _PAIR_BLOCK):
        part = slice(start, start + _PAIR_BLOCK)
        products = vectors.gather(row_of[part])
        products *= queries[torch.from_numpy(query_of[part]).to(vectors.device)]
        width = products.shape[1]
        # Halves are added up element by element: no library's choice of order can change a bit.
        while width > 1:
            half = (width + 1) // 2
            products[:, : width - half] += products[:, half:width]
            width = half
        scores[part] = products[:, 0].float().cpu().numpy()
    return scores


class _Block:
    """The running best k of a block of queries.

    Attributes:
        values: Products in float32 of the candidates, (q, slots), best first, -inf in free slots.
        rows: Their rows, -1 in free slots.
    """

    def __init__(self, queries: torch.Tensor, vectors: Vectors, k: int, tie_order: np.ndarray | None) -> None:
        norms = torch.linalg.vector_norm(queries, dim=1, dtype=torch.float64)
        if not bool(torch.isfinite(norms).all()) or float(norms.max()) > MAX_NORM:
            raise ValueError(f"query vectors must be finite and no longer than {MAX_NORM:g}.")
        self.queries, self.vectors, self.k, self.tie_order = queries, vectors, k, tie_order
        self._on_device = queries.to(vectors.device)
        slots = min(len(vectors), k + k // 8 + 16)
        self.values = torch.full((len(queries), slots), -torch.inf, device=vectors.device)
        self.rows = torch.full((len(queries), slots), -1, dtype=torch.int64, device=vectors.device)
        # |product in any order - exact| <= gamma |q| |d|; 3 more roundings for the score and the comparisons.
        steps = queries.shape[1] + 3
        self._slack_per_norm = (2 * steps * _UNIT / (1 - steps * _UNIT) * norms * (1 + 1e-9)).to(vectors.device)
        self._norm = 0.0

    def _slack(self) -> torch.Tensor:
        return (self._slack_per_norm * self._norm + 1e-35).float() * (1 + 1e-6)

    def _threshold(self, kth: torch.Tensor, slack: torch.Tensor) -> torch.Tensor:
        # kth - slack is rounded to nearest: go one step further down.
        return torch.nextafter(kth - slack, torch.tensor(-torch.inf, device=kth.device))

    def add(self, first: int, end: int) -> None:
        """Take in the documents of rows first to end."""
        docs = self.vectors.block(first, end)
        self._norm = max(self._norm, self.vectors.norm(first, docs))
        threshold = self._threshold(self.values[:, self.k - 1], self._slack())
        if isinstance(docs, np.ndarray):
            # NumPy's product is not touched by autocast or torch's precision settings, and its scan of a mask is quick.
            products = np.matmul(self.queries.numpy(), docs.T)
            at = torch.from_numpy(np.flatnonzero(products >= threshold.numpy()[:, None]))
            products = torch.from_numpy(products)
        else:
            products = _plain_product(self._on_device, docs)
            at = torch.nonzero((products >= threshold[:, None]).reshape(-1))[:, 0]
        count = end - first
        if len(at) == products.numel():
            rows = torch.arange(first, end, device=at.device).expand(len(products), -1)
            self._merge(torch.arange(len(products), device=at.device), products, rows)
        elif len(at):
            query = at // count
            counts = torch.bincount(query, minlength=len(products))
            width = int(counts.max())
            place = torch.arange(len(at), device=at.device) - (torch.cumsum(counts, 0) - counts)[query]
            which = torch.nonzero(counts)[:, 0]
            line = (torch.cumsum(counts > 0, 0) - 1)[query]
            values = torch.full((len(which), width), -torch.inf, device=at.device)
            rows = torch.full((len(which), width), -1, dtype=torch.int64, device=at.device)
            values[line, place] = products.reshape(-1)[at]
            rows[line, place] = at % count + first
            self._merge(which, values, rows)

    def _merge(self, which: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> None:
        """Merge new candidates of some of the queries with those they have."""
        slots = self.values.shape[1]
        values = torch.cat([self.values[which], values], dim=1)
        rows = torch.cat([self.rows[which], rows], dim=1)
        top, at = torch.topk(values, min(slots + 1, values.shape[1]), dim=1)
        self.values[which] = top[:, :slots]
        self.rows[which] = torch.gather(rows, 1, at[:, :slots])
        if top.shape[1] <= slots:
            return
        threshold = self._threshold(top[:, self.k - 1], self._slack()[which])
        for line in torch.nonzero((top[:, slots] >= threshold) & torch.isfinite(top[:, slots]))[:, 0].tolist():
            # Too many are too close to tell apart by products: their scores decide, and ties are final.
            close = values[line] >= threshold[line]
            query = int(which[line])
            mine = rows[line][close].cpu().numpy()
            order = self._order(mine, np.full(len(mine), query))[1][: self.k]
            kept = torch.full((slots,), -torch.inf, device=values.device), torch.full_like(self.rows[query], -1)
            kept[0][: len(order)] = values[line][close][torch.from_numpy(order).to(values.device)]
            kept[1][: len(order)] = torch.from_numpy(mine[order]).to(values.device)
            best = torch.argsort(kept[0], descending=True)
            self.values[query], self.rows[query] = kept[0][best], kept[1][best]

    def _order(self, rows: np.ndarray, query_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores = _score_pairs(self.vectors, self.queries, query_of, rows)
        ties = rows if self.tie_order is None else self.tie_order[rows]
        return scores, np.lexsort((ties, -scores))

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and rows of the best k of every query."""
        close = self.values >= self._threshold(self.values[:, self.k - 1], self._slack())[:, None]
        close = (close & (self.rows >= 0)).cpu().numpy()
        rows = self.rows.cpu().numpy()
        query_of, slot = np.nonzero(close)
        found = rows[query_of, slot]
        scores = np.full(rows.shape, -np.inf, dtype=np.float32)
        scores[query_of, slot] = _score_pairs(self.vectors, self.queries, query_of, found)
        ties = np.full(rows.shape, np.iinfo(np.int64).max)
        ties[query_of, slot] = found if self.tie_order is None else self.tie_order[found]
        order = np.lexsort((ties, -scores), axis=-1)[:, : self.k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def _plain_product(queries: torch.Tensor, docs: torch.Tensor) -> torch.Tensor:
    """Queries times documents in true float32, whatever precision the program has set for training."""
    setting = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(queries.device.type, enabled=False):
            return queries @ docs.T
    finally:
        torch.set_float32_matmul_precision(setting)
