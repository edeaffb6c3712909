"""ANCE's softplus of the difference of two scores."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus

from pt_dance.losses._batch import Batch
from pt_dance.losses.base import RetrievalLoss


class PairwiseLoss(RetrievalLoss):
    r"""The positive document against one mined negative at a time, as in ANCE and DANCE.

    With :math:`s(q, d) = \mathrm{sim}(q, d) / \tau` the loss is the mean over the rows and their mined negatives of

    .. math:: \log(1 + e^{s(q, d^-) - s(q, d^+)})

    which is the cross-entropy between the two documents. There are no in-batch negatives. With ``rows``, mined
    negatives that are relevant to the query by any training judgement, and missing ones, are left out of the mean; a
    batch without any other has a loss and a gradient of exactly 0.

    Args:
        model: The SentenceTransformer to train.
        temperature: :math:`\tau`; 1 in ANCE, .01 in DANCE.
        similarity: "dot" (ANCE) or "cosine" (DANCE).
        rows: What is known of every training row.
        query_negatives, mini_batch_size: As in :class:`~pt_dance.losses.RetrievalLoss`.
        gather_across_devices: Average over the usable negatives of all processes, not over each one's own.

    Inputs:
        query, positive, negative_1 … negative_n and, where there are some, negative_query_1 … negative_query_m. Label:
        the row's number with ``rows``, else none.

    Relations:
        - DANCE's loss is ``DualLoss(PairwiseLoss(model, temperature=0.01, similarity="cosine"), weight=0.1)``.
        - With one negative a row it equals ``ContrastiveLoss(in_batch=False)``; with more, that has one softmax over
          all of them.

    Source: Xiong et al. 2021, ANCE, arXiv 2007.00808, section 2, as its released code computes it; Li et al. 2021,
    DANCE, arXiv 2107.07773.

    Example:
        ::

            from pt_dance.losses import PairwiseLoss

            loss = PairwiseLoss(model, rows=rows)  # ANCE
    """

    similarity = "dot"
    needs_negatives = True
    citation = """
@inproceedings{xiong2021approximate,
    title={Approximate Nearest Neighbor Negative Contrastive Learning for Dense Text Retrieval},
    author={Lee Xiong and Chenyan Xiong and Ye Li and Kwok-Fung Tang and Jialin Liu and Paul N. Bennett and
        Junaid Ahmed and Arnold Overwijk},
    booktitle={International Conference on Learning Representations},
    year={2021},
    url={https://arxiv.org/abs/2007.00808},
}
"""

    def loss_of(self, batch: Batch) -> Tensor:
        """Return the mean over the usable mined negatives."""
        positive, negatives = batch.row_scores()
        return batch.mean(softplus((negatives - positive) / self.temperature), batch.rows.usable_negatives)
