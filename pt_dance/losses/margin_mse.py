"""Margin-MSE: the margin between two documents as a teacher sees it."""

from __future__ import annotations

import numpy as np
from sentence_transformers import SentenceTransformer
from torch import Tensor

from pt_dance.losses._batch import Batch, own_scores
from pt_dance.losses.base import RetrievalLoss
from pt_dance.losses.rows import TrainingRows


class MarginMSELoss(RetrievalLoss):
    r"""The squared difference between the model's margin and a teacher's.

    With :math:`s(q, d) = \mathrm{sim}(q, d) / \tau` and the teacher's raw scores :math:`T` the loss is the mean over
    the rows and their mined negatives of

    .. math:: \big( (s(q, d^+) - s(q, d^-)) - (T(q, d^+) - T(q, d^-)) \big)^2

    With ``rows``, mined negatives that are relevant to the query by any training judgement, and missing ones, are
    left out of the mean.

    Args:
        model: the SentenceTransformer to train.
        temperature: :math:`\tau`. Raw scores of a cross-encoder have margins of 10 and more, which no difference of
            two cosines reaches at temperature 1: with ``similarity="cosine"``, or a model that ends with a Normalize
            module, take about .05.
        similarity: "dot" or "cosine".
        rows: what is known of every training row, the teacher's scores included.
        query_negatives: how many of the last columns are mined queries; only without ``rows``.
        mini_batch_size: gradient caching, see :class:`~pt_dance.losses.base.RetrievalLoss`.
        gather_across_devices: average over the usable negatives of all processes, not over each one's own.

    Inputs:
        +---------------------------------------------+----------------------------------------------------------+
        | Columns                                     | Label                                                    |
        +=============================================+==========================================================+
        | query, positive, negative_1 … negative_n    | row number, with ``rows``                                |
        +---------------------------------------------+----------------------------------------------------------+
        | query, positive, negative_1 … negative_n    | without ``rows`` the teacher's margins                   |
        |                                             | T(q, d+) - T(q, d-), or all its scores, positive first   |
        +---------------------------------------------+----------------------------------------------------------+

    Relations:
        - Without ``rows`` it equals sentence-transformers' ``MarginMSELoss``, which has no masks.
        - Margin-MSE-Dual is ``DualLoss(MarginMSELoss(model, rows=rows))``; its teacher scores of the mined queries
          can only come from ``rows``.

    Source: Hofstätter et al. 2020, arXiv 2010.02666, eq. 5.

    Example:
        ::

            from pt_dance.losses import MarginMSELoss

            loss = MarginMSELoss(model, rows=rows)  # rows with teacher_positive and teacher_negatives
    """

    def __init__(
        self,
        model: SentenceTransformer,
        temperature: float = 1.0,
        similarity: str = "dot",
        *,
        rows: TrainingRows | None = None,
        query_negatives: int | None = None,
        mini_batch_size: int | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(
            model,
            rows=rows,
            query_negatives=query_negatives,
            similarity=similarity,
            temperature=temperature,
            mini_batch_size=mini_batch_size,
            gather_across_devices=gather_across_devices,
        )
        if rows is not None:
            self.check_rows(rows)

    def check_rows(self, rows: TrainingRows, mined: str = "negatives") -> None:
        """Refuse rows without mined negatives or without the teacher's score of any pair."""
        if rows.negatives.shape[1] == 0:
            raise ValueError(f"MarginMSELoss has nothing to learn from: the training rows have no {mined}")
        if rows.teacher_positive is None or rows.teacher_negatives is None:
            raise ValueError(f"MarginMSELoss needs the teacher's scores of the positives and of the {mined}")
        missing = ~np.isfinite(rows.teacher_negatives) & (rows.negatives >= 0)
        unscored = ~np.isfinite(rows.teacher_positive) | missing.any(axis=1)
        if unscored.any():
            raise ValueError(
                f"MarginMSELoss needs the teacher's scores of the positives and of the {mined}: "
                f"{int(unscored.sum())} rows lack some, the first of them row {int(unscored.argmax())}"
            )

    def loss_of(self, batch: Batch) -> Tensor:
        """Return the mean over the usable mined negatives."""
        queries = batch.queries[batch.local]
        positive = own_scores(queries, batch.positives[batch.local][:, None])
        negative = own_scores(queries, batch.negatives[batch.local])
        margins = (positive - negative) / self.temperature
        return batch.mean((margins - self._teacher_margins(batch).to(margins)).square())

    def _teacher_margins(self, batch: Batch) -> Tensor:
        margins = batch.rows.teacher_margins()
        if margins is not None:
            return margins
        labels = batch.labels
        if labels is None:
            raise ValueError(
                "MarginMSELoss needs the teacher's scores: from the training rows, or, in the direction from queries "
                "to documents alone, from a column label with the teacher's margins"
            )
        rows, columns = len(batch.queries[batch.local]), batch.negatives.shape[1]
        if labels.shape == (rows, columns + 1):
            return labels[:, :1] - labels[:, 1:]
        if labels.shape == (rows,) and columns == 1:
            return labels[:, None]
        if labels.shape != (rows, columns):
            raise ValueError(
                f"the column label must hold the teacher's {columns} margins a row, or its {columns + 1} scores, the "
                f"positive's first; its shape is {tuple(labels.shape)}"
            )
        return labels

    @property
    def citation(self) -> str:
        """BibTeX of the source."""
        return """
@misc{hofstätter2021improving,
    title={Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation},
    author={Sebastian Hofstätter and Sophia Althammer and Michael Schröder and Mete Sertkan and Allan Hanbury},
    year={2021},
    eprint={2010.02666},
    archivePrefix={arXiv},
    primaryClass={cs.IR}
}
"""
