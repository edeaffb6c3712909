"""Query negatives: training queries that look like queries of a document but are not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt

from pt_dance.mining.candidates import CandidateSelection
from pt_dance.mining.filters import Filter, MiningContext
from pt_dance.mining.judgements import positive_pairs
from pt_dance.mining.readings import Readings
from pt_dance.retriever.nearest_queries import encoded_vectors, nearest_queries
from pt_dance.storage import options
from pt_dance.storage.engine import check_engine, run


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
    engine: Any = None,
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
        engine: A :class:`pt_dance.engines.Ray`, whose workers search with a block of documents each, as in
            :func:`mine_documents`.
        verbose: Shows a progress bar and says how many documents got fewer negatives than asked.

    Returns:
        A frame with columns ``docno`` (the positive document), ``qid`` (the query negative), ``score`` (float64),
        ``rank`` (int), ordered by docno as the positives come and by rank; ``attrs["mining"]`` as in
        :func:`mine_documents`.

    Raises:
        ValueError: If an option makes no sense, ``index`` holds other weights, or neither corpus nor index is given.
        KeyError: If a column is missing or a positive document is not in the corpus.
        TypeError: If the source cannot be sent to the engine's workers.
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
    search: VectorSearch | PipelineSearch
    if is_encoder:
        search = VectorSearch(source, topics, corpus, index, depth)
    elif corpus is None:
        raise ValueError("mining queries with a pipeline needs corpus=..., whose texts are the pipeline's queries")
    else:
        search = PipelineSearch(source, corpus, depth)
    known = topics.sort_values("qid", kind="stable")["qid"].to_numpy(dtype=object)
    size = options.whole("document_block", document_block)
    blocks = [documents.iloc[start : start + size].tolist() for start in range(0, len(documents), size)]
    answers = run(check_engine(engine), search, blocks, f"the source {source!r} of query negatives")
    found = ([(search.frame(*block, known), 1.0)] for block in zip(blocks, answers, strict=True))
    return selection.mine(documents, found, block=size, what="queries", unit="doc", verbose=verbose)


class VectorSearch:
    """Find the queries nearest to documents' vectors, in a worker or in this process.

    Args:
        encoder: Encodes the queries, here, and the documents where there is no index.
        topics: All queries.
        corpus: The documents, where there is no index.
        index: Holds the documents' vectors, or None.
        depth: How many queries a document gets.

    Raises:
        ValueError: If there is neither corpus nor index, or the index holds other weights.
    """

    def __init__(self, encoder: Any, topics: pd.DataFrame, corpus: Any, index: Any, depth: int) -> None:
        if index is None and corpus is None:
            raise ValueError("mining queries needs corpus=... (texts to encode) or index=... (stored vectors)")
        if index is not None and index.fingerprint != encoder.fingerprint:
            raise ValueError("the index was made with other weights than the encoder has; refresh it first")
        texts = topics.sort_values("qid", kind="stable")["query"].tolist()
        self.vectors = encoder.encode_queries(texts, precision=None if index is None else index.precision)
        self.corpus, self.depth, self.index, self.encoder = corpus, depth, index, encoder
        if index is not None:
            # Stored vectors need no encoder, which would be sent along.
            self.corpus, self.encoder = None, None
            self.index = copy.copy(index)
            self.index.given_encoder = None

    def __call__(self) -> Callable[[list[str]], tuple[np.ndarray, np.ndarray]]:
        """Return what finds scores and numbers of the best queries of documents, both (documents, k)."""
        return self._search

    def _search(self, docnos: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if self.index is not None:
            found, owner = self.index.stored_vectors(docnos)
        else:
            found, owner = encoded_vectors(self.encoder.encode_docs, self.corpus, docnos)
        return nearest_queries(found, owner, self.vectors, self.depth)

    @staticmethod
    def frame(docnos: list[str], answer: tuple[np.ndarray, np.ndarray], qids: np.ndarray) -> pd.DataFrame:
        """Return ranked queries of documents from what was found; ``qids`` are those of all queries, in order."""
        scores, rows = answer
        return pd.DataFrame(
            {
                "docno": pd.Series(docnos, dtype=object).repeat(rows.shape[1]).to_numpy(),
                "qid": qids[rows.ravel()],
                "score": scores.ravel(),
                "rank": list(range(rows.shape[1])) * len(docnos),
            }
        )


class PipelineSearch:
    """Find queries by a pipeline with documents' texts, in a worker or in this process.

    Args:
        pipeline: Gives queries' qids in the column ``docno``.
        corpus: Has the documents' texts.
        depth: How many queries a document gets.
    """

    def __init__(self, pipeline: pt.Transformer, corpus: Any, depth: int) -> None:
        self.pipeline, self.corpus, self.depth = pipeline, corpus, depth

    def __call__(self) -> Callable[[list[str]], pd.DataFrame]:
        """Compile the pipeline; return what gives its results for documents."""
        cut, corpus = (self.pipeline % self.depth).compile(), self.corpus
        return lambda docnos: cut(pd.DataFrame({"qid": docnos, "query": corpus.texts(docnos)}))

    @staticmethod
    def frame(docnos: list[str], answer: pd.DataFrame, qids: np.ndarray) -> pd.DataFrame:
        """Return ranked queries of documents from the pipeline's results, without queries that are not known.

        Raises:
            KeyError: If the results lack a column.
        """
        if not {"qid", "docno"} <= set(answer.columns):
            raise KeyError(
                "the source of query negatives has to give columns 'qid', the document that it was asked with, and "
                f"'docno', a query's qid (columns: {list(answer.columns)})"
            )
        found = answer.drop(columns="query", errors="ignore").rename(columns={"qid": "docno", "docno": "qid"})
        return found[found["qid"].isin(qids)]
