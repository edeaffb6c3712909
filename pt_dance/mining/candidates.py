"""What document and query mining share: from ranked candidates to a few negatives per query or document.

``source_column`` names what negatives are mined *for* (qid when documents are mined, docno when queries are mined) and
``candidate_column`` names what is mined.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pt_dance.mining.filters import Filter, MiningContext
from pt_dance.mining.readings import Readings
from pt_dance.storage import options
from pt_dance.storage.progress import progress_bar

SAMPLING = ("uniform", "top")


def check_options(depth: int, negatives: int, sampling: str, rank_range: tuple[int, int] | None) -> None:
    """Raise ValueError where an option of the mining functions makes no sense."""
    options.choice("sampling", sampling, SAMPLING)
    options.whole("depth", depth)
    options.whole("negatives", negatives)
    if rank_range is None:
        return
    is_pair = isinstance(rank_range, (tuple, list)) and len(rank_range) == 2
    if not is_pair or not all(map(options.is_whole, rank_range)) or not 0 <= rank_range[0] < rank_range[1]:
        raise ValueError(f"rank_range={rank_range!r} must be (first, last) with 0 <= first < last")


def random_keys(seed: int, source: pd.Series, candidate: pd.Series | np.ndarray) -> np.ndarray:
    """Return one reproducible pseudo-random uint64 a row, from the seed and the two ids alone.

    Taking the smallest keys of a query draws uniformly without replacement, and the draw does not depend on the
    order of the candidates or on how queries were cut into blocks.
    """
    with np.errstate(over="ignore"):
        mixed = pd.util.hash_array(source.to_numpy(dtype=object)) * np.uint64(0x9E3779B97F4A7C15)
        if not isinstance(candidate, np.ndarray):
            candidate = pd.util.hash_array(candidate.to_numpy(dtype=object))
        mixed ^= candidate
        mixed += np.uint64(seed % 2**64) * np.uint64(0xD1B54A32D192ED03)
        # splitmix64's finaliser: neighbouring inputs give unrelated outputs
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def share_of(qids: pd.Series, share: float, *, turn: int, seed: int) -> pd.Series:
    """Return a part of the queries, another one at every turn: no query has a second turn before all had their first.

    ANCE's release mines one fifth of the training queries a refresh.

    Args:
        qids: All queries.
        share: How large the part is, above 0 and at most 1.
        turn: Number of the refresh.
        seed: Fixes the order in which queries take turns.
    """
    if share == 1:
        return qids
    order = qids.iloc[np.argsort(random_keys(seed, qids, qids), kind="stable")]
    size = max(round(len(qids) * share), 1)
    return order.iloc[np.sort((turn * size + np.arange(size)) % len(qids))]


def reduce_results(results: pd.DataFrame) -> pd.DataFrame:
    """Return what mining needs of a result frame, in some 16 bytes a row instead of hundreds.

    Args:
        results: Ranked documents of queries: ``qid``, ``docno``, and ``rank`` or ``score``.

    Returns:
        A new frame: ``qid`` and ``docno`` as categories, ``rank`` (int32) and ``score`` (float32, or as it came where
        there are no ranks and it decides the order), as far as they are there; the rows in their order.
    """
    columns = {name: pd.Categorical(results[name]) for name in ("qid", "docno")}
    if "rank" in results.columns:
        columns["rank"] = results["rank"].to_numpy(dtype=np.int32)
    if "score" in results.columns:
        columns["score"] = results["score"].to_numpy(dtype=np.float32 if "rank" in columns else np.float64)
    return pd.DataFrame(columns)


def ranked(results: pd.DataFrame, source_column: str, candidate_column: str) -> pd.DataFrame:
    """Return the columns mining needs, each candidate once, with ``rank`` 0, 1, 2 … for each source as it came."""
    frame = pd.DataFrame({c: results[c].to_numpy(dtype=object) for c in (source_column, candidate_column)})
    frame["score"] = results["score"].to_numpy(dtype=np.float64) if "score" in results.columns else np.nan
    by = "rank" if "rank" in results.columns else "score"
    if by == "rank":
        frame["rank"] = results["rank"].to_numpy()
    order, ascending = [source_column, by, candidate_column], [True, by == "rank", True]
    frame = frame.sort_values(order, ascending=ascending, kind="stable")
    frame = frame.drop_duplicates([source_column, candidate_column])
    frame["rank"] = frame.groupby(source_column, sort=False).cumcount().to_numpy()
    return frame.reset_index(drop=True)


def pair_keys(frame: pd.DataFrame, readings: Readings) -> np.ndarray:
    """Return a hash of each row's qid and of what is read of its document, uint64 (rows,)."""
    return random_keys(0, frame["qid"], readings.documents(frame["docno"]))


