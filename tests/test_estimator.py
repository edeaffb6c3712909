"""The estimator end to end on a small real collection: fit behind BM25, same call same result, nothing stale."""

from __future__ import annotations

import atexit
import io
import json
import shutil
import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from ir_measures import RR, define_byquery, nDCG
from tqdm import tqdm

from pt_dance import Corpus, DanceRetriever, DenseRetriever, DualEncoder, Round, bm25, losses, recipes
from pt_dance.mining import NearDuplicate, RankRange
from pt_dance.training.inputs import TrainingInput, check_fit
from pt_dance.training.run_folder import RunFolder
from pt_dance.training.validation import documents_to_queries, measure_index
from small_collection import standard_library
from small_models import small_bert

FAST = dict(batch_size=32, learning_rate=0.02)


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """Corpus, BM25, encoder and split topics of the small collection."""
    folder = tmp_path_factory.mktemp("collection")
    small = standard_library()
    corpus = Corpus.build(small, folder / "corpus", verbose=False)
    encoder = DualEncoder.static(small.documents["text"], dim=64, vocab_size=2000, seed=1)
    held_out = small.topics.index % 4 == 0

    class Collection:
        pass

    made = Collection()
    made.corpus, made.encoder, made.bm25 = corpus, encoder, bm25(corpus, folder / "bm25", threads=1)
    made.train, made.dev, made.qrels = small.topics[~held_out], small.topics[held_out], small.qrels
    return made


@pytest.fixture(scope="module")
def fitted(collection, tmp_path_factory):
    """A retriever after ANCE's warm-up and two rounds behind BM25."""
    path = tmp_path_factory.mktemp("runs") / "ance"
    dance = make(collection, path, recipe=recipes.ance(2, **FAST), measure=[nDCG @ 10, RR @ 10])
    before = dance.retriever(round=0)
    fit(collection, dance)
    return dance, before


def make(collection, path, **options):
    options = {"recipe": recipes.ance(1, **FAST), "verbose": False, **options}
    return DanceRetriever(collection.encoder, collection.corpus, path, **options)


def fit(collection, dance):
    return (collection.bm25 % 30 >> dance).fit(collection.train, collection.qrels, collection.dev, collection.qrels)


def weights(encoder):
    return {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}


def test_fit_improves_on_the_untrained_encoder_and_records_every_round(collection, fitted):
    dance, before = fitted
    history = dance.history
    assert history["name"].tolist() == ["untrained", "warm-up", "ance", "ance"]
    assert history["round"].tolist() == [0, 1, 2, 3]
    seconds = ["mine_seconds", "train_seconds", "refresh_seconds", "validate_seconds"]
    for column in ["nDCG@10", "RR@10", *seconds]:
        assert history[column].notna().all() and (history[column] >= 0).all(), column
    for column in ["training_loss", "negatives_per_query"]:
        assert history[column].isna().tolist() == [True, False, False, False] and (history[column][1:] >= 0).all()
    assert history["new_negatives"][:2].isna().all()
    assert history["new_negatives"][2:].between(0, 1).all()
    table = pt.Experiment([before, dance], collection.dev, collection.qrels, [nDCG @ 10])
    assert table["nDCG@10"][1] > table["nDCG@10"][0] + 0.02
    assert table["nDCG@10"].tolist() == pytest.approx([history["nDCG@10"][0], history["nDCG@10"].max()])


def test_the_encoder_given_is_not_changed(collection, fitted):
    assert fitted[0].encoder.fingerprint != collection.encoder.fingerprint
    assert fitted[0].initial_encoder is collection.encoder
    assert fitted[1].index.fingerprint == collection.encoder.fingerprint


def test_linear_and_tree_plans_agree_before_and_after_training(collection, fitted):
    dance, before = fitted
    rounds = [before % 20, dance.retriever(round=1) % 20, dance.retriever(round=2) % 20, dance % 20]
    systems = [*rounds, collection.bm25 % 20 >> before, collection.bm25 % 20 >> dance.retriever(round=2)]
    measures = [nDCG @ 10, RR @ 10]
    linear = pt.Experiment(systems, collection.dev, collection.qrels, measures, plan="linear")
    tree = pt.Experiment(systems, collection.dev, collection.qrels, measures, plan="tree")
    pd.testing.assert_frame_equal(linear, tree)
    assert linear["nDCG@10"].nunique() > 2
    assert before != dance.retriever(round=1) != dance.retriever(round=2)


