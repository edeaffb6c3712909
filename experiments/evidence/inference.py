"""What the numbers allow to say: differences with intervals over seeds and clusters of queries, and the claims."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm
from statsmodels.stats.multitest import multipletests

from evidence.data import stable_hash
from evidence.methods import BASELINES, SAME

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CLAIMS = Path(__file__).with_name("claims.toml")
AFTER = Path(__file__).with_name("claims_after.toml")
LEAST_SEEDS = 3
MAIN, ZERO_SHOT = "nDCG@10", "zero-shot nDCG@10"


@dataclass(frozen=True)
class Difference:
    """A mean difference, its bootstrap interval and standard error, and the two-sided p-value of their ratio.

    ``parts`` has mean, low and high of each training collection.
    """

    mean: float
    low: float
    high: float
    error: float
    p: float
    seeds: int
    parts: dict[str, tuple[float, float, float]]


def claims(file: Path = CLAIMS) -> tuple[pd.DataFrame, dict]:
    """The claims, one a row, and what decides them."""
    text = tomllib.loads(file.read_text())
    rows = pd.DataFrame(text.pop("claim"))
    rows["measure"] = rows["measure"].fillna(MAIN) if "measure" in rows else MAIN
    return rows, text


class Cells:
    """All cells of one encoder, each cut out once, as claims share them.

    Args:
        tables: by training collection, a row a query and measure and a column a cell, as
            :func:`evidence.tables.load` gives them.
    """

    def __init__(self, tables: dict[str, pd.DataFrame]) -> None:
        self._tables = tables
        self._queries: dict[tuple[str, str], dict[str, pd.DataFrame]] = {}
        self._selected: dict[tuple[str, str, str], dict[str, pd.DataFrame]] = {}

    @property
    def trained_on(self) -> list[str]:
        """The training collections."""
        return list(self._tables)

    def select(self, method: str, trained_on: str, measure: str) -> dict[str, pd.DataFrame]:
        """Values of a method by measured collection: a frame of queries (with their cluster) by seeds.

        Args:
            method: name of the method.
            trained_on: the training collection.
            measure: of ir_measures, or "zero-shot nDCG@10" for all other collections.
        """
        key = (SAME.get(method, method), trained_on, measure)
        if key not in self._selected:
            self._selected[key] = self._cut(*key)
        return self._selected[key]

    def _cut(self, method: str, trained_on: str, measure: str) -> dict[str, pd.DataFrame]:
        if (trained_on, measure) not in self._queries:
            self._queries[trained_on, measure] = self._of_queries(trained_on, measure)
        found = {}
        for name, part in self._queries[trained_on, measure].items():
            seeds = {cell: int(cell.rpartition("/")[2]) for cell in part if cell.rpartition("/")[0] == method}
            mine = part[list(seeds)].rename(columns=seeds)
            if len(mine := mine if mine.notna().all(axis=None) else mine.dropna(how="all")) and seeds:
                found[name] = mine
        return found

    def _of_queries(self, trained_on: str, measure: str) -> dict[str, pd.DataFrame]:
        """All cells of a training collection by measured collection, with one index for all methods."""
        table = self._tables[trained_on]
        wanted = (table["collection"] == trained_on) != (measure == ZERO_SHOT)
        wanted &= table["measure"] == (MAIN if measure == ZERO_SHOT else measure)
        parts = table[wanted].drop(columns="measure").set_index(["cluster", "qid"]).groupby("collection")
        return {str(name): part.drop(columns="collection").sort_index() for name, part in parts}


@lru_cache(maxsize=64)
def drawn(what: str, count: int, number: int) -> np.ndarray:
    """How often each seed or cluster is drawn in each bootstrap sample, the same for all who ask: number x count."""
    rng = np.random.default_rng([stable_hash(what), count])
    return rng.multinomial(count, np.full(count, 1 / count), size=number).astype(np.float32)


def resampled(
    better: pd.DataFrame, than: pd.DataFrame, number: int, trained_on: str, measured_on: str
) -> tuple[float, np.ndarray]:
    """The mean difference of two methods on one collection, and its bootstrap distribution.

    Seeds and clusters of queries are drawn with replacement, each on its own (Owen 2007, the pigeonhole bootstrap), so
    the interval holds for other seeds and other queries. Only seeds that both have count. What is drawn is drawn alike
    wherever it counts: a collection's queries for all encoders, an encoder's seeds for all collections.

    Args:
        better: queries × seeds.
        than: the same of the other.
        number: bootstrap samples.
        trained_on: the collection that the encoders were trained on.
        measured_on: the collection of the queries.
    """
    seeds = [s for s in better.columns if s in than.columns]
    if not better.index.equals(than.index):
        common = better.index.intersection(than.index)
        better, than = better.loc[common], than.loc[common]
    values = better[seeds].to_numpy(float) - than[seeds].to_numpy(float)
    cluster, names = pd.factorize(better.index.get_level_values("cluster"))
    sums = np.zeros((len(names), len(seeds)), dtype=np.float32)
    np.add.at(sums, cluster, values)
    counts = np.bincount(cluster, minlength=len(names)).astype(np.float32)
    clusters = drawn(f"clusters {measured_on}", len(names), number)
    of_seeds = drawn(f"seeds {trained_on}", len(seeds), number)
    means = (clusters @ sums * of_seeds).sum(1) / (clusters @ counts * len(seeds))
    return float(values.mean()), means


def as_many_seeds(*methods: dict[str, pd.DataFrame]) -> list[dict[str, pd.DataFrame]]:
    """Give a baseline that no seed changes, and which has one column, a column a seed of the other method."""
    seeds = max((frame.columns for method in methods for frame in method.values()), key=len)
    return [
        {
            name: frame if len(frame.columns) > 1 else pd.concat(dict.fromkeys(seeds, frame.iloc[:, 0]), axis=1)
            for name, frame in method.items()
        }
        for method in methods
    ]


def difference(
    cells: Cells, better: str, than: str | None, measure: str, *, confidence: float, number: int
) -> Difference | None:
    """The difference of two methods, averaged over the training collections that have both; None where none has.

    Where ``than`` is None, it is the one to 0: the mean of a method.

    Zero-shot differences are first averaged over the collections that are measured.
    """
    means: dict[str, float] = {}
    samples, seeds = [], []
    ends = (1 - confidence) / 2, (1 + confidence) / 2
    for trained_on in cells.trained_on:
        first = cells.select(better, trained_on, measure)
        second = {n: 0 * f for n, f in first.items()} if than is None else cells.select(than, trained_on, measure)
        both = [name for name in first if name in second]
        if not both:
            continue
        if better in BASELINES or than in BASELINES:
            first, second = as_many_seeds(first, second)
        parts = [resampled(first[name], second[name], number, trained_on, name) for name in both]
        means[trained_on] = float(np.mean([mean for mean, _ in parts]))
        samples.append(np.mean([sample for _, sample in parts], axis=0))
        seeds.append(len(first[both[0]].columns.intersection(second[both[0]].columns)))
    if not means:
        return None
    sample = np.mean(samples, axis=0)
    low, high = np.quantile(sample, ends)
    mean, error = float(np.mean(list(means.values()))), float(sample.std())
    by = {name: (means[name], *map(float, np.quantile(part, ends))) for name, part in zip(means, samples, strict=True)}
    # Shares of bootstrap samples beyond 0 could not be small enough for Holm's correction over all claims.
    p = float(2 * norm.sf(abs(mean) / error)) if error > 0 else float(mean == 0)
    return Difference(mean, float(low), float(high), error, p, min(seeds), by)


def compared(cells: Cells, rows: pd.DataFrame, *, confidence: float, number: int) -> pd.DataFrame:
    """Claims with their difference, interval, p-value, and what could have been seen; those without cells are left out.

    Args:
        cells: of one encoder.
        rows: what :func:`claims` gives.
        confidence: of the intervals.
        number: bootstrap samples.
    """
    found = [
        difference(cells, c.better, c.than, c.measure, confidence=confidence, number=number) for c in rows.itertuples()
    ]
    rows = rows.assign(found=found)
    rows = rows[rows["found"].notna()].reset_index(drop=True)
    for name in ("mean", "low", "high", "error", "p", "seeds", "parts"):
        rows[name] = [getattr(one, name) for one in rows["found"]]
    # a difference of 2.8 standard errors is seen four times out of five at the level of .05
    rows["could_see"] = 2.8 * rows["error"].astype(float)
    return rows.drop(columns="found")


def decide(cells: Cells, *, number: int) -> pd.DataFrame:
    """Every claim of one encoder, as :func:`compared` gives it, with Holm's p and the verdict."""
    rows, given = claims()
    rows = compared(cells, rows, confidence=given["confidence"], number=number)
    # With two seeds, a bootstrap over seeds has half of their variance.
    told = rows["seeds"] >= LEAST_SEEDS
    rows.loc[told, "p"] = multipletests(rows.loc[told, "p"], method="holm")[1] if told.any() else []
    rows.loc[~told, "p"] = np.nan
    margin = given["equivalence_margin"]
    rows["verdict"] = [
        "too few seeds so far" if seeds < LEAST_SEEDS
        else "holds" if p < 1 - given["confidence"] and low > 0
        else "the opposite" if p < 1 - given["confidence"] and high < 0
        else "no effect" if -margin < low and high < margin
        else "cannot be told here"
        for p, low, high, seeds in zip(rows["p"], rows["low"], rows["high"], rows["seeds"], strict=True)
    ]  # fmt: skip
    return rows
