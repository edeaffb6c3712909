"""Every recipe trains end to end on small collections and beats the untrained encoder; a teacher is asked once."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
import torch
from ir_measures import nDCG

from pt_dance import Corpus, DanceRetriever, DualEncoder, Round, losses, mining, recipes
from pt_dance.recipes import current_model
from pt_dance.training import defaults
from pt_dance.training.run_folder import RunFolder
from small_collection import standard_library

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
from common import default_recipes

FAST = dict(batch_size=32, learning_rate=0.02)
# squared margins and towers of their own forget what the untrained encoder knows when the steps are large
GENTLE = dict(batch_size=32, learning_rate=0.004)


class Collection:
    """Some hundred training and dev queries with their documents, and a dense first stage that needs no Java."""

    def __init__(self, folder, documents, train, dev, qrels):
        self.train, self.dev = (topics[["qid", "query"]].reset_index(drop=True) for topics in (train, dev))
        self.qrels = qrels[qrels["qid"].isin([*train["qid"], *dev["qid"]])].reset_index(drop=True)
        self.corpus = Corpus.build(documents, folder / "corpus", verbose=False)
        texts = self.corpus.texts_at(range(len(self.corpus)))
        self.encoder = DualEncoder.static(texts, dim=64, vocab_size=8000, seed=1)
        start = DanceRetriever(self.encoder, self.corpus, folder / "first", verbose=False)
        self.first_stage, self.folder = start.retriever(round=0), folder
        dot = DanceRetriever(self.encoder.with_similarity("dot"), self.corpus, folder / "dot", verbose=False)
        self.untrained = {"cosine": self.measure(self.first_stage), "dot": self.measure(dot.retriever(round=0))}

    def measure(self, system):
        qrels = self.qrels[self.qrels["qid"].isin(self.dev["qid"])]
        return pt.Evaluate((system % 10)(self.dev), qrels, metrics=[nDCG @ 10])["nDCG@10"]

    def fit(self, path, recipe, encoder=None, **options):
        dance = DanceRetriever(encoder or self.encoder, self.corpus, path, recipe=recipe, verbose=False, **options)
        return dance, (self.first_stage % 50 >> dance).fit(self.train, self.qrels, self.dev, self.qrels)


def docstrings():
    """What the repository itself has, so that every recipe is trained wherever the tests run."""
    documents, topics, qrels = standard_library(None)
    return documents, topics.iloc[::3], topics.iloc[1::6], qrels


def medquad(folder):
    """A slice of a collection of questions and answers."""
    dataset = pt.get_dataset(f"dance:{folder}")
    train, dev = dataset.get_topics("train").iloc[::40], dataset.get_topics("dev").iloc[::12]
    qrels = pd.concat([dataset.get_qrels("train"), dataset.get_qrels("dev")])
    wanted = set(qrels.loc[qrels["qid"].isin([*train["qid"], *dev["qid"]]), "docno"])
    corpus = dataset.get_corpus_iter(verbose=False)
    return [d for i, d in enumerate(corpus) if d["docno"] in wanted or i % 25 == 0], train, dev, qrels


@pytest.fixture(scope="module", params=["docstrings", pytest.param("medquad", marks=pytest.mark.collections)])
def collection(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "docstrings":
        return Collection(folder, *docstrings())
    return Collection(folder, *medquad(request.getfixturevalue("shared_data")("medquad")))


@pytest.fixture(scope="module")
def teacher(collection):
    """The scorer of an encoder that was trained before; ten times its cosine, since margins of logits are larger."""
    dance, _ = collection.fit(collection.folder / "teacher", recipes.mnrl(epochs=3, **FAST))
    return dance.encoder.scorer() >> pt.apply.doc_score(lambda row: 10 * row["score"])


# what the defaults, which are all trained below, have not
RECIPES = {
    "ance pairs": lambda: recipes.ance(1, warm_up=2, loss="pairwise", **GENTLE),
    "samtone both": lambda: recipes.samtone(2, sides="both", **FAST),
}
START = dict(warm_up=0, ance_rounds=0)
for norm in (True, False):
    for dual in (True, False):
        name = f"dance {'norm' if norm else 'dot'} {'dual' if dual else 'document'}"
        # as published, on a warm-up with in-batch negatives: some hundred rows are too few for pairs alone
        RECIPES[name] = lambda norm=norm, dual=dual: [
            *recipes.mnrl(2, similarity="cosine" if norm else "dot", **FAST),
            *recipes.dance(1, loss="pairwise", normalize=norm, dual=dual, **START, **{**FAST, "learning_rate": 0.001}),
        ]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_beats_the_untrained_encoder(collection, tmp_path, name):
    recipe = RECIPES[name]()
    dance, _ = collection.fit(tmp_path / "run", recipe)
    # Raw dot products of this encoder are worse than its cosines, even trained: then the untrained one stays the best.
    similarity = "dot" if "dot" in [round_.similarity for round_ in recipe] else "cosine"
    assert dance.history["nDCG@10"].iloc[-1] > collection.untrained[similarity] + 0.005, dance.history.T
    assert_measured(collection, dance, recipe)


def assert_measured(collection, dance, recipe):
    """The history has what the retriever, which is that of the best round, is worth in both directions."""
    last = dance.history.iloc[-1]
    assert collection.measure(dance) == pytest.approx(dance.history["nDCG@10"].max())
    assert recipe[-1].query_negatives is None or last["query_negatives_per_document"] > 0
    assert 0 < last["d→q nDCG@10"] <= 1


def test_ance_learns_from_pairs_with_the_similarity_of_the_encoder(collection, tmp_path):
    dance, _ = collection.fit(tmp_path / "run", recipes.ance(2, loss="pairwise", warm_up=2), encoder=collection.encoder)
    assert dance.history["loss"].tolist()[1:] == ["contrastive", "pairwise", "pairwise"]
    trained = DualEncoder.load(tmp_path / "run" / "rounds" / "03" / "encoder")
    assert trained.similarity == "cosine"
    assert dance.history["training_loss"].iloc[2] != dance.history["training_loss"].iloc[3]


class Tenfold(pt.Transformer):
    """A teacher's scores, many times as large, as those of another model may be."""

    def __init__(self, teacher, times):
        self.teacher, self.fingerprint = teacher, f"{times} times"
        self.times = times

    def transform(self, inp):
        """Score rows."""
        return self.teacher(inp).assign(score=lambda rows: self.times * rows["score"])

    def subtransformers(self):
        """Return none."""
        return {}


