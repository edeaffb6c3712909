"""What is reported of an embedding space: measures with intervals, and what the figures need."""

from __future__ import annotations

import html
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pt_dance.analysis.sample import PairSample


@dataclass(frozen=True, repr=False)
class SpaceReport:
    """What :func:`space` found out about an encoder.

    Attributes:
        measures: A row a measure: ``measure``, ``of`` (queries, documents, both, pairs, q→d, d→q), ``value``, and
            ``low`` and ``high``, the ends of its 95 % bootstrap interval (NaN where it has none).
        sample: The pairs and the pool all measures are of.
        settings: ``t``, ``resamples``, ``dimension``, and counts of zero vectors and of small denominators.
        queries: Normalised vectors of the sample's queries, float32 (q, d).
        documents: Normalised vectors of the pairs' documents, float32 (n, d).
        distributions: Values behind the figures by name: ``pair`` and ``random pair`` (squared distances of a query and
            its relevant, or another pair's, document), ``best`` (cosine of a query and the best of the pool), ``ratio``
            (SamToNe's).
        spectra: Share of variance along the principal components, largest first, of ``queries``, ``documents``
            and ``both``.
        found: How often each was found, by direction (``"q→d"``, ``"d→q"``) and k.
    """

    measures: pd.DataFrame
    sample: PairSample
    settings: dict[str, float]
    queries: np.ndarray
    documents: np.ndarray
    distributions: dict[str, np.ndarray]
    spectra: dict[str, np.ndarray]
    found: dict[tuple[str, int], np.ndarray]

    def value(self, measure: str, of: str) -> float:
        """Return the value of one measure.

        Raises:
            KeyError: If there is no such measure.
        """
        row = self.measures[(self.measures["measure"] == measure) & (self.measures["of"] == of)]
        if row.empty:
            known = ", ".join(f"{r.measure!r} of {r.of!r}" for r in self.measures.itertuples())
            raise KeyError(f"there is no measure {measure!r} of {of!r}; there are {known}")
        return float(row["value"].iloc[0])

    def __repr__(self) -> str:
        return f"<SpaceReport: {describe_sample(self)}>"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(describe_sample(self))}</p>" + self.measures.to_html(
            index=False, float_format=lambda value: f"{value:.4f}", border=0
        )


def describe_sample(report: SpaceReport) -> str:
    """Say in a sentence what the numbers of a report are of."""
    drawn = report.sample
    every = "all" if len(drawn.pairs) == drawn.available else f"{len(drawn.pairs):,} of"
    pool = "the whole corpus" if len(drawn.docnos) >= drawn.corpus_size else f"of {drawn.corpus_size:,} in the corpus"
    resamples = report.settings["resamples"]
    intervals = f"; 95 % intervals from {resamples} bootstrap resamples of the pairs" if resamples else ""
    return (
        f"{every} {drawn.available:,} relevant pairs ({len(drawn.qids):,} queries, {drawn.paired:,} documents); "
        f"searches among {len(drawn.docnos):,} documents ({pool}); seed {drawn.seed}{intervals}"
    )


class MeasureTable:
    """Measures as they are found, each with the interval that its resamples give."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []

    def add(self, measure: str, of: str, values: np.ndarray, *, is_share: bool = False) -> None:
        """Add a measure.

        Args:
            measure: Its name.
            of: What it is of.
            values: (1 + resamples,), its value and those of the resamples, on which the interval is centred.
            is_share: Whether it lies between 0 and 1, and so must its interval.
        """
        value, resampled = float(values[0]), values[1:]
        low = high = float("nan")
        if len(resampled):
            low, high = value + np.quantile(resampled, [0.025, 0.975]) - resampled.mean()
            if is_share:
                low, high = max(low, 0.0), min(high, 1.0)
        self.rows.append({"measure": measure, "of": of, "value": value, "low": low, "high": high})

    def frame(self) -> pd.DataFrame:
        """Return a row a measure."""
        return pd.DataFrame(self.rows, columns=["measure", "of", "value", "low", "high"])
