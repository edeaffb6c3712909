"""pt_dance.analysis: measures against independent computations and closed forms; samples, intervals, comparisons."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist, pdist
from scipy.stats import skew
from sklearn.decomposition import PCA

from pt_dance import Corpus, DualEncoder, analysis
from pt_dance.analysis import embedding_space, hubness, sample, space_report
from pt_dance.analysis import measures as m
from small_collection import standard_library


class Table:
    """A collection and an encoder in one: texts are names of vectors, and documents are rows in an order of theirs."""

    def __init__(self, queries: np.ndarray, documents: np.ndarray):
        self.vectors = {f"query {i}": v for i, v in enumerate(queries)}
        self.vectors |= {f"document {i}": v for i, v in enumerate(documents)}
        self.docnos = [f"d{i}" for i in range(len(documents))]
        self.topics = pd.DataFrame({"qid": [f"q{i}" for i in range(len(queries))]})
        self.topics["query"] = [f"query {i}" for i in range(len(queries))]

    def __len__(self):
        return len(self.docnos)

    def rows(self, docnos):
        at = {docno: i for i, docno in enumerate(self.docnos)}
        return np.array([at.get(docno, -1) for docno in docnos])

    def docno(self, rows):
        return np.array([self.docnos[row] for row in rows], dtype=object)

    def texts(self, docnos):
        return [f"document {docno[1:]}" for docno in docnos]

    def encode_queries(self, texts):
        return np.stack([self.vectors[text] for text in texts])

    encode_docs = encode_queries


def judged(pairs) -> pd.DataFrame:
    return pd.DataFrame([(f"q{q}", f"d{d}", label) for q, d, label in pairs], columns=["qid", "docno", "label"])


@pytest.fixture(scope="module")
def some() -> tuple[Table, pd.DataFrame]:
    """60 queries of 40 of 90 documents, noisy copies of these; some have two documents, with grades."""
    rng = np.random.default_rng(3)
    documents = rng.normal(size=(90, 12)) + 0.4
    queries = documents[np.arange(60) % 40] + rng.normal(size=(60, 12))
    pairs = [(q, q % 40, 1 + q % 2) for q in range(60)] + [(q, q + 1, 1) for q in range(10)]
    return Table(queries, documents), judged([*pairs, (5, 80, 0)])


def report_of(table: Table, qrels: pd.DataFrame, **options) -> analysis.SpaceReport:
    return analysis.space(table, table.topics, qrels, table, **{"resamples": 0, **options})


def unit(vectors) -> np.ndarray:
    return np.asarray(vectors) / np.linalg.norm(vectors, axis=1, keepdims=True)


def weights_of_one(*vectors: np.ndarray) -> np.ndarray:
    return np.ones((1, sum(map(len, vectors))))


# --- every measure against a computation of its own -------------------------------------------------------------------


def test_measures_equal_independent_computations(some):
    table, qrels = some
    for t in (2.0, 5.0):
        report = report_of(table, qrels, t=t)
        q = unit([table.vectors[text] for text in report.sample.queries])
        pool = unit([table.vectors[text] for text in table.texts(report.sample.docnos)])
        d = pool[: report.sample.paired]
        assert (len(q), len(d), len(pool)) == (60, 40, 90)
        pairs = [(int(r.qid[1:]), int(r.docno[1:])) for r in qrels[qrels["label"] > 0].itertuples()]
        at = {docno: i for i, docno in enumerate(report.sample.docnos)}
        by_qid = {qid: q[i] for i, qid in enumerate(report.sample.qids)}
        distances = [np.sum((by_qid[f"q{i}"] - pool[at[f"d{j}"]]) ** 2) for i, j in pairs]
        assert report.value("alignment", "pairs") == pytest.approx(np.mean(distances), rel=1e-9)
        for of, x in (("queries", q), ("documents", d), ("both", np.concatenate([q, d]))):
            apart = pdist(x, "sqeuclidean")
            assert report.value(f"uniformity, t = {t:g}", of) == pytest.approx(np.log(np.exp(-t * apart).mean()))
            assert report.value("mean cosine", of) == pytest.approx((1 - pdist(x, "cosine")).mean())
            assert report.value("norm of mean", of) == pytest.approx(np.linalg.norm(x.mean(axis=0)))
            second = np.square(1 - pdist(x, "cosine")).mean()
            assert report.value("cosine², times dimension", of) == pytest.approx(12 * second)
            singular = np.linalg.svd(x, compute_uv=False)
            p = singular / singular.sum()
            assert report.value("effective rank", of) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
            c = np.linalg.svd(x, full_matrices=True)[2]
            z = np.exp(np.concatenate([c, -c]) @ x.T).sum(axis=1)
            assert report.value("isotropy", of) == pytest.approx(z.min() / z.max())
            explained = PCA().fit(x).explained_variance_ratio_
            assert report.spectra[of] == pytest.approx(explained)
            assert report.value("variance in first 10", of) == pytest.approx(explained[:10].sum())
        assert report.value("tower gap", "both") == pytest.approx(np.linalg.norm(q.mean(axis=0) - d.mean(axis=0)))
        assert report.value("cosine to best result", "q→d") == pytest.approx(
            (1 - cdist(q, pool, "cosine")).max(1).mean()
        )


def test_hubness_equals_counting_by_hand(some):
    table, qrels = some
    report = report_of(table, qrels)
    q = unit([table.vectors[text] for text in report.sample.queries])
    pool = unit([table.vectors[text] for text in table.texts(report.sample.docnos)])
    for way, anchors, found in (("q→d", q, pool), ("d→q", pool[: report.sample.paired], q)):
        counts = np.zeros(len(found))
        for anchor in anchors:
            for row in sorted(range(len(found)), key=lambda i: -(anchor @ found[i]))[:10]:
                counts[row] += 1
        assert report.found[way, 10].tolist() == counts.tolist()
        assert (way, 200) not in report.found  # more than there are: everything would find everything
        gini = np.abs(counts[:, None] - counts).sum() / (2 * len(counts) ** 2 * counts.mean())
        shares = counts[counts > 0] / counts.sum()
        assert report.value("N10 skewness", way) == pytest.approx(skew(counts))
        assert report.value("N10 Gini", way) == pytest.approx(gini)
        assert report.value("N10 entropy", way) == pytest.approx(-(shares * np.log(shares)).sum() / np.log(len(counts)))
        assert report.value("N10 never found", way) == np.mean(counts == 0)


def test_retrieval_both_ways_keeps_grades(some):
    table, qrels = some
    report = report_of(table, qrels)
    q = unit([table.vectors[text] for text in report.sample.queries])
    pool = unit([table.vectors[text] for text in table.texts(report.sample.docnos)])
    grade = {(r.qid, r.docno): r.label for r in qrels.itertuples()}
    grades = np.array([[grade.get((i, j), 0) for j in report.sample.docnos] for i in report.sample.qids])
    for way, scores, gains in (("q→d", q @ pool.T, grades), ("d→q", (pool @ q.T)[:40], grades.T[:40])):
        discount = 1 / np.log2(np.arange(2, 12))
        order = np.argsort(-scores, axis=1)[:, :10]
        best = -np.sort(-gains, axis=1)[:, :10]
        ndcg = (np.take_along_axis(gains, order, 1) * discount).sum(1) / (best * discount).sum(1)
        assert report.value("nDCG@10", way) == pytest.approx(ndcg.mean())
        hit = np.take_along_axis(gains, order, 1) > 0
        reciprocal = np.where(hit.any(1), 1 / (1 + hit.argmax(1)), 0)
        assert report.value("RR@10", way) == pytest.approx(reciprocal.mean())


def test_samtone_ratio_on_every_pair_there_is():
    rng = np.random.default_rng(0)
    queries, documents = rng.normal(size=(8, 5)), rng.normal(size=(8, 5))
    documents[7] -= unit(queries)[0] * (unit(queries)[0] @ documents[7])  # a denominator of zero
    table = Table(queries, documents)
    report = report_of(table, judged([(i, i, 1) for i in range(8)] + [(0, 3, 1)]))
    q, d = unit(queries), unit(documents)
    # nine pairs, of which each meets all others; (0, 3) is relevant though the pair (3, 3) brings it, and 0 meets 0
    pairs = sorted([(i, i) for i in range(8)] + [(0, 3)])
    expected = [
        (q[i] @ q[j]) / (q[i] @ d[e])
        for i, _ in pairs
        for j, e in pairs
        if i != j and (i, e) not in pairs and abs(q[i] @ d[e]) >= 0.01
    ]
    assert sorted(report.distributions["ratio"]) == pytest.approx(sorted(expected))
    assert report.settings["ratios"] - report.settings["small denominators"] == len(expected)
    near = np.mean([0.9 <= r <= 1.1 for r in expected])
    assert report.value("s(q, q′) / s(q, d), share in .9 to 1.1", "pairs") == pytest.approx(near)
    assert report.settings["small denominators"] >= 1
    median = sorted(expected)[(len(expected) - 1) // 2]
    assert report.value("s(q, q′) / s(q, d), median", "pairs") == pytest.approx(median)


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "published"), [(2.0, -3.990), (5.0, -9.935)])
def test_uniform_sphere_in_closed_form(t, published):
    assert analysis.uniform_sphere(768, t) == pytest.approx(published, abs=5e-4)
    x = unit(np.random.default_rng(1).normal(size=(3000, 768)))
    weights = weights_of_one(x)
    pairs = m.pair_means(x, weights, t)
    assert pairs.uniformity[0] == pytest.approx(analysis.uniform_sphere(768, t), abs=1e-3)
    assert pairs.second_moment[0] * 768 == pytest.approx(1, abs=0.01)
    assert m.mean_cosine(x, weights)[0] == pytest.approx(0, abs=1e-3)
    assert m.isotropy(x, weights)[0] > 0.99
    assert m.effective_rank(x, weights)[0] > 730


def test_uniform_circle_by_quadrature():
    angles = np.linspace(0, 2 * np.pi, 20001)[:-1]
    expected = np.log(np.mean(np.exp(-2 * (2 - 2 * np.cos(angles)))))
    assert analysis.uniform_sphere(2) == pytest.approx(expected, abs=1e-9)


def test_one_point():
    x = np.tile(unit([[3.0, 4.0, 0.0]]), (20, 1))
    weights = weights_of_one(x)
    assert m.pair_means(x, weights, 2).uniformity[0] == pytest.approx(0, abs=1e-12)
    assert m.mean_cosine(x, weights)[0] == pytest.approx(1)
    assert m.mean_norm(x, weights)[0] == pytest.approx(1)
    assert m.effective_rank(x, weights)[0] == pytest.approx(1, abs=1e-5)
    assert m.isotropy(x, weights)[0] == pytest.approx(np.exp(-2))  # c = ±x
    assert m.spectrum(x, weights)[0].tolist() == [0, 0, 0]


def test_two_clusters():
    queries, documents = np.tile([[1.0, 0.0, 0.0]], (30, 1)), np.tile([[0.0, 1.0, 0.0]], (30, 1))
    one = weights_of_one(queries)
    both, of_both = np.concatenate([queries, documents]), weights_of_one(queries, documents)
    assert m.tower_gap(queries, one, documents, one)[0] == pytest.approx(np.sqrt(2))
    told = m.told_apart(queries, documents)
    assert np.concatenate(told).tolist() == [1] * 60
    pairs = m.pair_means(both, of_both, 2.0)
    same, other = 2 * 30 * 29, 2 * 30 * 30
    assert pairs.uniformity[0] == pytest.approx(np.log((same + other * np.exp(-4)) / (same + other)))
    assert m.effective_rank(both, of_both)[0] == pytest.approx(2, abs=1e-4)
    assert m.spectrum(both, of_both)[0] == pytest.approx([1, 0, 0])


def test_sets_from_one_distribution_are_not_told_apart_and_count_equally():
    rng = np.random.default_rng(0)
    a, b = unit(rng.normal(size=(400, 16))), unit(rng.normal(size=(600, 16)))
    told = m.told_apart(a, b)
    assert (~np.isnan(told[0])).sum() == (~np.isnan(told[1])).sum() == 400
    assert np.nanmean(np.concatenate(told)) == pytest.approx(0.5, abs=0.05)


def test_unevenness_at_its_ends():
    counts = np.array([[5.0, 5, 5, 5], [20, 0, 0, 0]])
    told = hubness.unevenness(counts)
    assert told["Gini"].tolist() == [0, 0.75]
    assert told["entropy"] == pytest.approx([1, 0])
    assert told["never found"].tolist() == [0, 0.75]
    assert told["skewness"][0] == 0


# --- resamples --------------------------------------------------------------------------------------------------------


def test_weights_are_repeated_vectors_that_do_not_meet_their_copies():
    rng = np.random.default_rng(0)
    x, y = unit(rng.normal(size=(30, 6)) + 0.3), unit(rng.normal(size=(25, 6)))
    counts = rng.integers(0, 4, size=30)
    weights, others = np.stack([np.ones(30), counts]), np.ones((2, 25))
    rows = np.repeat(np.arange(30), counts)
    distinct = rows[:, None] != rows
    distances, cosines = cdist(x[rows], x[rows], "sqeuclidean")[distinct], (x[rows] @ x[rows].T)[distinct]
    pairs = m.pair_means(x, weights, 2.0)
    assert pairs.uniformity[1] == pytest.approx(np.log(np.exp(-2 * distances).mean()))
    assert pairs.second_moment[1] == pytest.approx(np.square(cosines).mean())
    assert m.mean_cosine(x, weights)[1] == pytest.approx(cosines.mean())
    assert m.mean_norm(x, weights)[1] == pytest.approx(np.linalg.norm(x[rows].mean(axis=0)))
    gap = np.linalg.norm(x[rows].mean(axis=0) - y.mean(axis=0))
    assert m.tower_gap(x, weights, y, others)[1] == pytest.approx(gap)
    across = m.pair_means(x, weights, 2.0, y, others)
    assert across.uniformity[1] == pytest.approx(np.log(np.exp(-2 * cdist(x[rows], y, "sqeuclidean")).mean()))
    assert m.weighted_quantile(x[:, 0], weights, 0.5)[1] == np.sort(x[rows, 0])[(len(rows) - 1) // 2]
    near, _ = hubness.nearest(x, y, 3)
    assert hubness.times_found(near, weights, 25)[1].tolist() == np.bincount(near[rows].ravel(), minlength=25).tolist()
    middle, directions = x.mean(axis=0), np.linalg.svd(x - x.mean(axis=0))[2]
    variance = ((x[rows] - middle) @ directions.T).var(axis=0)
    assert m.spectrum(x, weights)[1] == pytest.approx(variance / variance.sum())


def test_blocks_change_nothing(some, monkeypatch):
    table, qrels = some
    whole = report_of(table, qrels, resamples=5)
    for module, name in ((m, "_BLOCK_CELLS"), (hubness, "_BLOCK_CELLS")):
        monkeypatch.setattr(module, name, 100)
    for module in (sample, embedding_space):
        monkeypatch.setattr(module, "_BLOCK_TEXTS", 7)
    pd.testing.assert_frame_equal(report_of(table, qrels, resamples=5).measures, whole.measures, rtol=1e-12)


def test_interval_of_a_mean_is_as_wide_as_its_standard_error_says():
    rng = np.random.default_rng(0)
    documents = rng.normal(size=(600, 8))
    table = Table(documents + 0.5 * rng.normal(size=documents.shape), documents)
    qrels = judged([(i, i, 1) for i in range(600)])
    report = report_of(table, qrels, resamples=400, pool=0)
    row = report.measures.set_index(["measure", "of"]).loc[("alignment", "pairs")]
    distances = report.distributions["pair"]
    half = 1.96 * distances.std() / np.sqrt(len(distances))
    assert (row["high"] - row["low"]) / 2 == pytest.approx(half, rel=0.15)
    inside = report.measures
    assert (inside["low"] <= inside["value"] + 1e-12).all() and (inside["value"] <= inside["high"] + 1e-12).all()


def test_interval_holds_the_truth_about_as_often_as_it_says():
    """Over many small samples, 95 % intervals of a space's mean cosine hold what an endless sample would give."""
    rng = np.random.default_rng(5)
    middle = np.array([0.6, 0.3, 0, 0, 0, 0])
    endless = unit(rng.normal(size=(200_000, 6)) + middle)
    truth = m.mean_cosine(endless, weights_of_one(endless))[0]
    held = 0
    for seed in range(200):
        table = Table(np.eye(80), np.eye(80))
        drawn = sample.draw(table.topics, judged([(i, i, 1) for i in range(80)]), table, pool=0, seed=seed)
        _, of_queries, _ = embedding_space._resampled(drawn, 200)
        rows = space_report.MeasureTable()
        rows.add("mean cosine", "queries", m.mean_cosine(unit(rng.normal(size=(80, 6)) + middle), of_queries))
        held += rows.rows[0]["low"] <= truth <= rows.rows[0]["high"]
    assert 180 <= held <= 198