def test_what_a_round_leaves_open_follows_from_the_encoder(collection, teacher, tmp_path):
    """Rates scale with a static tower's weights, temperatures with lengths, and a teacher's scale does not count."""
    static = defaults.learning_rate(collection.encoder)
    larger = collection.encoder.copy()
    with torch.no_grad():
        for weights in larger.model.parameters():
            weights.mul_(8)
    weights = np.concatenate([w.detach().numpy().ravel() for w in collection.encoder.model.parameters()])
    assert static == pytest.approx(0.02 * np.sqrt(np.mean(np.square(weights.astype(float)))), rel=5e-3)
    assert defaults.learning_rate(larger) == pytest.approx(8 * static, rel=5e-3)
    runs = {}
    for times in (1, 64):
        recipe = recipes.margin_mse(Tenfold(teacher, times))
        runs[times], _ = collection.fit(tmp_path / str(times), recipe)
        row = runs[times].history.iloc[1]
        assert row["learning_rate"] == pytest.approx(static) and row["similarity"] == "cosine"
    texts = collection.dev["query"].tolist()
    trained = [DualEncoder.load(run.path / "rounds" / "01" / "encoder") for run in runs.values()]
    np.testing.assert_allclose(*[encoder.encode_queries(texts) for encoder in trained], atol=1e-5)
    assert runs[1].history["temperature"].iloc[1] == runs[64].history["temperature"].iloc[1] < 1


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_temperature_that_is_left_open_follows_from_the_length_of_the_vectors(collection, tmp_path, similarity):
    """Of cosines it is .05, and of dot products so much larger that the softmaxes are alike."""
    encoder, topics = collection.encoder.with_similarity(similarity), collection.train.head(40)
    recipe = recipes.mnrl(negatives=None)
    dance = DanceRetriever(encoder, collection.corpus, tmp_path / "run", recipe=recipe, verbose=False)
    dance.fit(topics, collection.qrels)
    pairs = collection.qrels[collection.qrels["label"] > 0].merge(topics, on="qid")
    assert len(topics) <= len(pairs) <= defaults.ROWS
    queries = encoder.encode_queries(pairs["query"].tolist())
    documents = encoder.encode_docs(collection.corpus.texts(pairs["docno"]))
    lengths = np.linalg.norm(queries, axis=1) * np.linalg.norm(documents, axis=1)
    assert dance.history["temperature"].iloc[1] == pytest.approx(0.05 * lengths.mean(), rel=1e-4)
    assert (abs(lengths.mean() - 1) < 1e-4) == (similarity == "cosine")


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_teacher_asks_for_margins_twice_as_large_as_the_encoders(collection, teacher, tmp_path, similarity):
    """Computed from the mined negatives: in the loss the teacher's margins are 1 where the encoder's are one half."""
    recipe = recipes.margin_mse(teacher, similarity=similarity, negatives_per_query=1, sampling="top")
    dance = DanceRetriever(collection.encoder, collection.corpus, tmp_path / "run", recipe=recipe, verbose=False)
    topics = collection.train.head(40)
    (collection.first_stage % 50 >> dance).fit(topics, collection.qrels)
    known = collection.qrels[collection.qrels["label"] > 0].merge(topics, on="qid")
    pairs = known.merge(dance.negatives(1)[["qid", "docno"]], on="qid", suffixes=("", "_negative"))
    assert len(topics) <= len(pairs) <= defaults.ROWS
    encoder, queries = collection.encoder.with_similarity(similarity), pairs["query"]
    vectors, scores = [], []
    for column in ("docno", "docno_negative"):
        texts = collection.corpus.texts(pairs[column])
        vectors.append(encoder.encode_docs(texts))
        rows = pd.DataFrame({"qid": pairs["qid"], "query": queries, "docno": pairs.index.astype(str), "text": texts})
        scores.append(teacher(rows).set_index("docno")["score"].loc[rows["docno"]].to_numpy())
    own = ((vectors[0] - vectors[1]) * encoder.encode_queries(queries.tolist())).sum(axis=1)
    theirs = scores[0] - scores[1]
    settled = dance.history.iloc[1]
    assert settled["temperature"] == pytest.approx(2 * np.sqrt(np.mean(np.square(own, dtype=float))), rel=1e-4)
    assert settled["teacher_scale"] == pytest.approx(np.sqrt(np.mean(np.square(theirs))), rel=1e-4)