def test_a_round_keeps_answering_from_its_own_vectors(collection, tmp_path):
    # each round with a schedule of its own, so that the first one is the same whether or not another follows
    recipe = recipes.ance(2, warm_up=0, carry_optimizer=False, **FAST)
    dance = make(collection, tmp_path / "run", recipe=recipe)
    dance.fit(collection.train, collection.qrels)
    first = dance.retriever(round=1)
    answer = first(collection.dev)
    other = make(collection, tmp_path / "other", recipe=recipe[:1])
    other.fit(collection.train, collection.qrels)
    pd.testing.assert_frame_equal(answer, other(collection.dev))
    assert not answer["score"].equals(dance.retriever(round=2)(collection.dev)["score"])


def test_two_fits_with_one_seed_are_equal_to_the_bit_and_another_seed_is_not(collection, tmp_path):
    recipe = recipes.dance(warm_up=1, ance_rounds=0, **FAST)
    runs = [fit_into(collection, tmp_path / name, recipe, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    same, again, other = [weights(run.retriever(round=3).index.encoder) for run in runs]
    assert all(torch.equal(same[name], again[name]) for name in same)
    assert not all(torch.equal(same[name], other[name]) for name in same)
    pd.testing.assert_frame_equal(runs[0](collection.dev), runs[1](collection.dev))
    assert not runs[0](collection.dev)["score"].equals(runs[2](collection.dev)["score"])


def fit_into(collection, path, recipe, seed):
    dance = make(collection, path, recipe=recipe, seed=seed)
    fit(collection, dance)
    return dance


def test_rescoring_keeps_rows_and_columns_and_equals_the_dense_scores(collection, fitted):
    dance = fitted[0]
    candidates = (collection.bm25 % 50)(collection.dev).assign(
        title="kept", docid=np.arange(len((collection.bm25 % 50)(collection.dev)))
    )
    rescored = dance(candidates)
    assert len(rescored) == len(candidates) and rescored["docno"].tolist() == candidates["docno"].tolist()
    assert set(candidates.columns) - {"docid"} <= set(rescored.columns) and (rescored["title"] == "kept").all()
    vectors = dance.encoder.encode_queries(collection.dev["query"].tolist())
    queries = dict(zip(collection.dev["qid"], vectors, strict=True))
    documents = dance.encoder.encode_docs(collection.corpus.texts(candidates["docno"].tolist()))
    expected = [queries[qid] @ vector for qid, vector in zip(candidates["qid"], documents, strict=False)]
    np.testing.assert_allclose(rescored["score"], expected, atol=1e-5)
    in_rank_order = (
        rescored.sort_values(["qid", "rank"]).groupby("qid")["score"].apply(lambda s: s.is_monotonic_decreasing)
    )
    assert in_rank_order.all()
    nothing = dance(candidates.iloc[:0])
    assert len(nothing) == 0 and list(nothing.columns) == list(rescored.columns)
    assert list(dance(collection.dev.iloc[:0]).columns) == list(dance(collection.dev).columns)


def test_compositions_work_in_an_experiment(collection, fitted):
    dance = fitted[0]
    systems = [
        collection.bm25, dance, collection.bm25 % 20 >> dance, collection.bm25 % 20 + dance % 20,
        (collection.bm25 % 20) | (dance % 20), (collection.bm25 % 20) >> (dance ** dance), dance % 3,
    ]  # fmt: skip
    results = [system(collection.dev.head(5)) for system in systems]
    assert all(len(result) for result in results)
    assert results[6].groupby("qid").size().max() == 3
    compiled = (collection.bm25 % 20 >> dance).compile()
    pd.testing.assert_frame_equal(compiled(collection.dev.head(5)), results[2])


def test_save_and_load_give_the_same_run(collection, fitted, tmp_path):
    dance = fitted[0]
    expected = dance(collection.dev)
    dance.save(tmp_path / "saved")
    for opened in (
        DanceRetriever.load(dance.path), DanceRetriever.load(tmp_path / "saved"), pt.Artifact.load(tmp_path / "saved"),
    ):  # fmt: skip
        pd.testing.assert_frame_equal(opened(collection.dev), expected)
        pd.testing.assert_frame_equal(opened.history, dance.history)
        assert opened.encoder.fingerprint == dance.encoder.fingerprint
    with pytest.raises(FileExistsError, match="saved"):
        dance.save(tmp_path / "saved")


def test_a_finished_fit_is_not_repeated_and_other_settings_are_refused(collection, fitted):
    dance = fitted[0]
    stamps = {path: path.stat().st_mtime_ns for path in dance.path.rglob("*.safetensors")}
    again = make(collection, dance.path, recipe=dance.recipe, measure=dance.measure)
    fit(collection, again)
    assert stamps == {path: path.stat().st_mtime_ns for path in dance.path.rglob("*.safetensors")}
    pd.testing.assert_frame_equal(again.history, dance.history)
    other = make(collection, dance.path, recipe=dance.recipe, measure=dance.measure, seed=7)
    with pytest.raises(ValueError, match="seed was 42, is 7"):
        fit(collection, other)


def test_early_stopping_keeps_the_best_round(collection, tmp_path):
    # a learning rate that wrecks the encoder from the second round on
    recipe = recipes.ance(3, **FAST)
    recipe[1:] = [Round(negatives=recipes.current_model, learning_rate=50.0, batch_size=32, name="wreck")] * 3
    dance = make(collection, tmp_path / "run", recipe=recipe, patience=1)
    fit(collection, dance)
    assert len(dance.history) == 3 and dance.history["nDCG@10"].idxmax() == 1
    assert dance.encoder.fingerprint == dance.retriever(round=1).index.fingerprint


def test_a_round_may_start_from_the_best_one_so_far(collection, tmp_path):
    """Shown by steps too small to move any weight: its encoder, and what it mines with, are those it began with."""
    good, wreck = recipes.mnrl(**FAST)[0], Round(learning_rate=50.0, batch_size=32)
    still = Round(negatives=recipes.current_model, start="best", learning_rate=1e-30, batch_size=32)
    dance = make(collection, tmp_path / "run", recipe=[good, wreck, still])
    fit(collection, dance)
    assert dance.history["nDCG@10"].iloc[1:3].idxmax() == 1
    first, _, last = (weights(dance.retriever(round=number).index.encoder) for number in (1, 2, 3))
    assert all(torch.equal(first[name], last[name]) for name in first)
    mined = RunFolder(dance.path).read_frame(3, "negatives")[0]
    scores = dance.retriever(round=1)(mined[["qid", "docno"]].merge(collection.train, on="qid"))
    found = mined.merge(scores, on=["qid", "docno"], suffixes=("", "_first"))
    assert len(found) == len(mined) and np.abs(found["score"] - found["score_first"]).max() < 1e-6
    hurt = make(collection, tmp_path / "hurt", recipe=[wreck, still])
    fit(collection, hurt)  # a stage goes on from what was trained, even where the encoder as it came was better
    assert hurt.history["nDCG@10"].idxmax() == 0
    first, last = (weights(hurt.retriever(round=number).index.encoder) for number in (1, 2))
    assert all(torch.equal(first[name], last[name]) for name in first)
    unmeasured = make(collection, tmp_path / "unmeasured", recipe=[good, wreck, still])
    unmeasured.fit(collection.train, collection.qrels)  # the last one where nothing says which is best
    _, second, last = (weights(unmeasured.retriever(round=number).index.encoder) for number in (1, 2, 3))
    assert all(torch.equal(second[name], last[name]) for name in second)


def test_plain_topics_start_with_in_batch_negatives(collection, tmp_path):
    dance = make(collection, tmp_path / "run", recipe=recipes.ance(1, loss="pairwise", **FAST))
    assert dance.fit(collection.train, collection.qrels) is dance
    assert dance.history["loss"].tolist()[1:] == ["contrastive", "pairwise"]
    assert dance.history["negatives_per_query"].tolist()[1] == 0


def test_negatives_from_lists_and_functions_of_the_dense_retriever(collection, tmp_path):
    mixed = [(collection.bm25 % 30, 1.0), (lambda dense: collection.bm25 % 10 >> dense, 2.0), lambda dense: dense % 15]
    dance = make(collection, tmp_path / "run", recipe=[Round(negatives=mixed, negatives_per_query=8, **FAST)])
    dance.fit(collection.train, collection.qrels)
    negatives, report = RunFolder(dance.path).read_frame(1, "negatives")
    assert report["negatives"] == len(negatives) and negatives.groupby("qid").size().max() == 8


def test_silent_without_verbose(collection, tmp_path, capfd):
    dance = make(collection, tmp_path / "run", recipe=recipes.dance(ance_rounds=0, **FAST))
    dance.fit(collection.train, collection.qrels, collection.dev, collection.qrels)
    dance(collection.dev)
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


def test_a_transformer_is_trained_in_silence_too(collection, tmp_path, capfd):
    corpus = Corpus.build(standard_library().documents.head(40), tmp_path / "corpus", verbose=False)
    path = small_bert(corpus.texts_at(range(40)), tmp_path)
    capfd.readouterr()  # transformers has bars of its own where the tests write a model
    encoder = DualEncoder(path, device="cpu", max_length=16)
    recipe = recipes.dance(ance_rounds=0, batch_size=4, checkpoint_steps=2)
    qrels = collection.qrels[collection.qrels["docno"].isin(corpus.docno(range(40)))]
    topics = standard_library().topics[standard_library().topics["qid"].isin(qrels["qid"])].head(12)
    DanceRetriever(encoder, corpus, tmp_path / "run", recipe=recipe, verbose=False).fit(topics, qrels, topics, qrels)
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


def test_one_bar_a_phase_that_counts_what_it_says(collection, tmp_path, monkeypatch, capfd):
    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"file": io.StringIO(), "disable": False})
            self.shown = not kwargs.get("disable")
            assert not (self.shown and args), "bars count units, not blocks"
            assert not (self.shown and any(bar.shown and not bar.closed for bar in bars)), "two bars at once"
            self.closed = False
            bars.append(self)

        def close(self):
            self.closed = True
            super().close()

    monkeypatch.setattr(pt, "tqdm", Bar)
    teacher = collection.corpus.text_loader() >> pt.apply.doc_score(lambda row: float(len(row["text"]) % 7))
    recipe = [Round(loss="margin_mse", teacher=teacher, loss_options={"dual": True}, negatives=recipes.current_model,
                    query_negatives="dense", **FAST)] * 2  # fmt: skip
    dance = make(collection, tmp_path / "run", recipe=recipe, verbose=True)
    dance.fit(collection.train, collection.qrels, collection.dev, collection.qrels)
    assert all(bar.n == bar.total for bar in bars if bar.shown)
    shown = [(bar.desc.removesuffix(": "), bar.unit) for bar in bars if bar.shown]
    a_round = [("mining documents", "query"), ("mining queries", "doc"), ("teacher", "pair"), ("training", "step")]
    assert [phase for phase in shown if phase in a_round] == a_round * 2
    totals = {bar.desc.removesuffix(": "): bar.total for bar in bars}
    assert totals["mining documents"] == len(collection.train)
    assert totals["training"] == dance.history["steps"][1]
    printed = capfd.readouterr()
    assert "it/s" not in printed.err and "%|" not in printed.err and printed.out.count("round ") == 3


