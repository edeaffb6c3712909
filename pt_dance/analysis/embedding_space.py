"""The embedding space of an encoder in numbers: one report a system, one table for several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ir_measures
import numpy as np
import pandas as pd

from pt_dance.analysis import hubness
from pt_dance.analysis import measures as m
from pt_dance.analysis.sample import PairSample, draw
from pt_dance.analysis.space_report import MeasureTable, SpaceReport
from pt_dance.storage.options import number, whole

NEIGHBOURS = (10, 200)
RETRIEVAL = (ir_measures.nDCG @ 10, ir_measures.RR @ 10, ir_measures.R @ 100)
SMALL_DENOMINATOR = 0.01
_RATIOS_PER_PAIR = 10
_BLOCK_TEXTS = 1000


def space(
    encoder: Any,
    topics: pd.DataFrame,
    qrels: pd.DataFrame,
    corpus: Any,
    *,
    sample: int = 2000,
    seed: int = 42,
    pool: int = 5000,
    t: float = 2.0,
    resamples: int = 200,
) -> SpaceReport:
    """Measure an encoder's embedding space on relevant pairs.

    All measures are exact for the sample: sums over pairs of vectors are over all of them, searches look at the whole
    pool. Their definitions are in :mod:`pt_dance.analysis.measures` and :mod:`pt_dance.analysis.hubness`. The intervals
    come from resampling the pairs, each resample centred on the estimate: a resample holds fewer distinct queries than
    the sample, which shifts such measures as the share of documents never found, but says nothing about their error.
    What is fitted to the sample (principal directions, the classifier, the pool) is not fitted again.

    Args:
        encoder: A ``DualEncoder``, or anything with ``encode_queries`` and ``encode_docs`` from texts to vectors.
        topics: Columns ``qid`` and ``query``.
        qrels: Columns ``qid``, ``docno``, ``label``; a label above 0 is relevant.
        corpus: The ``Corpus``; one of passages is read as whole documents, which the encoder cuts.
        sample: How many relevant pairs, at most.
        seed: Fixes the sample: the same for every encoder.
        pool: How many documents are searched, at most, every relevant one among them.
        t: Of the uniformity; 2 in Wang & Isola's paper, 5 in DANCE's release. Values of different t do not compare.
        resamples: How many bootstrap resamples.

    Returns:
        The report.

    Raises:
        KeyError: If a column is missing.
        ValueError: If an option makes no sense, fewer than two pairs are left, or vectors are not finite.
    """
    _check(t, resamples)
    return _measure(encoder, corpus, draw(topics, qrels, corpus, sample=sample, pool=pool, seed=seed), t, resamples)


def compare(
    systems: Mapping[str, object],
    topics: pd.DataFrame | None = None,
    qrels: pd.DataFrame | None = None,
    corpus: Any = None,
    *,
    sample: int = 2000,
    seed: int = 42,
    pool: int = 5000,
    t: float = 2.0,
    resamples: int = 200,
) -> pd.DataFrame:
    """Measure several encoders on the same pairs, see :func:`space`.

    Args:
        systems: By name, encoders, or reports that :func:`space` gave for the same sample.
        topics: As in :func:`space`; not needed where all systems are reports.
        qrels: Likewise.
        corpus: Likewise.
        sample: As in :func:`space`.
        seed: Likewise.
        pool: Likewise.
        t: Likewise.
        resamples: Likewise.

    Returns:
        A row a system: ``system``, then each measure as ``"measure (of)"`` with the ends of its interval as
        ``"measure (of) low"`` and ``"measure (of) high"``.

    Raises:
        ValueError: As in :func:`space`; or if reports are of different samples, t or resamples.
    """
    if not systems:
        raise ValueError("there is no system to compare; give at least one encoder by its name")
    _check(t, resamples)
    reports = {name: system for name, system in systems.items() if isinstance(system, SpaceReport)}
    if len(reports) < len(systems):
        if topics is None or qrels is None or corpus is None:
            raise ValueError("encoders are measured on pairs: give topics, qrels and corpus")
        drawn = draw(topics, qrels, corpus, sample=sample, pool=pool, seed=seed)
        for name, system in systems.items():
            if name not in reports:
                reports[name] = _measure(system, corpus, drawn, t, resamples)
    of = {name: (r.sample.digest, r.settings["t"], r.settings["resamples"]) for name, r in reports.items()}
    first = next(iter(systems))
    for name in systems:
        if of[name] != of[first]:
            raise ValueError(
                f"the reports of {first!r} and {name!r} are of different samples, t or resamples and do not compare; "
                "measure both with the same options"
            )
    return pd.DataFrame([_row(name, reports[name]) for name in systems])


def _check(t: float, resamples: int) -> None:
    number("t", t, above=0)
    whole("resamples", resamples, 0)


def _row(name: str, report: SpaceReport) -> dict[str, object]:
    row: dict[str, object] = {"system": name}
    for r in report.measures.itertuples():
        column = f"{r.measure} ({r.of})"
        row |= {column: r.value, f"{column} low": r.low, f"{column} high": r.high}
    return row


def _encoded(encode: Any, texts_of: Any, number: int) -> np.ndarray:
    blocks = range(0, number, _BLOCK_TEXTS)
    return m.normalised(np.concatenate([np.asarray(encode(texts_of(i, i + _BLOCK_TEXTS))) for i in blocks]))


def _resampled(drawn: PairSample, resamples: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return weights of pairs, queries and documents, (1 + resamples, …), the first row the sample itself.

    A query, or document, counts by the mean of its pairs' counts.
    """
    number = len(drawn.pairs)
    rng = np.random.default_rng(drawn.seed)
    pairs = np.ones((1 + resamples, number))
    for row in range(1, 1 + resamples):
        pairs[row] = np.bincount(rng.integers(number, size=number), minlength=number)
    weights = [pairs]
    for side, members in ((0, len(drawn.qids)), (1, drawn.paired)):
        order = np.argsort(drawn.pairs[:, side], kind="stable")
        starts = np.searchsorted(drawn.pairs[order, side], np.arange(members))
        sizes = np.diff(np.append(starts, number))
        weights.append(np.add.reduceat(pairs[:, order], starts, axis=1) / sizes)
    return weights[0], weights[1], weights[2]