DEFAULTS = list(default_recipes(pt.Transformer.identity()))


def test_every_recipe_is_tried_with_its_defaults():
    assert set(DEFAULTS) == set(recipes.__all__) - {"Round", "check_recipe", "current_model"}


SHORT = ("dance", "samtone", "margin_mse_mnrl_dual")  # of two towers; the others when there is time


@pytest.mark.parametrize(
    ("name", "towers"),
    [(name, 1) for name in DEFAULTS]
    + [pytest.param(name, 2, marks=() if name in SHORT else pytest.mark.collections) for name in DEFAULTS],
)
def test_the_defaults_improve_the_encoder_in_their_last_round(collection, teacher, tmp_path, name, towers):
    encoder, recipe = collection.encoder, default_recipes(teacher)[name]
    if towers == 2:
        encoder = DualEncoder.two_towers(encoder, encoder)
    dance, _ = collection.fit(tmp_path / "run", recipe, encoder=encoder)
    assert dance.history["nDCG@10"].iloc[-1] > dance.history["nDCG@10"].iloc[0], dance.history.T
    assert_measured(collection, dance, recipe)


def test_published_settings_are_the_releases():
    warm, first, second = recipes.ance(2, published=True)
    assert (warm.loss, warm.similarity, warm.learning_rate, warm.batch_size, warm.warmup) == (
        "pairwise", "dot", 2e-4, 32, 1000,
    )  # fmt: skip
    assert (first.steps, first.learning_rate, first.batch_size, first.warmup, first.share_of_queries) == (
        10_000, 1e-6, 64, 5000, 0.2,
    )  # fmt: skip
    assert first.loss_options == {"temperature": 1.0} and first.training_arguments["optim"] == "lamb"
    assert [round_.carry_optimizer for round_ in (first, second)] == [False, True]
    norm, dual = recipes.dance(published=True)
    assert (norm.loss, dual.loss) == ("pairwise", "pairwise")
    assert norm.loss_options == {"temperature": 0.01} and norm.similarity == dual.similarity == "cosine"
    assert dual.loss_options == {"temperature": 0.01, "dual": True, "dual_weight": 0.1} and dual.start == "best"
    assert (norm.steps, norm.learning_rate, norm.warmup) == (5000, 5e-6, 3000)
    [margins] = recipes.margin_mse(pt.Transformer.identity(), published=True)
    assert (margins.similarity, margins.loss_options, margins.learning_rate) == ("dot", {"temperature": 1.0}, 7e-6)
    assert (margins.batch_size, margins.warmup, margins.scheduler, margins.negatives_per_row) == (32, 0, "constant", 1)
    assert margins.training_arguments == {"weight_decay": 0.0, "max_grad_norm": 10_000.0}
    [same_tower] = recipes.samtone(published=True)
    assert (same_tower.similarity, same_tower.negatives) == ("cosine", None)
    assert same_tower.loss_options == {"sides": "query", "temperature": 0.01}