def test_repr_is_short_and_attributes_are_found(collection, tmp_path):
    dance = make(collection, tmp_path / "run", num_results=77)
    assert repr(dance) == f"DanceRetriever({str(tmp_path / 'run')!r})"
    attributes = {attribute.name: attribute.value for attribute in pt.inspect.transformer_attributes(dance)}
    assert attributes["num_results"] == 77 and attributes["corpus"] is collection.corpus


def test_what_was_saved_is_loaded_whole_and_never_changed(collection, fitted, tmp_path):
    fitted[0].save(tmp_path / "saved")
    assert DanceRetriever.load(tmp_path / "saved").corpus == fitted[0].corpus
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "saved", tmp_path / "elsewhere" / "moved")
    loaded = DanceRetriever.load(tmp_path / "elsewhere" / "moved")
    assert loaded.corpus is None
    before = contents(loaded.path)
    expected = loaded(collection.dev)
    for given in (loaded, DanceRetriever.load(fitted[0].path), make(collection, loaded.path)):
        with pytest.raises(ValueError, match=r"does not change.*loaded\.encoder"):
            given.fit(collection.train, collection.qrels)
    with pytest.raises(ValueError, match="round=0 is not in"):
        loaded.retriever(round=0)
    assert loaded.initial_encoder is None
    assert before == contents(loaded.path)
    pd.testing.assert_frame_equal(loaded(collection.dev), expected)
    again = DanceRetriever(loaded.encoder, collection.corpus, tmp_path / "on", recipe=loaded.recipe[:1], verbose=False)
    assert again.fit(collection.train, collection.qrels).encoder != loaded.encoder


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_load_restores_measure_and_recipe(collection, fitted, tmp_path):
    loaded = DanceRetriever.load(fitted[0].path)
    assert list(map(str, loaded.measure)) == ["nDCG@10", "RR@10"]
    assert loaded.recipe == fitted[0].recipe
    recipe = [
        Round(
            negatives=[(collection.bm25 % 30, 2.0), recipes.current_model], rank_range=(1, 9), batch_size=np.int64(32),
            loss=[("contrastive", 1.0, {"temperature": 0.1})], filters=[RankRange(1, 20), NearDuplicate(0.7)],
        )
    ]  # fmt: skip
    dance = make(collection, tmp_path / "run", recipe=recipe).fit(collection.train, collection.qrels)
    dance.save(tmp_path / "saved")
    (found,) = DanceRetriever.load(tmp_path / "saved").recipe
    assert replace(found, negatives=None) == replace(recipe[0], negatives=None)
    (lost, weight), kept = found.negatives
    assert kept is recipes.current_model and weight == 2.0 and repr(lost) == repr(collection.bm25 % 30)
    with pytest.raises(ValueError, match="not stored"):
        lost(collection.dev)

    class Own(losses.ContrastiveLoss):
        pass

    own = make(collection, tmp_path / "own", recipe=[Round(loss=Own, **FAST)]).fit(collection.train, collection.qrels)
    assert DanceRetriever.load(own.path).recipe is None and len(DanceRetriever.load(own.path)(collection.dev.head(1)))


