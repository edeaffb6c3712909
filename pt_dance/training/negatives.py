"""The negatives of a round, from whatever source its options name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd

from pt_dance.mining import mine_documents, mine_queries, needs_dense, resolve_source
from pt_dance.training.inputs import TrainingInput

# What a source that is made of the current model may look at, however deep negatives are mined from it.
_RESULTS = 1000


def mine(
    what: str,
    round_,
    training: TrainingInput,
    corpus,
    retriever: Callable,
    *,
    qids: pd.Series,
    seed: int,
    engine: Any,
    verbose: bool,
) -> pd.DataFrame | None:
    """Mine a round's document or query negatives.

    How many results a user of the retriever gets makes no difference: sources that are made of the current model can
    look at the best 1,000 documents, or as many as the round's ``depth``.

    Args:
        what: "negatives" or "query_negatives".
        round_: ``Round`` with the source and the options of mining.
        training: The checked training input.
        corpus: ``Corpus`` with the documents.
        retriever: Makes the current model's ``DenseRetriever`` with so many results; only called where it is needed.
        qids: Topics to mine for.
        seed: Fixes the draw.
        engine: Has workers that search; this process does where None.
        verbose: Shows progress.

    Returns:
        The frame of :func:`pt_dance.mining.mine_documents` or :func:`pt_dance.mining.mine_queries`; None where the
        round has no source of these negatives.
    """
    source = getattr(round_, what)
    if source is None or (what == "query_negatives" and not round_.is_dual):
        return None
    options = dict(
        depth=round_.depth, negatives=round_.negatives_per_query, sampling=round_.sampling,
        rank_range=round_.rank_range, filters=round_.filters, seed=seed, qids=qids, reads=training.readings,
        engine=engine, verbose=verbose,
    )  # fmt: skip
    results = max(round_.depth, _RESULTS)
    if what == "negatives":
        dense = retriever(results) if needs_dense(source) else None
        if dense is not None:
            dense.verbose = False  # mining has a bar of its own
        sources = resolve_source(source, dense=dense, first_stage=training.first_stage)
        if not sources:
            return None
        return mine_documents(sources, training.topics, training.qrels, corpus, **options)
    if source == "dense":
        index = retriever(results).index
        return mine_queries(index.encoder, training.topics, training.qrels, corpus, index=index, **options)
    return mine_queries(source, training.topics, training.qrels, corpus, **options)


def report(frame: pd.DataFrame, earlier: Iterable[pd.DataFrame]) -> dict:
    """Return what the history tells of mined negatives; those of ``earlier`` rounds come the latest first.

    That is the counts of mining, ``per_source`` (negatives for each query or document) and, after earlier rounds,
    ``new`` (the share of negatives that the round before did not have).
    """
    counts = frame.attrs["mining"]
    about = {**counts, "per_source": counts["negatives"] / max(counts["sources"], 1)}
    before = next(iter(earlier), None)
    if before is not None:
        about["new"] = float(are_new(frame, before).mean())
    return about


def are_new(frame: pd.DataFrame, before: pd.DataFrame) -> np.ndarray:
    """Say which negatives an earlier round did not have, bool (rows,)."""
    known = pd.MultiIndex.from_frame(before[["qid", "docno"]])
    return ~pd.MultiIndex.from_frame(frame[["qid", "docno"]]).isin(known)