def test_the_second_stage_of_dance_is_a_training_of_its_own_from_the_best_round():
    """By default, in an ablation and as published; without the dual loss the stage is as long."""
    for options in ({}, {"published": True}, {"normalize": False}, {"dual": False}, {"loss": "pairwise"}):
        *first, dual, more = recipes.dance(2, **options)
        assert [round_.carry_optimizer for round_ in first] == [False] + [True] * (len(first) - 1)
        assert (dual.start, dual.carry_optimizer) == ("best", False) and more.carry_optimizer
        assert dual.is_dual == options.get("dual", True) and not any(round_.is_dual for round_ in first)
    assert recipes.dance()[-1].loss_options["dual_weight"] == 1.0
    assert recipes.dance(loss="pairwise")[-1].loss_options["dual_weight"] == 0.1


def test_the_second_stage_of_dance_trains_both_directions_gently(collection, tmp_path):
    """It takes a third of the rate in all its rounds; the dual loss changes the vectors that it gives."""
    vectors = {}
    for dual in (True, False):
        recipe = recipes.dance(2, ance_rounds=0, dual=dual)
        dance, _ = collection.fit(tmp_path / str(dual), recipe)
        rates = dance.history["learning_rate"].iloc[1:].to_numpy()
        assert rates == pytest.approx(defaults.learning_rate(collection.encoder) * np.array([1, 1, 1, 1 / 3, 1 / 3]))
        assert dance.history["nDCG@10"].iloc[-1] > dance.history["nDCG@10"].iloc[0]
        vectors[dual] = [
            dance.retriever(round=number).index.encoder.encode_queries(collection.dev["query"].tolist())
            for number in (dance.history["nDCG@10"].iloc[:4].idxmax(), 5)
        ]
    np.testing.assert_array_equal(vectors[True][0], vectors[False][0])
    # How far the dual loss moves the vectors, in what the stage moves them without it: nothing where it does nothing.
    before, alone, dual = vectors[False][0], vectors[False][1], vectors[True][1]
    # 1 where the dual loss does nothing; MedQuAD's slice gives the whole stage little to move
    assert (dual * alone).sum(axis=1).mean() < (0.9995 if "docstrings" in collection.folder.name else 0.9998)
    assert np.linalg.norm(dual - alone, axis=1).mean() > 0.3 * np.linalg.norm(alone - before, axis=1).mean()


