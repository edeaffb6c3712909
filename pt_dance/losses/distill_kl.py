"""Listwise distillation: the distribution over a row's candidates as a teacher sees it."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from pt_dance.losses._batch import Batch
from pt_dance.losses.base import RetrievalLoss
from pt_dance.storage.options import number


class DistillKLLoss(RetrievalLoss):
    r"""The Kullback-Leibler divergence between a teacher's distribution over the row's candidates and the model's.

    With :math:`s(q, d) = \mathrm{sim}(q, d) / \tau`, the teacher's raw scores :math:`T` divided by :math:`\tau_T`, and
    both softmaxes over the row's positive and its mined negatives :math:`C`, the loss is the mean over the rows of

    .. math:: \sum_{d \in C} p_T(d) \, \big( \log p_T(d) - \log p_s(d) \big), \qquad
        p_T = \mathrm{softmax}(T(q, \cdot) / \tau_T), \quad p_s = \mathrm{softmax}(s(q, \cdot))

    There are no in-batch negatives. With ``rows``, mined negatives that are relevant to the query by any training
    judgement, and missing ones, are no candidates, and rows without any other negative are left out of the mean.

    Args:
        model: The SentenceTransformer to train.
        temperature: :math:`\tau`, .05 by default, with which cosines can express a decided teacher's preferences; for
            raw dot products take 1.
        similarity: "cosine" (the default) or "dot".
        teacher_temperature: :math:`\tau_T`. Raw scores of a cross-encoder often differ by 10 and more, so that nearly
            all of the teacher's mass is on one candidate; a higher temperature lets the others count.
        rows: What is known of every training row, the teacher's scores included.
        query_negatives, mini_batch_size: As in :class:`~pt_dance.losses.RetrievalLoss`.
        gather_across_devices: Average over the rows of all processes, not over each one's own.

    Inputs:
        Those of :class:`~pt_dance.losses.MarginMSELoss`: a softmax does not change when all scores are shifted, so
        margins say as much as scores.

    Relations:
        - Without ``rows`` it equals sentence-transformers' ``DistillKLDivLoss``, which has no masks, divided by the
          square of its student temperature.
        - In the dual direction (:class:`~pt_dance.losses.DualLoss`) the candidates are the row's query and its mined
          queries, by the teacher's scores of these with the positive document.
        - :class:`~pt_dance.losses.MarginMSELoss` asks the model for the teacher's margins themselves; here large ones
          are all alike, as their probabilities are.

    Source: Lin et al. 2020, arXiv 2010.11386, eq. 6; over mined candidates as in Ren et al. 2021, RocketQAv2,
    arXiv 2110.07367, section 3.2.

    Example:
        ::

            from pt_dance.losses import DistillKLLoss

            loss = DistillKLLoss(model, rows=rows)  # rows with teacher_positive and teacher_negatives
    """

    temperature = 0.05
    needs_teacher = True
    shown = (*RetrievalLoss.shown, "teacher_temperature")
    citation = """
@misc{lin2020distillingdenserepresentationsranking,
      title={Distilling Dense Representations for Ranking using Tightly-Coupled Teachers},
      author={Sheng-Chieh Lin and Jheng-Hong Yang and Jimmy Lin},
      year={2020},
      eprint={2010.11386},
      archivePrefix={arXiv},
      primaryClass={cs.IR},
      url={https://arxiv.org/abs/2010.11386},
}
"""

    def __init__(
        self, model: SentenceTransformer, *args: Any, teacher_temperature: float = 1.0, **options: Any
    ) -> None:
        self.teacher_temperature = number("teacher_temperature", teacher_temperature, above=0)
        super().__init__(model, *args, **options)

    def loss_of(self, batch: Batch) -> Tensor:
        """Return the mean divergence of the rows that have a usable mined negative."""
        positive, negatives = batch.row_scores()
        student = torch.cat([positive, negatives], dim=1) / self.temperature
        margins = batch.teacher_margins().to(student)
        teacher = torch.cat([torch.zeros_like(positive), -margins], dim=1) / self.teacher_temperature
        usable, counted = batch.rows.usable_negatives, None
        hidden = torch.zeros_like(student, dtype=torch.bool)
        if usable is not None:
            counted = usable.any(dim=1)
            hidden[:, 1:] = ~usable[batch.local]
        student, teacher = (scores.masked_fill(hidden, -torch.inf).log_softmax(1) for scores in (student, teacher))
        # Where a candidate is hidden both are -inf, and its difference counts as 0.
        divergence = (teacher.exp() * (teacher - student).masked_fill(hidden, 0)).sum(dim=1)
        return batch.mean(divergence, counted)
