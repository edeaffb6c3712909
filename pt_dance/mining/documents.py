"""Document negatives from any PyTerrier pipeline."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import pyterrier as pt

from pt_dance.mining.candidates import CandidateSelection
from pt_dance.mining.filters import Filter, MiningContext
from pt_dance.mining.judgements import positive_pairs
from pt_dance.mining.readings import Readings
from pt_dance.mining.sources import resolve_source
from pt_dance.storage import options


def mine_documents(
    source: object,
    topics: pd.DataFrame,
    qrels: pd.DataFrame,
    corpus=None,
    *,
    depth: int = 200,
    negatives: int = 20,
    sampling: str = "uniform",
    rank_range: tuple[int, int] | None = None,
    filters: Sequence[Filter] = (),
    seed: int = 42,
    qids: pd.Series | None = None,
    reads: object = None,
    query_block: int = 1000,
    verbose: bool = False,
) -> pd.DataFrame:
    """Mine hard negatives: documents that a pipeline ranks high and that are not known to be relevant.

    ANCE (arXiv 2007.00808) mines this way from the index of the model in training: the top 200 of each training query,
    known positives removed, 20 drawn uniformly. **All** positives of a query are removed, also those of another topic
    that reads the same, and copies of them under other docnos.

    Args:
        source: A PyTerrier pipeline that takes queries and gives ranked documents; or a result frame; or a list of
            these or of ``(source, weight)`` pairs, from which negatives are drawn in proportion to the weights (1 where
            none is given), one source filling up what another lacks.
        topics: Queries to mine for, columns ``qid`` and ``query``; further columns are handed to the pipeline.
        qrels: Columns ``qid``, ``docno``, ``label``; a label above 0 is a positive.
        corpus: ``Corpus``; without it copies of a positive are not recognised, and filters cannot read texts.
        depth: How many of the best documents of a query are candidates.
        negatives: How many negatives a query gets at most.
        sampling: ``"uniform"`` draws among the candidates without replacement, ``"top"`` takes the best ranked.
        rank_range: ``(first, last)``: only candidates with first <= rank < last, ranks starting at 0.
        filters: False-negative filters, applied in order, see :mod:`pt_dance.mining.filters`.
        seed: Fixes the draw, which depends on nothing else but the ids.
        qids: Mine for these topics only; positives of all are removed all the same.
        reads: ``DualEncoder`` that is trained, or :class:`Readings`: what it reads of texts decides which are the same.
            None compares them letter by letter.
        query_block: How many queries are retrieved at a time; bounds memory, does not change the result.
        verbose: Shows a progress bar and says how many queries got fewer negatives than asked.

    Returns:
        A frame with columns ``qid``, ``docno``, ``score`` (float64, the source's), ``rank`` (int, position among the
        source's documents, from 0), ordered by qid as in ``topics`` and then by rank. ``attrs["mining"]`` counts
        queries, negatives, queries that got fewer than asked (``short``), queries that got none (``none``), and
        removals by reason.

    Raises:
        ValueError: If an option makes no sense.
        KeyError: If a column is missing.
    """
    readings = Readings.of(reads, corpus)
    selection = CandidateSelection(
        MiningContext(topics, positive_pairs(topics, qrels, readings), corpus, readings),
        source_column="qid",
        candidate_column="docno",
        depth=depth,
        negatives=negatives,
        sampling=sampling,
        rank_range=rank_range,
        filters=filters,
        seed=seed,
    )
    pipelines = resolve_source(source)
    topics = topics.drop_duplicates("qid")
    if qids is not None:
        topics = topics[topics["qid"].isin(qids)]
    size = options.whole("query_block", query_block)

    def search(part: slice) -> list[tuple[pd.DataFrame, float]]:
        return [(_results(pipeline, topics.iloc[part], depth), weight) for pipeline, weight in pipelines]

    return selection.mine(topics["qid"], search, block=size, what="documents", unit="query", verbose=verbose)


def _results(source: pt.Transformer | pd.DataFrame, topics: pd.DataFrame, depth: int) -> pd.DataFrame:
    if isinstance(source, pd.DataFrame):
        results = source[source["qid"].isin(topics["qid"])]
    else:
        results = (source % depth).compile()(topics)
    if "docno" not in results.columns:
        raise KeyError(f"the negative source {source!r} gave no column 'docno' (columns: {list(results.columns)})")
    return results
