"""Document negatives from any PyTerrier pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pandas as pd
import pyterrier as pt

from pt_dance.mining.candidates import CandidateSelection
from pt_dance.mining.filters import Filter, MiningContext
from pt_dance.mining.judgements import positive_pairs
from pt_dance.mining.readings import Readings
from pt_dance.mining.sources import resolve_source
from pt_dance.storage import options
from pt_dance.storage.engine import check_engine, run


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
    engine: Any = None,
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
        engine: A :class:`pt_dance.engines.Ray`, whose workers retrieve for a block of queries each; what cannot be sent
            to them is made there by a :class:`pt_dance.engines.LazyPipeline`. None retrieves in this process.
        verbose: Shows a progress bar and says how many queries got fewer negatives than asked.

    Returns:
        A frame with columns ``qid``, ``docno``, ``score`` (float64, the source's), ``rank`` (int, position among the
        source's documents, from 0), ordered by qid as in ``topics`` and then by rank. ``attrs["mining"]`` counts
        queries, negatives, queries that got fewer than asked (``short``), queries that got none (``none``), and
        removals by reason.

    Raises:
        ValueError: If an option makes no sense.
        KeyError: If a column is missing.
        TypeError: If a source cannot be sent to the engine's workers.
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
    blocks = [topics.iloc[start : start + size] for start in range(0, len(topics), size)]
    found = _results(pipelines, blocks, depth, check_engine(engine))
    return selection.mine(topics["qid"], found, block=size, what="documents", unit="query", verbose=verbose)


def _results(
    sources: list[tuple[pt.Transformer | pd.DataFrame, float]], blocks: list[pd.DataFrame], depth: int, engine: Any
) -> Iterator[list[tuple[pd.DataFrame, float]]]:
    """Yield for every block of topics what each source finds, and the source's weight."""
    pipelines = [source for source, _ in sources if not isinstance(source, pd.DataFrame)]
    answers: Iterator[list[pd.DataFrame]] = iter([[]] * len(blocks))
    if pipelines:
        what = f"the negative source {' + '.join(map(repr, pipelines))}"
        answers = run(engine, PipelineSearch(pipelines, depth), blocks, what)
    for block, answer in zip(blocks, answers, strict=True):
        frames, found = iter(answer), []
        for source, weight in sources:
            frame = source[source["qid"].isin(block["qid"])] if isinstance(source, pd.DataFrame) else next(frames)
            if "docno" not in frame.columns:
                raise KeyError(
                    f"the negative source {source!r} gave no column 'docno' (columns: {list(frame.columns)})"
                )
            found.append((frame, weight))
        yield found


class PipelineSearch:
    """Retrieve with negative sources, in a worker or in this process.

    Args:
        pipelines: The sources.
        depth: How many results of a query are kept.
    """

    def __init__(self, pipelines: list[pt.Transformer], depth: int) -> None:
        self.pipelines, self.depth = pipelines, depth

    def __call__(self) -> Callable[[pd.DataFrame], list[pd.DataFrame]]:
        """Compile the pipelines; return what gives a frame of results of each for topics."""
        compiled = [(pipeline % self.depth).compile() for pipeline in self.pipelines]

        def search(topics: pd.DataFrame) -> list[pd.DataFrame]:
            results: list[pd.DataFrame] = [pipeline(topics) for pipeline in compiled]
            wanted = ("qid", "docno", "score", "rank")
            # Where there is no docno, the message tells what there is.
            return [r[[c for c in r.columns if c in wanted]] if "docno" in r.columns else r.iloc[:0] for r in results]

        return search