def test_lamb_is_that_of_the_release(collection, tmp_path):
    """One step of LAMB moves every tensor by the learning rate times its norm, which is cut at 10."""
    arguments = {"optim": "lamb", "adam_epsilon": 1e-8}
    round_ = Round(batch_size=4096, learning_rate=0.01, warmup=0, scheduler="constant", training_arguments=arguments)
    collection.fit(tmp_path / "run", [round_])
    trained = DualEncoder.load(tmp_path / "run" / "rounds" / "01" / "encoder")
    before, after = (next(e.model.parameters()).detach().double() for e in (collection.encoder, trained))
    assert float((after - before).norm()) == pytest.approx(0.01 * min(float(before.norm()), 10), rel=1e-3)


def test_a_loss_of_ones_own(collection, tmp_path):
    class Own(losses.ContrastiveLoss):
        """The mean of squares on top."""

        def loss_of(self, batch):
            return super().loss_of(batch) + batch.queries.square().mean()

    dance, _ = collection.fit(tmp_path / "run", [Round(loss=Own, epochs=2, **FAST)])
    assert dance.history[["name", "loss"]].iloc[1].tolist() == ["Own", "Own"]
    assert dance.history["nDCG@10"].iloc[1] > collection.untrained["cosine"] + 0.005


def test_a_sum_of_losses_is_called_by_its_parts(collection, tmp_path):
    parts = [("contrastive", 1.0), ("samtone", 0.5, {"temperature": 0.1})]
    dance, _ = collection.fit(tmp_path / "run", [Round(loss=parts, **FAST)])
    assert dance.history["loss"].tolist()[1:] == ["1 contrastive + 0.5 samtone"]


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_losses_of_a_sum_and_of_ones_own_take_the_similarity_of_the_encoder(collection, tmp_path, similarity):
    """Each kind of loss has the value that the plain one has, whatever its own default is."""

    class Own(losses.ContrastiveLoss):
        """The same."""

    encoder, options = collection.encoder.with_similarity(similarity), {"temperature": 0.5}
    losses_of = {}
    for name, loss in {"one": "contrastive", "sum": [("contrastive", 1.0, options)], "own": Own}.items():
        given = {} if name == "sum" else options
        dance, _ = collection.fit(tmp_path / name, [Round(loss=loss, loss_options=given, **FAST)], encoder=encoder)
        losses_of[name] = dance.history["training_loss"].iloc[1]
    assert losses_of["sum"] == pytest.approx(losses_of["one"]) == pytest.approx(losses_of["own"])


def test_the_temperatures_of_a_combination_are_told_apart(teacher):
    with pytest.raises(ValueError, match="mnrl_temperature"):
        recipes.margin_mse_mnrl_dual(teacher, loss_options={"temperature": 0.1})


@pytest.mark.parametrize("source", ["first_stage", lambda dense: dense, [1], "sparse"])
def test_query_negatives_come_from_the_model_or_a_pipeline(source):
    with pytest.raises(TypeError, match="query_negatives"):
        Round(query_negatives=source)