def test_attributes_are_live_or_cannot_be_set(collection, tmp_path):
    values = {"num_results": 3, "measure": "RR@5", "seed": 7, "patience": 1, "keep": "best"}
    set_after, given = make(collection, tmp_path / "a"), make(collection, tmp_path / "b", **values)
    for name in ("initial_encoder", "history"):
        with pytest.raises(AttributeError):
            setattr(set_after, name, None)
    len(set_after(collection.dev.head(2)))  # used before, so that whatever is kept from then on would show
    for name, value in values.items():
        setattr(set_after, name, value)
    results = []
    for dance in (set_after, given):
        fit(collection, dance)
        results.append(dance(collection.dev))
    pd.testing.assert_frame_equal(*results)
    pd.testing.assert_frame_equal(
        *(dance.history.filter(regex="^(?!.*_seconds)") for dance in (set_after, given)), check_exact=True
    )
    assert results[0].groupby("qid").size().max() == 3 and "RR@5" in set_after.history
    kept = [sorted(f.parent.name for f in dance.path.glob("rounds/*/index")) for dance in (set_after, given)]
    assert kept[0] == kept[1] and "00" not in kept[0]


def test_a_grid_over_num_results_gives_each_its_own(collection, fitted):
    dance = fitted[0]
    table = pt.GridScan(dance, {dance: {"num_results": [1, 10]}}, collection.dev, collection.qrels, ["recall_10"])
    assert table["recall_10"][0] < table["recall_10"][1]
    dance.num_results = 1000


