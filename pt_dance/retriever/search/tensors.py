"""Exact search in tensors, for GPUs; see :mod:`.exact` for what it promises."""

from __future__ import annotations

import numpy as np
import torch

from pt_dance.retriever.search.arrays import Block
from pt_dance.retriever.search.vectors import UNIT, Vectors

_PAIR_BLOCK = 1 << 15


class TensorVectors(Vectors):
    """Vectors on a device: all are ``kept`` there if they take less than a quarter of its free memory."""

    def __init__(self, docs: np.ndarray, device: torch.device) -> None:
        super().__init__(docs)
        self.device = device
        self.kept: torch.Tensor | None = None
        if device.type == "cuda" and docs.nbytes < torch.cuda.mem_get_info(device)[0] // 4:
            self.kept = torch.empty(docs.shape, dtype=getattr(torch, docs.dtype.name), device=device)
            for first in range(0, len(docs), 1 << 16):
                rows = np.array(docs[first : first + (1 << 16)])
                self._pages.read(rows.nbytes)
                self.kept[first : first + (1 << 16)] = torch.from_numpy(rows)

    def block(self, first: int, end: int) -> torch.Tensor:
        """Return rows as float32."""
        if self.kept is not None:
            return self.kept[first:end].float()
        return torch.from_numpy(np.array(super().block(first, end))).to(self.device)

    def _longest(self, block: torch.Tensor) -> float:
        return float((block * block).sum(1).max().sqrt()) * (1 + 2 * block.shape[1] * UNIT)

    def score_pairs(self, queries: np.ndarray, query_of: np.ndarray, row_of: np.ndarray) -> np.ndarray:
        """Return the scores of pairs: halves are added element by element, so that nothing depends on their number."""
        scores = np.empty(len(row_of), dtype=np.float32)
        on_device = torch.from_numpy(queries).to(self.device).double()
        for start in range(0, len(row_of), _PAIR_BLOCK):
            part = slice(start, start + _PAIR_BLOCK)
            if self.kept is not None:
                sums = self.kept[torch.from_numpy(row_of[part]).to(self.device)].double()
            else:
                self._pages.read(0, places=len(row_of[part]))
                sums = torch.from_numpy(self.docs[row_of[part]].astype(np.float64)).to(self.device)
            sums *= on_device[torch.from_numpy(query_of[part]).to(self.device)]
            while sums.shape[1] > 1:
                width = (sums.shape[1] + 1) // 2
                sums[:, : sums.shape[1] - width] += sums[:, width:]
                sums = sums[:, :width]
            scores[part] = sums[:, 0].float().cpu().numpy()
        return scores


class TensorBlock(Block):
    """A block of queries in tensors: products in float32 of candidates, best first, and their rows."""

    def __init__(
        self, queries: np.ndarray, norms: np.ndarray, vectors: TensorVectors, k: int, tie_order: np.ndarray | None
    ) -> None:
        super().__init__(queries, norms, vectors, k, tie_order)
        self._on_device = torch.from_numpy(queries).to(vectors.device)
        self._slack = torch.from_numpy(self.slack).to(vectors.device)
        self.slots = min(len(vectors), k + k // 8 + 16)
        # -inf and -1 in free slots.
        self.values = torch.full((len(queries), self.slots), -torch.inf, device=vectors.device)
        self.rows = torch.full((len(queries), self.slots), -1, dtype=torch.int64, device=vectors.device)

    def _threshold(self, kth: torch.Tensor) -> torch.Tensor:
        """Return what a product must reach, as float32 rounded down."""
        exact = (kth.double() - (self._slack * self.norm + 1e-35)).float()
        return torch.nextafter(exact, torch.tensor(-torch.inf, device=kth.device))

    def add(self, first: int, end: int) -> None:
        """Take in the documents of rows first to end."""
        docs = self.vectors.block(first, end)
        self.norm = max(self.norm, self.vectors.norm(first, docs))
        values = torch.cat([self.values, _plain_product(self._on_device, docs)], dim=1)
        top, at = torch.topk(values, self.slots + 1, dim=1)
        new = torch.arange(first, end, device=at.device).expand(len(at), -1)
        rows = torch.cat([self.rows, new], dim=1)
        self.values, self.rows = top[:, : self.slots], torch.gather(rows, 1, at[:, : self.slots])
        threshold = self._threshold(top[:, self.k - 1])
        for query in torch.nonzero((top[:, -1] >= threshold) & torch.isfinite(top[:, -1]))[:, 0].tolist():
            # Too many are too close to tell apart by products: their scores decide, and ties are final.
            close = rows[query][values[query] >= threshold[query]].cpu().numpy()
            best, found = self.decided(np.array([query]), np.full(len(close), query), close)
            self.values[query], self.rows[query] = -torch.inf, -1
            self.values[query, : self.k] = torch.from_numpy(best[0]).to(values)
            self.rows[query, : self.k] = torch.from_numpy(found[0]).to(rows)

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and rows of the best k of every query."""
        close = (self.values >= self._threshold(self.values[:, self.k - 1])[:, None]) & (self.rows >= 0)
        query, slot = (at.cpu().numpy() for at in torch.nonzero(close, as_tuple=True))
        return self.decided(np.arange(len(self.queries)), query, self.rows.cpu().numpy()[query, slot])


def _plain_product(queries: torch.Tensor, docs: torch.Tensor) -> torch.Tensor:
    """Multiply queries and documents in true float32, whatever precision the program has set for training."""
    setting = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(queries.device.type, enabled=False):
            return queries @ docs.T
    finally:
        torch.set_float32_matmul_precision(setting)