# --- samples ----------------------------------------------------------------------------------------------------------


def test_sample_is_the_same_whatever_the_order_of_rows(some):
    table, qrels = some
    drawn = sample.draw(table.topics, qrels, table, sample=30, pool=50)
    turned = sample.draw(table.topics[::-1], qrels.sample(frac=1, random_state=0), table, sample=30, pool=50)
    assert drawn.digest == turned.digest
    assert sample.draw(table.topics, qrels, table, sample=30, pool=50, seed=1).digest != drawn.digest
    assert len(drawn.pairs) == 30 and len(drawn.docnos) == 50 and len(set(drawn.docnos)) == 50
    relevant = {(r.qid, r.docno) for r in qrels[qrels["label"] > 0].itertuples()}
    assert {(drawn.qids[q], drawn.docnos[d]) for q, d in drawn.pairs} <= relevant
    # whatever is relevant to a sampled query is in the pool, and known to be
    known = {(drawn.qids[r.query], drawn.docnos[r.document]) for r in drawn.relevant.itertuples()}
    assert known == {(q, d) for q, d in relevant if q in drawn.qids}


def test_same_texts_are_one_query_and_one_document():
    table = Table(np.eye(4), np.eye(4))
    table.topics = pd.concat([table.topics, pd.DataFrame({"qid": ["twin"], "query": ["query 0"]})])
    table.docnos.append("copy")
    plain = table.texts
    table.texts = lambda docnos: ["document 1" if d == "copy" else plain([d])[0] for d in docnos]
    qrels = pd.concat([judged([(0, 0, 1), (1, 1, 1), (2, 2, 1)])])
    qrels = pd.concat([qrels, pd.DataFrame({"qid": ["twin", "q1"], "docno": ["d3", "copy"], "label": 2})])
    drawn = sample.draw(table.topics, qrels, table)
    assert drawn.qids == ["q0", "q1", "q2"] and len(drawn.docnos) == 4
    at = {docno: i for i, docno in enumerate(drawn.docnos)}
    grades = {(r.query, r.document): r.label for r in drawn.relevant.itertuples()}
    assert grades[0, at["d3"]] == 2  # what is relevant to the twin
    assert len(grades) == 4 and max(grades.values()) == 2


