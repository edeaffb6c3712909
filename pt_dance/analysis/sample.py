"""The sample of an analysis: the same relevant pairs, and the same documents around them, for every system."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pt_dance.storage.digests import text_id, texts_digest
from pt_dance.storage.options import whole

_BLOCK_TEXTS = 500


@dataclass(frozen=True)
class PairSample:
    """Relevant (query, document) pairs of a collection, and a pool of documents to search.

    Queries of the same text are one query, and documents of the same text one document, for no encoder can tell them
    apart; what is relevant to one is relevant to the other.

    Attributes:
        qids: The queries of the pairs, each once.
        queries: Their texts.
        docnos: The pool: first the documents of the pairs, each once, then everything else that is judged relevant to
            one of the queries, then documents drawn at random.
        paired: How many of the pool, its first ones, are documents of the pairs.
        pairs: int64 (p, 2), each pair's query and document by position in ``qids`` and ``docnos``.
        relevant: All that is judged relevant within the sample: ``query`` and ``document`` (positions) and ``label``.
        available: How many pairs there were to draw from.
        missing: How many relevant pairs were left out because the corpus lacks the document.
        corpus_size: How many documents the corpus has.
        seed: What fixed the draw.
    """

    qids: list[str]
    queries: list[str]
    docnos: list[str]
    paired: int
    pairs: np.ndarray
    relevant: pd.DataFrame
    available: int
    missing: int
    corpus_size: int
    seed: int

    @property
    def digest(self) -> str:
        """Identifies the sample: two reports compare only where theirs are equal."""
        parts = ["\x1f".join(self.qids), "\x1f".join(self.docnos), str(self.paired), self.pairs.tobytes().hex()]
        return text_id("\x1e".join(parts))


def draw(
    topics: pd.DataFrame, qrels: pd.DataFrame, corpus: Any, *, sample: int = 2000, pool: int = 5000, seed: int = 42
) -> PairSample:
    """Draw relevant pairs and a pool of documents; the draw does not depend on the order of rows.

    Arguments and errors are those of :func:`pt_dance.analysis.space`.
    """
    for name, value, lowest in (("sample", sample, 2), ("pool", pool, 0), ("seed", seed, 0)):
        whole(name, value, lowest)
    for name, frame, columns in (("topics", topics, ["qid", "query"]), ("qrels", qrels, ["qid", "docno", "label"])):
        for column in columns:
            if column not in frame.columns:
                raise KeyError(f"the {name} lack the column {column!r}; they have {sorted(map(str, frame.columns))}")
    text_of, judged, missing = _judgements(topics, qrels, corpus)
    if len(judged) < 2:
        raise ValueError(
            f"{len(judged)} relevant pairs of these topics, qrels and corpus are too few to analyse; give at least two"
        )
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(len(judged), min(sample, len(judged)), replace=False))
    pairs = judged.iloc[chosen]
    qids = pairs["qid"].drop_duplicates().tolist()
    paired = pairs["docno"].drop_duplicates().tolist()
    relevant = judged[judged["qid"].isin(set(qids))]
    docnos = list(dict.fromkeys([*paired, *relevant["docno"]]))
    docnos += _others(corpus, docnos, pool - len(docnos), rng)
    query_at, document_at = ({key: i for i, key in enumerate(keys)} for keys in (qids, docnos))
    return PairSample(
        qids=qids,
        queries=[text_of[qid] for qid in qids],
        docnos=docnos,
        paired=len(paired),
        pairs=np.column_stack([pairs["qid"].map(query_at), pairs["docno"].map(document_at)]).astype(np.int64),
        relevant=pd.DataFrame(
            {
                "query": relevant["qid"].map(query_at).to_numpy(),
                "document": relevant["docno"].map(document_at).to_numpy(),
                "label": relevant["label"].to_numpy(),
            }
        ),
        available=len(judged),
        missing=missing,
        corpus_size=len(corpus),
        seed=int(seed),
    )


def _judgements(topics: pd.DataFrame, qrels: pd.DataFrame, corpus: Any) -> tuple[dict, pd.DataFrame, int]:
    """Return queries' texts by qid, and relevant pairs in which texts, not names, tell queries and documents apart."""
    topics = topics[["qid", "query"]].drop_duplicates("qid").sort_values("qid", kind="stable")
    first = topics.groupby("query", sort=False)["qid"].transform("first")
    same = dict(zip(topics["qid"], first, strict=True))
    judged = qrels.loc[(qrels["label"] > 0) & qrels["qid"].isin(same), ["qid", "docno", "label"]]
    known = corpus.rows(judged["docno"].tolist()) >= 0 if len(judged) else np.zeros(0, dtype=bool)
    missing = int((~known).sum())
    judged = judged[known]
    judged = judged.assign(qid=judged["qid"].map(same))
    docnos = sorted(set(judged["docno"]))
    by_text: dict[bytes, str] = {}
    same_text = {docno: by_text.setdefault(digest, docno) for docno, digest in _digests(corpus, docnos)}
    judged = judged.assign(docno=judged["docno"].map(same_text))
    judged = judged.groupby(["qid", "docno"], sort=True, as_index=False)["label"].max()
    return dict(zip(topics["qid"], topics["query"], strict=True)), judged, missing


def _digests(corpus: Any, docnos: list[str]) -> Iterable[tuple[str, bytes]]:
    for start in range(0, len(docnos), _BLOCK_TEXTS):
        block = docnos[start : start + _BLOCK_TEXTS]
        for docno, text in zip(block, corpus.texts(block), strict=True):
            yield docno, texts_digest(text)


def _others(corpus: Any, taken: list[str], number: int, rng: np.random.Generator) -> list[str]:
    """Return docnos drawn at random, none of a text that is taken already."""
    if number <= 0:
        return []
    # as many more as are taken, for these may be drawn again
    rows = rng.choice(len(corpus), min(len(corpus), number + len(taken)), replace=False)
    seen = {digest for _, digest in _digests(corpus, taken)}
    others = []
    for docno, digest in _digests(corpus, list(corpus.docno(rows))):
        if digest not in seen:
            seen.add(digest)
            others.append(docno)
            if len(others) == number:
                break
    return others
