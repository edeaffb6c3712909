"""Cross-entropy over the positive, the mined negatives and the rest of the batch."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from pt_dance.losses._batch import Batch
from pt_dance.losses.base import RetrievalLoss


class ContrastiveLoss(RetrievalLoss):
    r"""The cross-entropy of finding the positive document among negatives (InfoNCE, "MNRL").

    With :math:`s(q, d) = \mathrm{sim}(q, d) / \tau` the loss is the mean over the rows i of

    .. math:: -\log \frac{e^{s(q_i, d_i^+)}}{\sum_{d \in C_i} e^{s(q_i, d)}}

    where the candidates :math:`C_i` are the row's own positive, its own mined negatives and, with ``in_batch``, the
    positives and mined negatives of all other rows. With ``rows``, documents that are relevant to :math:`q_i` by any
    training judgement are no candidates, except the row's own positive.

    Args:
        model: The SentenceTransformer to train.
        temperature: :math:`\tau`.
        similarity: "cosine" or "dot".
        in_batch: Whether documents of other rows are candidates.
        rows: What is known of every training row.
        query_negatives, mini_batch_size: As in :class:`~pt_dance.losses.RetrievalLoss`.
        gather_across_devices: Also take the documents of other processes as candidates.

    Inputs:
        query, positive, negative_1 … negative_n, negative_query_1 … negative_query_m, the mined texts only where there
        are some. Label: the row's number with ``rows``, else none.

    Relations:
        - Without ``rows`` it equals sentence-transformers' ``MultipleNegativesRankingLoss(scale=1 / temperature)``,
          and with ``mini_batch_size`` its ``CachedMultipleNegativesRankingLoss``, neither of which can leave out a
          query's other positives.
        - :class:`~pt_dance.losses.DualLoss` adds the direction from documents to queries (MNRL-Dual).
        - :class:`~pt_dance.losses.SamToneLoss` adds the other queries of the batch to the candidates.

    Source: van den Oord et al. 2018, arXiv 1807.03748, eq. 4; with mined negatives Karpukhin et al. 2020,
    arXiv 2004.04906, eq. 2.

    Example:
        ::

            from pt_dance.losses import ContrastiveLoss

            loss = ContrastiveLoss(model, temperature=0.05, rows=rows)
            trainer = SentenceTransformerTrainer(model=model, train_dataset=train_dataset, loss=loss)
            trainer.train()
    """

    temperature = 0.05
    shown = (*RetrievalLoss.shown, "in_batch")
    citation = """
@misc{oord2019representationlearningcontrastivepredictive,
      title={Representation Learning with Contrastive Predictive Coding},
      author={Aaron van den Oord and Yazhe Li and Oriol Vinyals},
      year={2019},
      eprint={1807.03748},
      archivePrefix={arXiv},
      primaryClass={cs.LG},
      url={https://arxiv.org/abs/1807.03748},
}
"""

    def __init__(self, model: SentenceTransformer, *args: Any, in_batch: bool = True, **options: Any) -> None:
        self.in_batch, self.needs_negatives = bool(in_batch), not in_batch
        super().__init__(model, *args, **options)

    def loss_of(self, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the local rows."""
        if self.in_batch:
            return cross_entropy(batch, batch.candidate_scores() / self.temperature, batch.local.start)
        positive, negatives = batch.row_scores()
        if (usable := batch.rows.usable_negatives) is not None:
            negatives = negatives.masked_fill(~usable[batch.local], -torch.inf)
        return cross_entropy(batch, torch.cat([positive, negatives], dim=1) / self.temperature)


def cross_entropy(batch: Batch, logits: Tensor, first: int | None = None) -> Tensor:
    """Return the mean over the local rows of the cross-entropy of their own positives.

    Args:
        batch: The batch.
        logits: (L, candidates).
        first: The column of the first row's positive, from which on there is one a row; None: all are in column 0.
    """
    own = logits[:, 0] if first is None else logits.diagonal(first)
    return batch.mean(torch.logsumexp(logits, dim=1) - own, batch.rows.real)