def test_what_is_mined_and_kept_does_not_depend_on_num_results(collection, tmp_path):
    runs = []
    for results in (1, 1000):
        recipe = recipes.ance(2, warm_up=0, depth=25, **FAST)
        runs.append(make(collection, tmp_path / str(results), recipe=recipe, num_results=results))
        runs[-1].fit(collection.train, collection.qrels, collection.dev, collection.qrels)
    assert RunFolder(runs[0].path).read_frame(1, "negatives")[0]["rank"].max() == 24
    few, many = (weights(run.retriever(round=2).index.encoder) for run in runs)
    assert all(torch.equal(few[name], many[name]) for name in few)
    assert runs[0].history["nDCG@10"].tolist() == runs[1].history["nDCG@10"].tolist()
    assert runs[0].encoder.fingerprint == runs[1].encoder.fingerprint
    assert len(runs[0](collection.dev.head(1))) == 1


def test_training_that_only_hurts_leaves_the_untrained_encoder_and_says_so(collection, tmp_path, recwarn):
    wrong = collection.qrels.assign(docno=collection.qrels["docno"].sample(frac=1, random_state=1).tolist())
    recipe = [Round(batch_size=32, learning_rate=50.0, negatives=None)] * 3
    dance = make(collection, tmp_path / "run", recipe=recipe, patience=2, keep="best")
    dance.fit(collection.train, wrong, collection.dev, collection.qrels)
    history = dance.history
    assert history["round"].tolist() == [0, 1, 2] and history["nDCG@10"].idxmax() == 0
    assert dance.encoder.fingerprint == collection.encoder.fingerprint
    said = [str(warning.message) for warning in recwarn if "worse" in str(warning.message)]
    before, after = history["nDCG@10"][0], history["nDCG@10"][1:].max()
    assert len(said) == 1 and f"was {before:.4f} before and {after:.4f} after" in said[0]
    assert (dance.path / "rounds" / "00" / "index").exists() and not (dance.path / "rounds" / "01" / "index").exists()
    measured = pt.Experiment([dance], collection.dev, collection.qrels, [nDCG @ 10])["nDCG@10"][0]
    assert measured == pytest.approx(history["nDCG@10"][0])