@pytest.mark.parametrize("projection", [None, 32])
def test_two_towers_train_save_and_load(collection, tmp_path, projection):
    towers = DualEncoder.two_towers(collection.encoder, collection.encoder, shared_projection=projection)
    dance, _ = collection.fit(tmp_path / "run", recipes.samtone(2, **GENTLE), encoder=towers)
    assert dance.encoder.has_two_towers
    assert dance.history["nDCG@10"].iloc[-1] > collection.measure(dance.retriever(round=0)) + 0.005
    loaded = DanceRetriever.load(tmp_path / "run")
    pd.testing.assert_frame_equal(loaded(collection.dev), dance(collection.dev))


class Counting(pt.Transformer):
    """Passes rows on to a teacher and remembers every pair of texts it was asked for."""

    fingerprint = "counting"

    def __init__(self, teacher):
        self.teacher, self.asked = teacher, []

    def transform(self, inp):
        self.asked += list(zip(inp["query"], inp["text"], strict=True))
        return self.teacher(inp)

    def subtransformers(self):
        return {}


def test_a_teacher_scores_each_pair_once_over_two_rounds(collection, teacher, tmp_path):
    counting = Counting(teacher)
    one = recipes.margin_mse_dual(
        counting, similarity=None, temperature=0.1, negatives=current_model, negatives_per_query=4, negatives_per_row=4,
        depth=8, query_negatives_per_row=2, **FAST,
    )  # fmt: skip
    dance, _ = collection.fit(tmp_path / "run", one * 2)
    assert len(counting.asked) == len(set(counting.asked)) > 0
    run = RunFolder(dance.path)
    mined = [run.read_frame(number, "negatives")[0] for number in (1, 2)]
    pairs = [set(zip(frame["qid"], frame["docno"], strict=True)) for frame in mined]
    assert pairs[0] & pairs[1], "the rounds must share pairs for the test to mean anything"


def test_a_share_of_the_queries_takes_turns(collection, tmp_path):
    recipe = recipes.ance(4, warm_up=0, share_of_queries=0.25, **FAST)
    dance, _ = collection.fit(tmp_path / "run", recipe)
    mined = [set(RunFolder(dance.path).read_frame(n, "negatives")[0]["qid"]) for n in range(1, 5)]
    # but for a query whose candidates all answer it
    assert len(set.union(*mined)) >= len(collection.train) - 1
    assert all(len(a & b) <= 2 for i, a in enumerate(mined) for b in mined[:i])
    assert dance.history["steps"].max() <= len(collection.train) // 32 // 2


def test_old_indexes_are_dropped_and_made_again_on_demand(collection, tmp_path):
    dance, _ = collection.fit(tmp_path / "run", recipes.ance(3, warm_up=0, **FAST), keep="best")
    indexes = list((tmp_path / "run" / "rounds").glob("*/index"))
    assert len(indexes) <= 2
    assert len((dance.retriever(round=1) % 5)(collection.dev.head(3))) == 15
    with pytest.raises(ValueError, match="round=9"):
        dance.retriever(round=9)


def test_filters_and_what_they_removed_are_reported(collection, tmp_path):
    filters = [
        mining.RankRange(1, 40),
        mining.NearDuplicate(0.6),
        mining.PositiveMargin(collection.first_stage, relative=0.95),
    ]
    dance, _ = collection.fit(tmp_path / "run", [Round(filters=filters, **FAST)])
    _, report = RunFolder(dance.path).read_frame(1, "negatives")
    assert set(map(repr, filters)) <= set(report["removed"]) and report["removed"][repr(filters[2])] > 0


def test_training_arguments_reach_the_trainer(collection, tmp_path):
    arguments = {"gradient_accumulation_steps": 2, "weight_decay": 0.01}
    recipe = recipes.mnrl(training_arguments=arguments, scheduler="cosine", **FAST)
    dance, _ = collection.fit(tmp_path / "run", recipe)
    assert dance.history["steps"].iloc[1] == pytest.approx(len(collection.train) / 64, abs=2)
