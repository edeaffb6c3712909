"""Both directions: queries that search documents, and documents that search queries."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from pt_dance.losses._batch import Batch
from pt_dance.losses.base import RetrievalLoss, WrappedLoss
from pt_dance.losses.rows import TrainingRows
from pt_dance.storage.options import number


class DualLoss(WrappedLoss):
    r"""A loss and its dual, in which the positive document is to find its query among other queries.

    .. math:: w_d \, L(q, d^+, D^-) + w \, L(d^+, q, Q^-)

    The dual direction is the same loss with the roles of queries and documents swapped: candidates are the row's own
    query, its mined queries :math:`Q^-` and, where the loss has in-batch negatives, the queries and mined queries of
    the other rows. With ``rows``, queries that the row's positive document is relevant to are never negatives.

    Args:
        loss: Any other loss of this module.
        weight: :math:`w`, the weight of the dual direction; with 0 the loss is the document direction alone.
        document_weight: :math:`w_d`.

    Inputs:
        Those of ``loss``, with the columns negative_query_1 … negative_query_m where it needs mined texts.

    Relations:
        - DANCE: ``DualLoss(PairwiseLoss(model, temperature=0.01, similarity="cosine"), weight=0.1)``.
        - MNRL-Dual: ``DualLoss(ContrastiveLoss(model), weight=…)``; with both weights .5 and without mined queries
          it equals sentence-transformers' symmetric ``MultipleNegativesRankingLoss(directions=("query_to_doc",
          "doc_to_query"), partition_mode="per_direction")``.
        - Margin-MSE-Dual: ``DualLoss(MarginMSELoss(model, rows=rows), weight=…)``.

    Source: Li et al. 2021, DANCE, arXiv 2107.07773, section 3, with the weights of its released code.

    Example:
        ::

            from pt_dance.losses import DualLoss, PairwiseLoss

            loss = DualLoss(PairwiseLoss(model, temperature=0.01, similarity="cosine", rows=rows), weight=0.1)
    """

    two_sided = True
    shown = ("loss", "weight", "document_weight", *WrappedLoss.shown)
    citation = """
@article{li2021more,
    title={More Robust Dense Retrieval with Contrastive Dual Learning},
    author={Yizhi Li and Zhenghao Liu and Chenyan Xiong and Zhiyuan Liu},
    journal={arXiv preprint arXiv:2107.07773},
    year={2021},
    url={https://arxiv.org/abs/2107.07773},
}
"""

    def __init__(self, loss: RetrievalLoss, weight: float = 0.1, document_weight: float = 1.0) -> None:
        if weight == document_weight == 0:
            raise ValueError("weight and document_weight are both 0: nothing is left to train on")
        super().__init__(loss)
        if any(getattr(module, "two_sided", False) for module in loss.modules()):
            raise ValueError(f"{type(loss).__name__} has both directions already: DualLoss would count them twice")
        self.loss = loss
        self.weight = number("weight", weight, lowest=0)
        self.document_weight = number("document_weight", document_weight, lowest=0)
        if self.rows is not None:
            self.check_rows(self.rows)

    def check_rows(self, rows: TrainingRows, mined: str = "negatives") -> None:
        """Refuse rows that one of the directions cannot be computed of."""
        if self.weight:
            self.loss.check_rows(rows.mirrored, "query negatives")

    def loss_of(self, batch: Batch) -> Tensor:
        """Return the weighted sum of both directions."""
        terms = []
        if self.document_weight:
            terms.append(self.document_weight * self.loss.evaluate(batch))
        if self.weight:
            terms.append(self.weight * self.loss.evaluate(batch.mirrored()))
        return reduce(torch.add, terms)