def _measure(encoder: Any, corpus: Any, drawn: PairSample, t: float, resamples: int) -> SpaceReport:
    queries = _encoded(encoder.encode_queries, lambda i, j: drawn.queries[i:j], len(drawn.queries))
    pool = _encoded(encoder.encode_docs, lambda i, j: corpus.texts(drawn.docnos[i:j]), len(drawn.docnos))
    documents = pool[: drawn.paired]
    of_pairs, of_queries, of_documents = _resampled(drawn, resamples)
    table = MeasureTable()
    settings: dict[str, float] = {
        "t": t, "resamples": resamples, "dimension": queries.shape[1],
        "zero vectors": int((~queries.any(axis=1)).sum() + (~documents.any(axis=1)).sum()),
    }  # fmt: skip

    left, right = queries[drawn.pairs[:, 0]], documents[drawn.pairs[:, 1]]
    distributions = {"pair": m.squared_distances(left, right)}
    table.add("alignment", "pairs", m.mean(distributions["pair"], of_pairs))
    spectra = _shape(table, queries, of_queries, documents, of_documents, t)
    table.add("tower gap", "both", m.tower_gap(queries, of_queries, documents, of_documents))
    told = np.concatenate(m.told_apart(queries, documents, seed=drawn.seed))
    used, both = ~np.isnan(told), np.concatenate([of_queries, of_documents], axis=1)
    if used.any():
        table.add("told apart (chance .5)", "both", m.mean(told[used], both[:, used]), is_share=True)

    distributions |= _ratios(table, drawn, queries, documents, of_pairs, settings)
    found = {}
    deepest = max(*NEIGHBOURS, 100)
    for way, anchors, weights, searched in (
        ("q→d", queries, of_queries, pool),
        ("d→q", documents, of_documents, queries),
    ):
        rows, dots = hubness.nearest(anchors, searched, deepest)
        if way == "q→d":
            distributions["best"] = dots[:, 0]
            table.add("cosine to best result", way, m.mean(dots[:, 0], weights))
        for measure, values in _effectiveness(drawn, rows, way).items():
            judged = ~np.isnan(values)
            table.add(measure, way, m.mean(values[judged], weights[:, judged]), is_share=True)
        for k in NEIGHBOURS:
            if k < len(searched):  # otherwise all are found by all
                counts = hubness.times_found(rows[:, :k], weights, len(searched))
                found[way, k] = counts[0]
                for measure, values in hubness.unevenness(counts).items():
                    table.add(f"N{k} {measure}", way, values, is_share=measure != "skewness")
    return SpaceReport(
        table.frame(), drawn, settings, queries.astype(np.float32), documents.astype(np.float32), distributions,
        spectra, found,
    )  # fmt: skip