def test_other_documents_on_the_path_of_a_run_are_refused(collection, fitted, tmp_path):
    """By what they say, not by where they are: neither trained on nor searched with the vectors of the old ones."""
    shutil.copytree(fitted[0].path, tmp_path / "run")
    documents = standard_library().documents
    given = dict(recipe=fitted[0].recipe, measure=fitted[0].measure, verbose=False)
    for name, text, is_same in (("same", "", True), ("corrected", "corrected ", False)):
        corpus = Corpus.build(documents.assign(text=text + documents["text"]), tmp_path / name, verbose=False)
        dance = DanceRetriever(collection.encoder, corpus, tmp_path / "run", **given)
        if is_same:
            fit(collection, dance)
            pd.testing.assert_frame_equal(dance(collection.dev), fitted[0](collection.dev))
            continue
        with pytest.raises(ValueError, match=r"was begun with other settings \(corpus was"):
            fit(collection, dance)
        with pytest.raises(ValueError, match="was made from another corpus than"):
            dance(collection.dev)


def test_only_the_measure_changes_and_nothing_is_trained_anew(collection, fitted, tmp_path):
    shutil.copytree(fitted[0].path, tmp_path / "run")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    again = make(
        collection, tmp_path / "run", recipe=fitted[0].recipe, measure=[RR @ 5], num_results=7, patience=3, keep="best"
    )
    fit(collection, again)
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    of_rounds = [again.retriever(100, round=number) for number in range(4)]
    expected = pt.Experiment(of_rounds, collection.dev, collection.qrels, [RR @ 5])["RR@5"]
    assert again.history["RR@5"].tolist() == pytest.approx(expected.tolist())
    assert again.history["nDCG@10"].tolist() == fitted[0].history["nDCG@10"].tolist()


def test_a_measure_that_cannot_be_computed_is_named_before_any_work(collection, tmp_path):
    class Broken(pt.Transformer):
        def transform(self, inp):
            raise AssertionError("mined before the measure was tried")

    train, dev, qrels = (
        frame.assign(qid="topic " + frame["qid"]) for frame in (collection.train, collection.dev, collection.qrels)
    )

    def only_forwards(qrels, results):
        return 1 / bool(qrels["query_id"].str.startswith("topic ").all())

    for measure in ("Accuracy@1", define_byquery(only_forwards, name="Forwards")):
        dance = make(collection, tmp_path / "run", measure=measure, recipe=[Round(negatives=Broken())])
        with pytest.raises(ValueError, match=rf"measure={measure} cannot be computed here \(ZeroDivisionError"):
            dance.fit(train, qrels, dev, qrels)
        assert not (tmp_path / "run").exists()


def test_a_call_that_trained_nothing_does_not_hold_its_folder(collection, tmp_path):
    few = collection.train.head(40)
    with pytest.raises(ValueError, match="nothing to learn from in round 1"):
        make(collection, tmp_path / "run", recipe=[Round(negatives=None, batch_size=1)]).fit(few, collection.qrels)
    dance = make(collection, tmp_path / "run", recipe=[Round(negatives=None, **FAST)], seed=5)
    assert len(dance.fit(few, collection.qrels).history) == 2
    with pytest.raises(ValueError, match="seed was 5, is 6"):
        make(collection, tmp_path / "run", recipe=dance.recipe, seed=6).fit(few, collection.qrels)


