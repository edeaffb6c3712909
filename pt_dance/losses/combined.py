"""Several losses of one batch."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from pt_dance.losses._batch import Batch
from pt_dance.losses.base import RetrievalLoss, WrappedLoss
from pt_dance.losses.rows import TrainingRows
from pt_dance.storage.options import number


class SumLoss(WrappedLoss):
    r"""The weighted sum of losses, :math:`\sum_k w_k L_k`, over columns that are embedded once.

    Args:
        losses: (loss, weight) pairs. The losses must be of one model and agree in ``rows``, ``query_negatives``,
            ``mini_batch_size`` and ``gather_across_devices``; similarity and temperature are each one's own.

    Inputs:
        Those that all of the losses take.

    Relations:
        - Margin-MSE and MNRL, both dual: ``DualLoss(SumLoss([(MarginMSELoss(model, rows=rows), 1.0),
          (ContrastiveLoss(model, rows=rows), 1.0)]), weight=…)``.

    Example:
        ::

            from pt_dance.losses import ContrastiveLoss, MarginMSELoss, SumLoss

            loss = SumLoss([(MarginMSELoss(model, rows=rows), 1.0), (ContrastiveLoss(model, rows=rows), 0.5)])
    """

    def __init__(self, losses: Iterable[tuple[RetrievalLoss, float]]) -> None:
        losses = list(losses)
        if not losses or any(not isinstance(pair, (tuple, list)) or len(pair) != 2 for pair in losses):
            raise ValueError("SumLoss needs a list of (loss, weight) pairs, one or more")
        super().__init__(*(loss for loss, _ in losses))
        self.losses = nn.ModuleList(loss for loss, _ in losses)
        self.weights = [number("weight", weight, lowest=0) for _, weight in losses]
        if not any(self.weights):
            raise ValueError("the weights of a SumLoss are all 0: nothing is left to train on")

    def check_rows(self, rows: TrainingRows, mined: str = "negatives") -> None:
        """Refuse rows that one of the losses cannot be computed of."""
        for loss, _ in self._weighted():
            loss.check_rows(rows, mined)

    def loss_of(self, batch: Batch) -> Tensor:
        """Return the weighted sum."""
        return reduce(torch.add, [weight * loss.evaluate(batch) for loss, weight in self._weighted()])

    def _weighted(self) -> list[tuple[RetrievalLoss, float]]:
        """Return the losses that count, with their weights."""
        pairs = zip(self.losses, self.weights, strict=True)
        return [(loss, weight) for loss, weight in pairs if isinstance(loss, RetrievalLoss) and weight]

    def get_config_dict(self) -> dict[str, Any]:
        """Return the options, as sentence-transformers writes them on model cards."""
        losses = {f"loss_{number}": loss for number, loss in enumerate(self.losses, start=1)}
        return {**losses, "weights": self.weights, **super().get_config_dict()}

    @property
    def citation(self) -> str:
        """BibTeX of the sources of all losses."""
        return "".join(dict.fromkeys(str(loss.citation) for loss in self.losses))
