"""Query negatives: training queries that look like queries of a document but are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import pyterrier as pt

from pt_dance.mining.candidates import CandidateSelection
from pt_dance.mining.filters import Filter, MiningContext
from pt_dance.mining.judgements import positive_pairs
from pt_dance.mining.readings import Readings
from pt_dance.retriever.nearest_queries import encoded_vectors, nearest_queries
from pt_dance.storage import options


def mine_queries(
    source: Any,
    topics: pd.DataFrame,
    qrels: pd.DataFrame,
    corpus=None,
    *,
    index=None,
    depth: int = 200,
    negatives: int = 20,
    sampling: str = "uniform",
    rank_range: tuple[int, int] | None = None,
    filters: Sequence[Filter] = (),
    seed: int = 42,
    qids: pd.Series | None = None,
    reads: object = None,
    document_block: int = 1000,
    verbose: bool = False,
) -> pd.DataFrame:
    """Mine query negatives: for each positive document, training queries close to it for which it is not relevant.

    DANCE (arXiv 2107.07773) searches an index over **all** training queries with the vectors of the positive documents:
    the top 200, without every query for which the document is relevant, 20 drawn uniformly.

    Args:
        source: A ``DualEncoder``, whose query vectors make the index that is searched; or a PyTerrier pipeline over the
            training queries (a BM25 index of them, say) that takes a frame of ``qid`` (a docno) and ``query`` (the
            document's text) and gives back queries' qids in the column ``docno``.
        topics: All training queries, columns ``qid`` and ``query``. Of topics that read the same only the first is a
            candidate.
        qrels: Columns ``qid``, ``docno``, ``label``; a label above 0 is a positive.
        corpus: ``Corpus`` with the positive documents' texts; not needed where ``index`` holds their vectors, unless
            filters read texts.
        index: ``DenseIndex`` made with the same weights as ``source``, whose stored vectors are searched with instead
            of encoding the documents once more.
        depth: How many of the best queries of a document are candidates.
        negatives: How many query negatives a document gets at most.
        sampling: ``"uniform"`` or ``"top"``, as in :func:`mine_documents`.
        rank_range: As in :func:`mine_documents`.
        filters: As in :func:`mine_documents`.
        seed: Fixes the draw.
        qids: Mine for the positive documents of these topics only; all topics are candidates all the same.
        reads: As in :func:`mine_documents`; ``source`` where that is an encoder and nothing else is given.
        document_block: How many documents are searched with at a time; bounds memory, does not change the result.
        verbose: Shows a progress bar and says how many documents got fewer negatives than asked.

    Returns:
        A frame with columns ``docno`` (the positive document), ``qid`` (the query negative), ``score`` (float64),
        ``rank`` (int), ordered by docno as the positives come and by rank; ``attrs["mining"]`` as in
        :func:`mine_documents`.

    Raises:
        ValueError: If an option makes no sense, ``index`` holds other weights, or neither corpus nor index is given.
        KeyError: If a column is missing or a positive document is not in the corpus.
    """
    is_encoder = not isinstance(source, pt.Transformer) or hasattr(source, "encode_queries")
    if reads is None and hasattr(source, "reading_digests"):
        reads = source
    readings = Readings.of(reads, corpus)
    pairs = positive_pairs(topics, qrels, readings)
    selection = CandidateSelection(
        MiningContext(topics, pairs, corpus, readings),
        source_column="docno",
        candidate_column="qid",
        depth=depth,
        negatives=negatives,
        sampling=sampling,
        rank_range=rank_range,
        filters=filters,
        seed=seed,
    )
    wanted = pairs if qids is None else pairs[pairs["qid"].isin(qids)]
    documents = wanted["docno"].drop_duplicates().reset_index(drop=True)
    topics = topics[["qid", "query"]]
    topics = topics[~pd.Series(readings.queries(topics["query"]), index=topics.index).duplicated()]
    if is_encoder:
        search = _vector_search(source, topics, corpus, index, depth)
    elif corpus is None:
        raise ValueError("mining queries with a pipeline needs corpus=..., whose texts are the pipeline's queries")
    else:
        search = _pipeline_search(source, topics, corpus, depth)
    size = options.whole("document_block", document_block)
    return selection.mine(
        documents, lambda part: [(search(documents.iloc[part].tolist()), 1.0)], block=size, what="queries", unit="doc",
        verbose=verbose,
    )  # fmt: skip


def _vector_search(encoder, topics: pd.DataFrame, corpus, index, depth: int):
    """Return a function from docnos to the queries nearest to these documents' vectors."""
    queries = topics.sort_values("qid", kind="stable")
    qids = queries["qid"].to_numpy(dtype=object)
    if index is not None:
        if index.fingerprint != encoder.fingerprint:
            raise ValueError("the index was made with other weights than the encoder has; refresh it first")
    elif corpus is None:
        raise ValueError("mining queries needs corpus=... (texts to encode) or index=... (stored vectors)")
    texts = queries["query"].tolist()
    vectors = encoder.encode_queries(texts, precision=None if index is None else index.precision)

    def search(docnos: list[str]) -> pd.DataFrame:
        if index is not None:
            found, owner = index.stored_vectors(docnos)
        else:
            found, owner = encoded_vectors(encoder.encode_docs, corpus, docnos)
        scores, rows = nearest_queries(found, owner, vectors, depth)
        return pd.DataFrame(
            {
                "docno": pd.Series(docnos, dtype=object).repeat(rows.shape[1]).to_numpy(),
                "qid": qids[rows.ravel()],
                "score": scores.ravel(),
                "rank": list(range(rows.shape[1])) * len(docnos),
            }
        )

    return search


def _pipeline_search(pipeline: pt.Transformer, topics: pd.DataFrame, corpus, depth: int):
    """Return a function from docnos to the queries that a pipeline finds with these documents' texts."""
    cut = (pipeline % depth).compile()
    known = set(topics["qid"])

    def search(docnos: list[str]) -> pd.DataFrame:
        found: pd.DataFrame = cut(pd.DataFrame({"qid": docnos, "query": corpus.texts(docnos)}))
        found = found.drop(columns="query", errors="ignore").rename(columns={"qid": "docno", "docno": "qid"})
        return found[found["qid"].isin(known)]

    return search