def test_missing_documents_are_counted_and_said(some):
    table, qrels = some
    more = pd.concat([qrels, pd.DataFrame({"qid": ["q0"], "docno": ["nowhere"], "label": [1]})])
    drawn = sample.draw(table.topics, more, table)
    assert drawn.missing == 1 and "nowhere" not in drawn.docnos


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample": 1}, "sample=1 must be a whole number of at least 2"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"pool": 2.5}, "pool=2.5 must be"),
        ({"t": 0}, "t=0 must be a number above 0"),
        ({"resamples": True}, "resamples=True must be"),
    ],
)
def test_options_that_make_no_sense(some, options, message):
    table, qrels = some
    with pytest.raises(ValueError, match=message):
        analysis.space(table, table.topics, qrels, table, **options)


def test_bad_frames_are_named(some):
    table, qrels = some
    with pytest.raises(KeyError, match="the qrels lack the column 'label'"):
        analysis.space(table, table.topics, qrels[["qid", "docno"]], table)
    with pytest.raises(ValueError, match="1 relevant pairs of these topics"):
        analysis.space(table, table.topics, qrels.head(1), table)
    table.vectors["query 3"] = table.vectors["query 3"] * np.nan
    with pytest.raises(ValueError, match="not finite"):
        report_of(table, qrels)