def test_nothing_to_learn_from_is_an_error_whatever_the_loss(collection, tmp_path):
    positives = collection.train.merge(collection.qrels[["qid", "docno"]], on="qid").assign(score=1.0, rank=0)
    teacher = collection.corpus.text_loader() >> pt.apply.doc_score(lambda row: float(len(row["text"]) % 7))
    cases = {
        "pairwise": (positives, {}), "margin_mse": (positives, {"teacher": teacher}),
        "contrastive": (collection.train, {"batch_size": 1}), "samtone": (collection.train, {"batch_size": 1}),
    }  # fmt: skip
    for loss, (topics, options) in cases.items():
        dance = make(collection, tmp_path / loss, recipe=[Round(loss=loss, **options)])
        with pytest.raises(ValueError, match="nothing to learn from in round 1: none of its"):
            dance.fit(topics, collection.qrels)
        assert not list((tmp_path / loss).rglob("trained.json"))


def test_copies_and_queries_that_read_the_same_are_no_negatives_in_a_batch(collection, tmp_path):
    """Where a batch has nothing else there is nothing to learn from; one other word, and there is."""
    topics = pd.DataFrame({"qid": ["1", "2"], "query": ["fruit", "water"]})
    qrels = pd.DataFrame({"qid": ["1", "2"], "docno": ["a", "b"], "label": 1})
    for number, texts in enumerate([("apple river", "Apple  river"), ("apple river", "apple stone")]):
        documents = [{"docno": docno, "text": text} for docno, text in zip("ab", texts, strict=True)]
        corpus = Corpus.build(documents, tmp_path / f"corpus-{number}", verbose=False)
        encoder = DualEncoder.static([*texts, *topics["query"]], dim=8, vocab_size=100)
        recipe = [Round(negatives=None, batch_size=2)]
        dance = DanceRetriever(encoder, corpus, tmp_path / f"run-{number}", recipe=recipe, verbose=False)
        if number:
            assert dance.fit(topics, qrels).history["training_loss"].iloc[1] > 0
            continue
        with pytest.raises(ValueError, match="nothing to learn from in round 1"):
            dance.fit(topics, qrels)


def test_a_last_batch_that_is_dropped_and_was_the_only_one_is_refused_before_any_work(collection, tmp_path):
    arguments = {"dataloader_drop_last": True}
    dance = make(collection, tmp_path / "run", recipe=[Round(batch_size=1000, training_arguments=arguments)])
    with pytest.raises(ValueError, match="fewer than batch_size=1000"):
        fit(collection, dance)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"eval_strategy": "steps"}, {"load_best_model_at_end": True}, {"neftune_noise_alpha": 5}, {"max_steps": 3},
        {"optim": "no such"}, {"learning_rate": 1.0}, {"logging_steps": 0}, {"save_only_model": True},
    ],
)  # fmt: skip
def test_training_arguments_that_cannot_work_are_refused_when_the_round_is_made(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))) as error:
        Round(training_arguments=arguments)
    assert "\n" not in str(error.value)


def test_fit_keeps_of_results_what_mining_needs(collection, tmp_path):
    frame = (collection.bm25 % 30)(collection.train)
    given = dict(corpus=collection.corpus, reads=collection.encoder, context=make(collection, tmp_path / "run"))
    wide = frame.assign(text="as long as documents are " * 40, title="kept by somebody", docid=7)
    kept = [check_fit(results, collection.qrels, None, None, **given)[0].first_stage for results in (frame, wide)]
    pd.testing.assert_frame_equal(*kept)
    assert set(kept[0].columns) == {"qid", "docno", "rank", "score"}
    bytes_a_row = kept[0].memory_usage(index=False).sum() / len(frame)
    assert bytes_a_row < 20 < frame.memory_usage(index=False).sum() / len(frame)


