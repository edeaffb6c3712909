"""Alignment and uniformity on the unit sphere as regularisers."""

from __future__ import annotations

import torch
from torch import Tensor

from pt_dance.losses._batch import Batch, all_scores
from pt_dance.losses.base import RetrievalLoss, WrappedLoss
from pt_dance.losses.rows import TrainingRows
from pt_dance.storage.options import number


class RegularizedLoss(WrappedLoss):
    r"""A loss plus alignment and uniformity of the embeddings.

    With all embeddings divided by their L2 norm:

    .. math::
        L + w_a \, \mathrm{E} \lVert q_i - d_i^+ \rVert^\alpha
          + w_u \, \tfrac12 \big( U(q) + U(d^+) \big), \qquad
        U(x) = \log \mathrm{E}_{i < j} \, e^{-t \lVert x_i - x_j \rVert^2}

    Uniformity is over the queries and over the positive documents of the batch. With ``rows``, pairs of queries that
    are the same or share a relevant document are left out, and likewise pairs of documents, since uniformity drives
    every pair it sees apart; where no pair is left it is 0.

    Args:
        loss: Any other loss of this module.
        alignment: :math:`w_a`.
        uniformity: :math:`w_u`.
        alpha: :math:`\alpha`.
        t: :math:`t`; 5 in DANCE's release, 2 in Wang & Isola.
        uniformity_sum: Add up the uniformity of queries and of documents, as DANCE's release does, instead of halving
            the sum, as Wang & Isola do.

    Inputs:
        Those of ``loss``.

    Source: Wang & Isola 2020, arXiv 2005.10242, section 4.1; as an option of DANCE's released code (Li et al. 2021,
    arXiv 2107.07773), where both weights are 0 by default.

    Example:
        ::

            from pt_dance.losses import DualLoss, PairwiseLoss, RegularizedLoss

            dance = DualLoss(PairwiseLoss(model, temperature=0.01, similarity="cosine", rows=rows), weight=0.1)
            loss = RegularizedLoss(dance, alignment=0.1, uniformity=0.1)
    """

    two_sided = True  # both regularisers are the same for queries and for documents
    shown = ("loss", "alignment", "uniformity", "alpha", "t", "uniformity_sum", *WrappedLoss.shown)
    citation = """
@inproceedings{wang2020understanding,
    title={Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere},
    author={Tongzhou Wang and Phillip Isola},
    booktitle={International Conference on Machine Learning},
    year={2020},
    url={https://arxiv.org/abs/2005.10242},
}
"""

    def __init__(
        self,
        loss: RetrievalLoss,
        alignment: float = 0.0,
        uniformity: float = 0.0,
        alpha: float = 2.0,
        t: float = 5.0,
        uniformity_sum: bool = False,
    ) -> None:
        if alignment == uniformity == 0:
            raise ValueError("alignment and uniformity are both 0: RegularizedLoss would change nothing")
        super().__init__(loss)
        self.loss = loss
        self.alignment = number("alignment", alignment, lowest=0)
        self.uniformity = number("uniformity", uniformity, lowest=0)
        self.alpha = number("alpha", alpha, above=0)
        self.t = number("t", t, above=0)
        self.uniformity_sum = bool(uniformity_sum)

    def check_rows(self, rows: TrainingRows, mined: str = "negatives") -> None:
        """Refuse rows that the loss inside cannot be computed of."""
        self.loss.check_rows(rows, mined)

    def loss_of(self, batch: Batch) -> Tensor:
        """Return the loss inside and the weighted regularisers."""
        loss = self.loss.evaluate(batch)
        unit = batch.unit()
        if self.alignment:
            squared = self._distances(unit)
            # The root of 0 has no derivative, so below alpha = 2 a distance of 0 counts as 1e-6.
            power = squared if self.alpha == 2 else squared.clamp_min(1e-12) ** (self.alpha / 2)
            loss = loss + self.alignment * batch.mean(power, batch.rows.real)
        if self.uniformity:
            both = self._uniformity(unit) + self._uniformity(unit.mirrored())
            loss = loss + self.uniformity * (both if self.uniformity_sum else both / 2)
        return loss

    def _distances(self, unit: Batch) -> Tensor:
        queries, documents = unit.queries[unit.local], unit.positives[unit.local]
        if documents.ndim == 2:
            return (queries - documents).square().sum(-1)
        return (2 - 2 * unit.row_scores()[0][:, 0]).clamp_min(0)  # to the best passage

    def _uniformity(self, batch: Batch) -> Tensor:
        distinct, count = batch.rows.distinct_queries
        if not count:
            return batch.queries.sum() * 0
        squared = 2 - 2 * all_scores(batch.queries, batch.queries)
        return torch.logsumexp((-self.t * squared)[distinct], dim=0) - torch.log(squared.new_tensor(count))