def _shape(table: MeasureTable, queries, of_queries, documents, of_documents, t: float) -> dict[str, np.ndarray]:
    """Add uniformity, anisotropy, isotropy and spectrum of queries, documents and both; return the spectra."""
    across = m.pair_means(queries, of_queries, t, documents, of_documents)
    parts = {
        "queries": (queries, of_queries, m.pair_means(queries, of_queries, t)),
        "documents": (documents, of_documents, m.pair_means(documents, of_documents, t)),
    }
    parts["both"] = (
        np.concatenate([queries, documents]),
        np.concatenate([of_queries, of_documents], axis=1),
        parts["queries"][2] + parts["documents"][2] + across + across,
    )
    spectra = {}
    for of, (vectors, weights, pairs) in parts.items():
        table.add(f"uniformity, t = {t:g}", of, pairs.uniformity)
        table.add("mean cosine", of, m.mean_cosine(vectors, weights))
        table.add("norm of mean", of, m.mean_norm(vectors, weights))
        table.add("cosine², times dimension", of, pairs.second_moment * vectors.shape[1])
        table.add("isotropy", of, m.isotropy(vectors, weights))
        table.add("effective rank", of, m.effective_rank(vectors, weights))
        shares = m.spectrum(vectors, weights)
        spectra[of] = shares[0]
        for k in (1, 10, 100):
            if k < vectors.shape[1]:
                table.add(f"variance in first {k}", of, shares[:, :k].sum(axis=1), is_share=True)
    return spectra


def _ratios(
    table: MeasureTable, drawn: PairSample, queries, documents, of_pairs, settings: dict[str, float]
) -> dict[str, np.ndarray]:
    """Add SamToNe's s(q_i, q_j) / s(q_i, d_j) on random pairs of pairs, of which none is relevant to the other."""
    rng = np.random.default_rng(drawn.seed)
    number = len(drawn.pairs)
    order = rng.permutation(number)
    turns = rng.choice(number - 1, min(_RATIOS_PER_PAIR, number - 1), replace=False) + 1
    i = np.tile(order, len(turns))
    j = np.concatenate([np.roll(order, -turn) for turn in turns])
    query, other, document = drawn.pairs[i, 0], drawn.pairs[j, 0], drawn.pairs[j, 1]
    width = np.int64(len(drawn.docnos))
    relevant = drawn.relevant["query"].to_numpy() * width + drawn.relevant["document"].to_numpy()
    apart = (query != other) & ~np.isin(query * width + document, relevant)
    i, j, query, other, document = (x[apart] for x in (i, j, query, other, document))
    same_tower = np.einsum("nd,nd->n", queries[query], queries[other])
    across = np.einsum("nd,nd->n", queries[query], documents[document])
    usable = np.abs(across) >= SMALL_DENOMINATOR
    settings |= {"ratios": len(across), "small denominators": int((~usable).sum())}
    ratios = same_tower[usable] / across[usable]
    if len(ratios):
        weights = of_pairs[:, i[usable]] * of_pairs[:, j[usable]]
        table.add("s(q, q′) / s(q, d), median", "pairs", m.weighted_quantile(ratios, weights, 0.5))
        near = ((ratios >= 0.9) & (ratios <= 1.1)).astype(np.float64)
        table.add("s(q, q′) / s(q, d), share in .9 to 1.1", "pairs", m.mean(near, weights), is_share=True)
    distances = m.squared_distances(queries[query], documents[document])
    return {"random pair": distances, "ratio": ratios}


def _effectiveness(drawn: PairSample, rows: np.ndarray, way: str) -> dict[str, np.ndarray]:
    """Return the value of each retrieval measure for each anchor, NaN where nothing is relevant to it."""
    anchor, target = ("query", "document") if way == "q→d" else ("document", "query")
    relevant = drawn.relevant[drawn.relevant[anchor] < len(rows)]
    qrels = pd.DataFrame(
        {
            "query_id": relevant[anchor].astype(str),
            "doc_id": relevant[target].astype(str),
            "relevance": relevant["label"].astype(int),
        }
    )
    k = rows.shape[1]
    run = pd.DataFrame(
        {
            "query_id": np.repeat(np.arange(len(rows)).astype(str), k),
            "doc_id": rows.ravel().astype(str),
            "score": np.tile(-np.arange(k, dtype=np.float64), len(rows)),
        }
    )
    values = {str(measure): np.full(len(rows), np.nan) for measure in RETRIEVAL}
    for value in ir_measures.iter_calc(RETRIEVAL, qrels, run):
        values[str(value.measure)][int(value.query_id)] = value.value
    return values
