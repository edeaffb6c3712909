"""SamToNe: texts of the same tower among the negatives."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from pt_dance.losses._batch import Batch, all_scores
from pt_dance.losses.base import RetrievalLoss
from pt_dance.losses.contrastive import cross_entropy
from pt_dance.storage.options import choice

SIDES = ("query", "both")


class SamToneLoss(RetrievalLoss):
    r"""The contrastive loss with same-tower negatives: a query's positive must also beat the other queries.

    With :math:`s(a, b) = \mathrm{sim}(a, b) / \tau` the query side is the mean over the rows i of

    .. math:: -\log \frac{e^{s(q_i, d_i^+)}}{\sum_{d \in C_i} e^{s(q_i, d)} + \sum_{j \ne i} e^{s(q_i, q_j)}}

    with the candidates :math:`C_i` of :class:`~pt_dance.losses.ContrastiveLoss`, mined negatives among them.
    ``sides="both"`` adds the mirrored term, in which the positive document is to find its query among the queries of
    the batch, their mined queries where there are any, and the other positive documents:

    .. math:: -\log \frac{e^{s(d_i^+, q_i)}}{\sum_{q \in C'_i} e^{s(d_i^+, q)} + \sum_{j \ne i} e^{s(d_i^+, d_j^+)}}

    With ``rows``, queries that share a relevant document and documents that share a query are no negatives of each
    other, nor is a query of itself where it stands in the batch twice, which the published loss punishes hard.

    Args:
        model: The SentenceTransformer to train.
        temperature: :math:`\tau`.
        similarity: "cosine" or "dot".
        sides: "query" or "both".
        rows: What is known of every training row.
        query_negatives, mini_batch_size: As in :class:`~pt_dance.losses.RetrievalLoss`.
        gather_across_devices: Also take the documents and queries of other processes as negatives.

    Inputs:
        Those of :class:`~pt_dance.losses.ContrastiveLoss`.

    Relations:
        - Without ``rows``, the query side equals sentence-transformers' ``MultipleNegativesRankingLoss(
          directions=("query_to_doc", "query_to_query"), partition_mode="joint")``, which has neither masks nor the
          both-sides form: its four directions in one softmax are GTE's loss and count the positive twice.

    Source: Moiseev et al. 2023, arXiv 2306.02516, section 2.

    Example:
        ::

            from pt_dance.losses import SamToneLoss

            loss = SamToneLoss(model, sides="both", rows=rows)
    """

    temperature = 0.05
    shown = (*RetrievalLoss.shown, "sides")
    citation = """
@inproceedings{moiseev2023samtone,
    title={SamToNe: Improving Contrastive Loss for Dual Encoder Retrieval Models with Same Tower Negatives},
    author={Fedor Moiseev and Gustavo Hernandez Abrego and Peter Dornbach and Imed Zitouni and
        Enrique Alfonseca and Zhe Dong},
    booktitle={Findings of the Association for Computational Linguistics: ACL 2023},
    year={2023},
    url={https://arxiv.org/abs/2306.02516},
}
"""

    def __init__(self, model: SentenceTransformer, *args: Any, sides: str = "query", **options: Any) -> None:
        self.sides = choice("sides", sides, SIDES)
        self.two_sided = sides == "both"
        super().__init__(model, *args, **options)

    def loss_of(self, batch: Batch) -> Tensor:
        """Return the query side, and with ``sides="both"`` the mirrored one added to it."""
        loss = self._one_side(batch)
        return loss + self._one_side(batch.mirrored()) if self.two_sided else loss

    def _one_side(self, batch: Batch) -> Tensor:
        same_tower = all_scores(batch.queries[batch.local], batch.queries)
        same_tower = same_tower.masked_fill(batch.rows.hidden_queries, -torch.inf)
        logits = torch.cat([batch.candidate_scores(), same_tower], dim=1) / self.temperature
        return cross_entropy(batch, logits, batch.local.start)