# --- several systems --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    collection = standard_library()
    corpus = Corpus.build(collection, tmp_path_factory.mktemp("analysis") / "corpus", verbose=False)
    texts = list(collection.documents["text"])
    encoders = {str(seed): DualEncoder.static(texts, dim=16, vocab_size=400, seed=seed) for seed in (1, 2)}
    return collection, corpus, encoders


def test_compare_measures_the_same_pairs(real):
    collection, corpus, encoders = real
    table = analysis.compare(encoders, collection.topics, collection.qrels, corpus, sample=60, resamples=20)
    assert table["system"].tolist() == ["1", "2"]
    reports = {
        name: analysis.space(e, collection.topics, collection.qrels, corpus, sample=60, resamples=20)
        for name, e in encoders.items()
    }
    assert reports["1"].sample.digest == reports["2"].sample.digest
    pd.testing.assert_frame_equal(table, analysis.compare(reports))
    mixed = {"1": reports["1"], "2": encoders["2"]}
    again = analysis.compare(mixed, collection.topics, collection.qrels, corpus, sample=60, resamples=20)
    pd.testing.assert_frame_equal(table, again)
    for row in reports["2"].measures.itertuples():
        column = f"{row.measure} ({row.of})"
        assert table[column].iloc[1] == row.value and table[f"{column} low"].iloc[1] == row.low
    assert table["alignment (pairs)"].nunique() == 2


def test_compare_refuses_what_does_not_compare(real):
    collection, corpus, encoders = real
    report = analysis.space(encoders["1"], collection.topics, collection.qrels, corpus, sample=60, resamples=2)
    with pytest.raises(ValueError, match="'a' and 'b' are of different samples"):
        analysis.compare(
            {"a": report, "b": encoders["2"]}, collection.topics, collection.qrels, corpus, sample=50, resamples=2
        )
    with pytest.raises(ValueError, match="give topics, qrels and corpus"):
        analysis.compare(encoders)
    with pytest.raises(ValueError, match="no system"):
        analysis.compare({})
    with pytest.raises(KeyError, match="'uniformity, t = 2' of 'queries'"):
        report.value("uniformity", "queries")


def test_report_is_shown_in_a_notebook(real):
    collection, corpus, encoders = real
    report = analysis.space(encoders["1"], collection.topics, collection.qrels, corpus, sample=60, resamples=2)
    shown = report._repr_html_()
    assert "60 of" in shown and "effective rank" in shown and "the whole corpus" in shown