def test_fit_behind_a_rewriter_learns_from_the_users_words(collection, tmp_path):
    def expand(frame):  # what RM3 leaves: Terrier's query language in query, the user's words in query_0
        frame = pt.model.push_queries(frame)
        weighted = frame["query_0"].map(lambda query: " ".join(f"{word[:4]}^0.3" for word in query.split()))
        return frame.assign(query="applypipeline:off " + weighted)

    first = collection.bm25 % 10
    rewritten = first >> pt.apply.generic(expand)
    fits = {}
    for name, stage in (("plain", first), ("rewritten", rewritten)):
        dance = make(collection, tmp_path / name, recipe=recipes.ance(1, **FAST))
        (stage >> dance).fit(collection.train, collection.qrels, collection.dev, collection.qrels)
        fits[name] = dance
    assert fits["plain"].encoder.fingerprint == fits["rewritten"].encoder.fingerprint
    assert fits["plain"].history["nDCG@10"].tolist() == fits["rewritten"].history["nDCG@10"].tolist()
    assert fits["plain"].history["d→q nDCG@10"].tolist() == fits["rewritten"].history["d→q nDCG@10"].tolist()


def test_grades_count_in_both_directions(collection, tmp_path):
    dance = make(collection, tmp_path / "run")
    index = dance.index
    own = collection.qrels[collection.qrels["qid"].isin(collection.dev["qid"])].drop_duplicates("docno")
    others = own.assign(qid=own["qid"].shift(1, fill_value=own["qid"].iloc[-1]), label=1)
    qrels = pd.concat([own.assign(label=3), others]).drop_duplicates(["qid", "docno"])
    _, backwards = documents_to_queries(index, collection.dev, qrels, 10)
    given = {(row.qid, row.docno): row.label for row in qrels.itertuples()}
    found = {(row.docno, row.qid): row.label for row in backwards.itertuples()}
    assert {pair: found[pair] for pair in given} == given and set(given.values()) == {1, 3}
    graded, flat = (
        measure_index(index, TrainingInput(collection.dev, frame, None, None, None), [nDCG @ 10])
        for frame in (qrels, qrels.assign(label=1))
    )
    assert graded["d→q nDCG@10"] != flat["d→q nDCG@10"]


def test_a_run_by_a_relative_path_is_found_from_elsewhere(collection, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dance = make(collection, "run").fit(collection.train.head(40), collection.qrels)
    monkeypatch.chdir("/")
    assert dance.path == tmp_path / "run" and len(dance(collection.dev.head(1)))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert make(collection, "~/run").path == tmp_path / "run"


def test_damaged_metadata_is_named(fitted, tmp_path):
    fitted[0].save(tmp_path / "saved")
    meta = tmp_path / "saved" / "pt_meta.json"
    good = json.loads(meta.read_text())
    for change, message in (
        ({"round": "1"}, "'round'"), ({"round": 9}, "round 9"), ({"history": 3}, "'history'"), ({"type": "x"}, "'x'"),
    ):  # fmt: skip
        meta.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            DanceRetriever.load(tmp_path / "saved")
    meta.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        DanceRetriever.load(tmp_path / "saved")
    with pytest.raises(FileNotFoundError, match="no fitted DanceRetriever"):
        DanceRetriever.load(tmp_path)


@lru_cache
def uninspected() -> DanceRetriever:
    """A retriever with neither index nor folder."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    corpus = Corpus.build(standard_library(), folder / "corpus", verbose=False)
    encoder = DualEncoder.static(standard_library().documents["text"].head(20), dim=8, vocab_size=500)
    return DanceRetriever(encoder, corpus, folder / "run")


class TestTransformerContract(pt.testing.transformer_test_class(uninspected)):
    """PyTerrier's own checks of inputs, outputs and schematics."""

    def test_inspection_makes_no_index(self):
        outputs = pt.inspect.transformer_outputs(self.transformer, ["qid", "query"])
        assert set(outputs) == {"qid", "query", "docno", "score", "rank"}
        assert not self.transformer.path.exists()


def test_dense_retriever_is_what_transform_uses(fitted):
    assert isinstance(fitted[0].retriever(), DenseRetriever)
    assert fitted[0].retriever(5).num_results == 5


def test_rounds_that_carry_the_optimizer_share_one_schedule():
    first = Round(learning_rate=1e-3)
    for option, value in {
        "learning_rate": 2e-3, "warmup": 0.3, "scheduler": "cosine", "training_arguments": {"weight_decay": 0.1},
    }.items():  # fmt: skip
        other = replace(first, carry_optimizer=True, **{option: value})
        with pytest.raises(ValueError, match=f"round 2 .*{option}"):
            recipes.check_recipe([first, other])
        recipes.check_recipe([first, replace(other, carry_optimizer=False)])
    for wrong in ({"carry_optimizer": 1}, {"steps": 0}, {"steps": 2.0}):
        with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
            Round(**wrong)
