"""What mining gave, round by round: how hard the negatives are, how many are new, which may be relevant after all."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pt_dance.mining.filters import jaccard, shingles_of
from pt_dance.storage.display import cut
from pt_dance.storage.options import number, whole
from pt_dance.training.record import read_record, source_of
from pt_dance.training.run_folder import RunFolder

_BLOCK_ROWS = 500
REASONS = ("near-duplicate", "margin", "teacher")


@dataclass(frozen=True, repr=False)
class MiningReport:
    """What :func:`mining` found out about a run.

    Attributes:
        rounds: A row a round that mined: ``round``, ``name``, ``source``; ``queries`` and ``negatives`` (numbers);
            ``new`` (share that the round before did not have); ``rank 10 %``, ``rank 50 %``, ``rank 90 %`` (of the
            negatives, among what the source found, from 0); ``positive found`` (share of queries with a positive within
            the depth), ``positive rank`` (median of the best one's, of those); ``above positive`` (share of the
            candidates that were ranked above the query's best positive); ``near-duplicate``, ``margin``, ``teacher``
            (shares of suspects among the negatives of the sampled queries). NaN where something is not known.
        examples: The most suspicious negatives of each round and reason: ``round``, ``reason``, ``qid``, ``query``,
            ``docno``, ``text``, ``positive`` (docno), ``positive_text``, and ``value``: similarity of the texts, or how
            far the negative's score is above the positive's. Texts are cut.
        sampled: How many queries a round's suspects were looked for in, at most.
    """

    rounds: pd.DataFrame
    examples: pd.DataFrame
    sampled: int

    def __repr__(self) -> str:
        return f"<MiningReport: {len(self.rounds)} rounds, {len(self.examples)} examples>"

    def _repr_html_(self) -> str:
        shown = (
            frame.to_html(index=False, float_format="{:.3f}".format, border=0) for frame in (self.rounds, self.examples)
        )
        note = f"suspects among the negatives of up to {self.sampled} queries a round"
        return f"<p>{html.escape(note)}</p>" + "".join(shown)


def mining(
    dance: Any,
    *,
    teacher: Callable[[pd.DataFrame], pd.DataFrame] | None = None,
    sample: int = 300,
    threshold: float = 0.8,
    margin: float = 0.95,
    examples: int = 3,
    seed: int = 42,
) -> MiningReport:
    """Tell what a run mined, and which of its negatives may be relevant.

    A negative is suspected where its text all but repeats a positive's (Jaccard similarity of four-word shingles),
    where the trained retriever gives it more than a share of its positive's score (NV-Retriever, arXiv 2407.15831), and
    where a teacher puts it above the positive (RocketQA, arXiv 2010.08191). Suspects are looked for among the negatives
    of the same sampled queries in every round.

    Args:
        dance: A fitted ``DanceRetriever`` with its run's folder.
        teacher: Pipeline that scores rows with ``qid``, ``query``, ``docno`` and ``text``, such as a cross-encoder.
        sample: How many queries suspects are looked for in.
        threshold: Similarity from which a text is a near-duplicate.
        margin: Share of the positive's score above which a negative is suspected.
        examples: How many examples are kept of each round and reason.
        seed: Fixes the sample.

    Raises:
        ValueError: If an option makes no sense or the folder has no record of what was mined.
    """
    for name, value in (("sample", sample), ("examples", examples), ("seed", seed)):
        whole(name, value, 0)
    for name, share in (("threshold", threshold), ("margin", margin)):
        number(name, share, above=0, highest=1)
    run = RunFolder(dance.path)
    if (stored := read_record(run)) is None:
        raise ValueError(f"{str(dance.path)!r} holds no record of training; it was saved without one, or not fitted")
    positives = stored[0]
    qids = np.sort(positives["qid"].unique())
    rng = np.random.default_rng(seed)
    qids = qids[np.sort(rng.choice(len(qids), min(sample, len(qids)), replace=False))] if sample else qids[:0]
    positives = positives[positives["qid"].isin(qids)]

    rows, shown = [], []
    for row in dance.history.itertuples():
        if (mined := run.read_frame(row.round, "negatives")) is None:
            continue
        negatives, about = mined
        told, suspects = _suspects(dance, negatives[negatives["qid"].isin(qids)], positives, teacher, threshold, margin)
        facts = {"round": row.round, "name": row.name, "source": source_of(run, row.round)}
        rows.append(facts | _of_frame(negatives, about) | told)
        for reason, frame in suspects.items():
            best = frame.sort_values(["value", "qid", "docno"], ascending=[False, True, True]).head(examples)
            shown.append(best.assign(round=row.round, reason=reason))
    return MiningReport(pd.DataFrame(rows, columns=_COLUMNS), _with_texts(shown, positives, dance.corpus), len(qids))


_COLUMNS = [
    "round", "name", "source", "queries", "negatives", "new", "rank 10 %", "rank 50 %", "rank 90 %", "positive found",
    "positive rank", "above positive", *REASONS,
]  # fmt: skip


def _of_frame(negatives: pd.DataFrame, about: dict) -> dict[str, float]:
    ranks = negatives["rank"].quantile([0.1, 0.5, 0.9]) if len(negatives) else [float("nan")] * 3
    positives = about.get("positives", {})
    ranked = {
        "positive found": positives["found"] / max(positives["searches"], 1),
        "positive rank": positives["median_rank"],
        "above positive": positives["above"] / max(positives["candidates"], 1),
    } if positives else {}  # fmt: skip
    return {
        "queries": negatives["qid"].nunique(),
        "negatives": len(negatives),
        "new": about.get("new", float("nan")),
        **dict(zip(("rank 10 %", "rank 50 %", "rank 90 %"), ranks, strict=True)),
        **ranked,
    }


def _suspects(
    dance: Any,
    negatives: pd.DataFrame,
    positives: pd.DataFrame,
    teacher: Callable | None,
    threshold: float,
    margin: float,
) -> tuple[dict[str, float], dict[str, pd.DataFrame]]:
    """Return the share of suspects by reason, and the suspects: qid, docno, positive, value."""
    if not len(negatives):
        return {}, {}
    columns = ["qid", "docno", "positive", "value"]
    texts = positives.rename(columns={"docno": "positive"})
    pairs = negatives[["qid", "docno"]].merge(texts[["qid", "positive"]], on="qid")
    alike = pairs.assign(value=text_similarity(pairs["docno"], pairs["positive"], dance.corpus.texts))
    alike = alike.sort_values("value", ascending=False, kind="stable").drop_duplicates(["qid", "docno"])
    found = {"near-duplicate": alike.loc[alike["value"] >= threshold, columns]}
    queries = positives[["qid", "query"]].drop_duplicates("qid")
    for reason, scorer, share in (("margin", dance, margin), ("teacher", teacher, None)):
        if scorer is None:
            continue
        best = _scored(scorer, positives[["qid", "docno"]], queries, dance.corpus, reason == "teacher")
        best = best.sort_values("score", ascending=False, kind="stable").drop_duplicates("qid")
        best = best[["qid", "docno", "score"]].rename(columns={"docno": "positive", "score": "best"})
        scored = _scored(scorer, negatives[["qid", "docno"]], queries, dance.corpus, reason == "teacher")
        scored = scored.merge(best, on="qid")
        # where a positive's score is not above 0, a share of it says nothing
        limit = scored["best"] if share is None else scored["best"].where(scored["best"] <= 0, share * scored["best"])
        scored["value"] = scored["score"] - scored["best"]
        found[reason] = scored.loc[scored["score"] > limit, columns]
    return {reason: len(frame) / len(negatives) for reason, frame in found.items()}, found


def _scored(scorer: Callable, pairs: pd.DataFrame, queries: pd.DataFrame, corpus: Any, with_text: bool) -> pd.DataFrame:
    parts = [pd.DataFrame({"qid": [], "docno": [], "score": []})]
    pairs = pairs.drop_duplicates().merge(queries, on="qid")
    for start in range(0, len(pairs), _BLOCK_ROWS):
        block = pairs.iloc[start : start + _BLOCK_ROWS]
        if with_text:
            block = block.assign(text=corpus.texts(block["docno"].tolist()))
        parts.append(scorer(block)[["qid", "docno", "score"]])
    return pd.concat(parts[1:] or parts, ignore_index=True)


def text_similarity(docnos: pd.Series, others: pd.Series, texts: Callable[[list[str]], list[str]]) -> np.ndarray:
    """Return how alike the texts of paired documents are: Jaccard similarity of their four-word shingles, (n,).

    Args:
        docnos: (n,), documents.
        others: (n,), what each is compared with.
        texts: Gives the texts of docnos.
    """
    similarity = np.empty(len(docnos))
    for start in range(0, len(docnos), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        pairs = zip(*(texts(side.iloc[block].tolist()) for side in (docnos, others)), strict=True)
        similarity[block] = [jaccard(shingles_of(text, 4), shingles_of(other, 4)) for text, other in pairs]
    return similarity


def _with_texts(shown: list[pd.DataFrame], positives: pd.DataFrame, corpus: Any) -> pd.DataFrame:
    columns = ["round", "reason", "qid", "query", "docno", "text", "positive", "positive_text", "value"]
    if not any(map(len, shown)):
        return pd.DataFrame(columns=columns)
    frame = pd.concat([part for part in shown if len(part)], ignore_index=True)
    frame = frame.merge(positives[["qid", "query"]].drop_duplicates("qid"), on="qid")
    for column, docno in (("text", "docno"), ("positive_text", "positive")):
        frame[column] = [cut(text) for text in corpus.texts(frame[docno].tolist())]
    return frame[columns].sort_values(["round", "reason", "value"], ascending=[True, True, False], ignore_index=True)
