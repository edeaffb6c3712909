"""Exact search in tensors, for GPUs; see :mod:`pt_dance.retriever.search.exact` for what it promises."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from pt_dance.retriever.search.exact import add_up, slack_per_norm

if TYPE_CHECKING:
    from pt_dance.retriever.search.exact import Vectors

_PAIR_BLOCK = 1 << 15


class TensorVectors:
    """The documents' vectors on a device, or on their way there block by block.

    Args:
        docs: ``float32`` or ``float16`` (n, d), may be memory-mapped.
        device: Where to compute.

    Attributes:
        kept: All vectors on the device, if they take less than a quarter of its free memory; None otherwise.
    """

    def __init__(self, docs: np.ndarray, device: torch.device) -> None:
        self.docs, self.device = docs, device
        self.kept: torch.Tensor | None = None
        if device.type == "cuda" and docs.nbytes < torch.cuda.mem_get_info(device)[0] // 4:
            self.kept = torch.empty(docs.shape, dtype=getattr(torch, docs.dtype.name), device=device)
            for first in range(0, len(docs), 1 << 16):
                self.kept[first : first + (1 << 16)] = torch.from_numpy(np.array(docs[first : first + (1 << 16)]))

    @classmethod
    def on(cls, docs: np.ndarray, device: str | None) -> TensorVectors | None:
        """Return the vectors for a device, a GPU if there is one by default; None for the CPU."""
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return None if chosen.type == "cpu" else cls(docs, chosen)

    @property
    def block(self) -> type[TensorBlock]:
        """What a block of queries is searched with."""
        return TensorBlock

    def rows(self, first: int, end: int) -> torch.Tensor:
        """Return rows as float32."""
        if self.kept is not None:
            return self.kept[first:end].float()
        return torch.from_numpy(np.array(self.docs[first:end], dtype=np.float32)).to(self.device)

    def score_pairs(self, queries: np.ndarray, query_of: np.ndarray, row_of: np.ndarray) -> np.ndarray:
        """Do what ``exact.score_pairs`` does: elementwise operations, so the same bits."""
        scores = np.empty(len(row_of), dtype=np.float32)
        on_device = torch.from_numpy(queries).to(self.device).double()
        for start in range(0, len(row_of), _PAIR_BLOCK):
            part = slice(start, start + _PAIR_BLOCK)
            if self.kept is not None:
                products = self.kept[torch.from_numpy(row_of[part]).to(self.device)].double()
            else:
                products = torch.from_numpy(self.docs[row_of[part]].astype(np.float64)).to(self.device)
            products *= on_device[torch.from_numpy(query_of[part]).to(self.device)]
            scores[part] = add_up(products).float().cpu().numpy()
        return scores


class TensorBlock:
    """A block of queries on its way through the documents; like :class:`pt_dance.retriever.search.topk.ArrayBlock`."""

    def __init__(
        self, queries: np.ndarray, norms: np.ndarray, vectors: Vectors, k: int, tie_order: np.ndarray | None
    ) -> None:
        self.queries, self.vectors, self.k, self.tie_order = queries, vectors, k, tie_order
        device = vectors.tensors.device
        self._on_device = torch.from_numpy(queries).to(device)
        slots = min(len(vectors), k + k // 8 + 16)
        # Candidates: products in float32, best first, -inf in free slots; and their rows, -1 there.
        self.values = torch.full((len(queries), slots), -torch.inf, device=device)
        self.rows = torch.full((len(queries), slots), -1, dtype=torch.int64, device=device)
        self._slack_per_norm = torch.from_numpy(slack_per_norm(norms, queries.shape[1])).to(device)
        self._norm = 0.0

    def _threshold(self, kth: torch.Tensor, which: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """What a product must reach, as float32 rounded down."""
        exact = (kth.double() - (self._slack_per_norm[which] * self._norm + 1e-35)).float()
        return torch.nextafter(exact, torch.tensor(-torch.inf, device=kth.device))

    def add(self, first: int, end: int) -> None:
        """Take in the documents of rows first to end."""
        docs = self.vectors.tensors.rows(first, end)
        self._norm = max(self._norm, self.vectors.norm(first, docs))
        threshold = self._threshold(self.values[:, self.k - 1])
        products = _plain_product(self._on_device, docs)
        at = torch.nonzero((products >= threshold[:, None]).reshape(-1))[:, 0]
        count = end - first
        if len(at) == products.numel():
            rows = torch.arange(first, end, device=at.device).expand(len(products), -1)
            self._merge(torch.arange(len(products), device=at.device), products, rows)
        elif len(at):
            query = at // count
            counts = torch.bincount(query, minlength=len(products))
            place = torch.arange(len(at), device=at.device) - (torch.cumsum(counts, 0) - counts)[query]
            which = torch.nonzero(counts)[:, 0]
            line = (torch.cumsum(counts > 0, 0) - 1)[query]
            values = torch.full((len(which), int(counts.max())), -torch.inf, device=at.device)
            rows = torch.full(values.shape, -1, dtype=torch.int64, device=at.device)
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
        threshold = self._threshold(top[:, self.k - 1], which)
        for line in torch.nonzero((top[:, slots] >= threshold) & torch.isfinite(top[:, slots]))[:, 0].tolist():
            # Too many are too close to tell apart by products: their scores decide, and ties are final.
            close = values[line] >= threshold[line]
            query = int(which[line])
            mine, products = rows[line][close].cpu().numpy(), values[line][close].cpu().numpy()
            scores = self.vectors.score_pairs(self.queries, np.full(len(mine), query), mine)
            best = np.lexsort((self._ties(mine), -scores))[: self.k]
            best = best[np.argsort(-products[best], kind="stable")]
            self.values[query], self.rows[query] = -torch.inf, -1
            self.values[query, : len(best)] = torch.from_numpy(products[best]).to(values.device)
            self.rows[query, : len(best)] = torch.from_numpy(mine[best]).to(values.device)

    def _ties(self, rows: np.ndarray) -> np.ndarray:
        return rows if self.tie_order is None else self.tie_order[rows]

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and rows of the best k of every query."""
        close = (self.values >= self._threshold(self.values[:, self.k - 1])[:, None]) & (self.rows >= 0)
        rows = self.rows.cpu().numpy()
        query_of, slot = np.nonzero(close.cpu().numpy())
        found = rows[query_of, slot]
        scores = np.full(rows.shape, -np.inf, dtype=np.float32)
        scores[query_of, slot] = self.vectors.score_pairs(self.queries, query_of, found)
        ties = np.full(rows.shape, np.iinfo(np.int64).max)
        ties[query_of, slot] = self._ties(found)
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