def draw(frame: pd.DataFrame, number: int, sampling: str, seed: int, source_column: str, candidate_column: str):
    """Return at most ``number`` candidates of each source, drawn as ``sampling`` says, in rank order."""
    by = "rank"
    if sampling == "uniform":
        by, frame = "_key", frame.assign(_key=random_keys(seed, frame[source_column], frame[candidate_column]))
    frame = frame.sort_values([source_column, by], kind="stable").groupby(source_column, sort=False).head(number)
    return frame.drop(columns="_key", errors="ignore").sort_values([source_column, "rank"], kind="stable")


@dataclass
class CandidateSelection:
    """Cut, clean, filter and sample candidates block by block, and count what was done."""

    context: MiningContext
    source_column: str
    candidate_column: str
    depth: int
    negatives: int
    sampling: str
    rank_range: tuple[int, int] | None
    filters: Sequence[Filter]
    seed: int

    def __post_init__(self) -> None:
        check_options(self.depth, self.negatives, self.sampling, self.rank_range)
        self._positives = np.sort(pair_keys(self.context.pairs, self.context.readings))
        self.filters = list(self.filters)
        self.counts: Counter[str] = Counter()
        self.removed: Counter[str] = Counter()
        self._positive_ranks: list[int] = []

    def mine(
        self, sources: pd.Series, found: Iterable[list[tuple[pd.DataFrame, float]]], *, block: int, what: str,
        unit: str, verbose: bool,
    ) -> pd.DataFrame:  # fmt: skip
        """Return the negatives of all sources, in their order, with the report in ``attrs["mining"]``.

        Args:
            sources: The ids that negatives are mined for.
            found: For every block of them, the results of each source pipeline and that pipeline's weight.
            block: How many a block has.
            what: What is mined, for the progress bar.
            unit: What it counts.
            verbose: Whether to show it, and say how many got fewer negatives than asked.
        """
        columns = [self.source_column, self.candidate_column, "score", "rank"]
        parts = [pd.DataFrame(columns=columns)]
        with progress_bar(verbose, f"mining {what}", len(sources), unit=unit) as bar:
            for start, results in zip(range(0, len(sources), block), found, strict=True):
                ids = sources.iloc[start : start + block].tolist()
                parts.append(self.select(ids, results)[columns])
                bar.update(len(ids))
        mined = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
        order = pd.Series(range(len(sources)), index=sources.to_numpy())
        mined["_order"] = order.reindex(mined[self.source_column]).to_numpy()
        mined = mined.sort_values(["_order", "rank"], kind="stable").drop(columns="_order").reset_index(drop=True)
        mined = mined.astype({"score": "float64", "rank": "int64"})
        mined.attrs["mining"] = report = self.report()
        if verbose and report["short"]:
            print(
                f"{report['short']} of {report['sources']} {self.source_column}s got fewer than {report['asked']} "
                f"negatives ({report['none']} got none)"
            )
        return mined

    def clean(self, results: pd.DataFrame) -> pd.DataFrame:
        """Return a block's candidates: within depth and rank range, without any positive, through every filter."""
        frame = ranked(results, self.source_column, self.candidate_column)
        frame = frame[frame["rank"] < self.depth]
        self.counts["candidates"] += len(frame)
        positive = self._are_positive(frame)
        self._note_positives(frame, positive)
        frame = frame.assign(_positive=positive)
        if self.rank_range is not None:
            frame = self._keep(
                "rank range", frame, frame[frame["rank"].between(self.rank_range[0], self.rank_range[1] - 1)]
            )
        frame = self._keep("positives", frame, frame[~frame["_positive"]]).drop(columns="_positive")
        for a_filter in self.filters:
            frame = self._keep(repr(a_filter), frame, frame[np.asarray(a_filter(frame, self.context), dtype=bool)])
        return frame

    def _note_positives(self, frame: pd.DataFrame, positive: np.ndarray) -> None:
        """Note the rank of each source's best positive, and how many candidates are above it: all where none is found.

        What is above the best positive is as many as its rank.
        """
        best = frame.loc[positive].groupby(self.source_column, sort=False)["rank"].min()
        self._positive_ranks += best.tolist()
        without = ~frame[self.source_column].isin(best.index)
        self.counts["above positive"] += int(best.sum()) + int(without.sum())
        self.counts["not positive"] += int((~positive).sum())

    def _are_positive(self, frame: pd.DataFrame) -> np.ndarray:
        """Say which candidates are known to be relevant, copies of what is relevant among them."""
        if not len(self._positives):
            return np.zeros(len(frame), dtype=bool)
        keys = pair_keys(frame, self.context.readings)
        at = np.minimum(np.searchsorted(self._positives, keys), len(self._positives) - 1)
        return self._positives[at] == keys

    def _keep(self, reason: str, before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
        self.removed[reason] += len(before) - len(after)
        return after

    def select(self, block_sources: Sequence[str], weighted: Sequence[tuple[pd.DataFrame, float]]) -> pd.DataFrame:
        """Return a block's negatives, from a frame of results for each source pipeline and that pipeline's weight."""
        cleaned = [self.clean(results) for results, _ in weighted]
        self.counts["searches"] += len(block_sources) * len(weighted)
        if len(cleaned) == 1:
            chosen = draw(
                cleaned[0], self.negatives, self.sampling, self.seed, self.source_column, self.candidate_column
            )
        else:
            chosen = self._mix(cleaned, [weight for _, weight in weighted])
        found = chosen.groupby(self.source_column, sort=False).size().reindex(list(block_sources), fill_value=0)
        self.counts["sources"] += len(found)
        self.counts["negatives"] += int(found.sum())
        self.counts["short"] += int((found < self.negatives).sum())
        self.counts["none"] += int((found == 0).sum())
        return chosen

    def _mix(self, frames: list[pd.DataFrame], weights: list[float]) -> pd.DataFrame:
        quotas = _quotas(self.negatives, weights)
        key = [self.source_column, self.candidate_column]
        drawn, rest = [], []
        for number, (frame, quota) in enumerate(zip(frames, quotas, strict=True)):
            part = draw(frame, quota, self.sampling, self.seed + number, self.source_column, self.candidate_column)
            drawn.append(part.assign(_turn=0))
            rest.append(frame.assign(_turn=1 + number))
        # what one source lacks the others fill up, in the order the sources were given
        pool = pd.concat(drawn + rest).drop_duplicates(key, keep="first")
        pool = pool.sort_values([self.source_column, "_turn", "rank"], kind="stable")
        pool = pool.groupby(self.source_column, sort=False).head(self.negatives).drop(columns="_turn")
        return pool.sort_values([self.source_column, "rank", self.candidate_column], kind="stable")

    def report(self) -> dict[str, object]:
        """Return what was done: sources, negatives, how many sources got fewer than asked or none, removals by reason.

        ``positives`` says in how many ``searches`` (one for each source and pipeline) a positive was among the
        candidates (``found``), at which rank the best one was (``median_rank``), and how many of the candidates that
        are no positives (``candidates``) stood ``above`` it.
        """
        return {
            "asked": self.negatives,
            "sources": self.counts["sources"],
            "candidates": self.counts["candidates"],
            "negatives": self.counts["negatives"],
            "short": self.counts["short"],
            "none": self.counts["none"],
            "removed": dict(self.removed),
            "positives": {
                "searches": self.counts["searches"],
                "found": len(self._positive_ranks),
                "median_rank": float(np.median(self._positive_ranks)) if self._positive_ranks else None,
                "above": self.counts["above positive"],
                "candidates": self.counts["not positive"],
            },
        }


def _quotas(number: int, weights: Sequence[float]) -> list[int]:
    """Split ``number`` in proportion to ``weights``, by largest remainders."""
    total = sum(weights)
    exact = [number * weight / total for weight in weights]
    quotas = [int(share) for share in exact]
    order = sorted(range(len(weights)), key=lambda i: (quotas[i] - exact[i], i))
    for i in order[: number - sum(quotas)]:
        quotas[i] += 1
    return quotas
