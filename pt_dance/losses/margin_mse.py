"""Margin-MSE: the margin between two documents as a teacher sees it."""

from __future__ import annotations

from torch import Tensor

from pt_dance.losses._batch import Batch
from pt_dance.losses.base import RetrievalLoss


class MarginMSELoss(RetrievalLoss):
    r"""The squared difference between the model's margin and a teacher's.

    With :math:`s(q, d) = \mathrm{sim}(q, d) / \tau` and the teacher's raw scores :math:`T` the loss is the mean over
    the rows and their mined negatives of

    .. math:: \big( (s(q, d^+) - s(q, d^-)) - (T(q, d^+) - T(q, d^-)) \big)^2

    With ``rows``, mined negatives that are relevant to the query by any training judgement, and missing ones, are
    left out of the mean.

    Args:
        model: The SentenceTransformer to train.
        temperature: :math:`\tau`. Raw scores of a cross-encoder have margins of 10 and more, which no difference of
            two cosines reaches at temperature 1: with ``similarity="cosine"``, or a model that ends with a Normalize
            module, take about .05.
        similarity: "dot" or "cosine".
        rows: What is known of every training row, the teacher's scores included.
        query_negatives, mini_batch_size: As in :class:`~pt_dance.losses.RetrievalLoss`.
        gather_across_devices: Average over the usable negatives of all processes, not over each one's own.

    Inputs:
        query, positive, negative_1 … negative_n. Label: the row's number with ``rows``; without them the teacher's
        margins T(q, d+) - T(q, d-), or all its scores, the positive's first.

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

    similarity = "dot"
    needs_teacher = True
    citation = """
@misc{hofstätter2021improving,
    title={Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation},
    author={Sebastian Hofstätter and Sophia Althammer and Michael Schröder and Mete Sertkan and Allan Hanbury},
    year={2021},
    eprint={2010.02666},
    archivePrefix={arXiv},
    primaryClass={cs.IR}
}
"""

    def loss_of(self, batch: Batch) -> Tensor:
        """Return the mean over the usable mined negatives."""
        positive, negatives = batch.row_scores()
        margins = (positive - negatives) / self.temperature
        return batch.mean((margins - batch.teacher_margins().to(margins)).square(), batch.rows.usable_negatives)
