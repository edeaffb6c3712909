"""What the estimator and its recipes are given wrong: each is one plain sentence, said before any work is done."""

from __future__ import annotations

import traceback
from pathlib import Path

import numpy as np
import pandas as pd
import pyterrier as pt
import pytest
from ir_measures import R, nDCG

from pt_dance import Corpus, DanceRetriever, DualEncoder, Round, bm25, recipes
from small_collection import standard_library

FOLDERS = (str(Path(__file__).resolve().parents[1] / "pt_dance"), str(Path(pt.validate.__file__)))


class Setting:
    """A real collection with BM25 and an encoder, and an empty folder to work in."""

    def __init__(self, corpus, bm25, encoder):
        self.corpus, self.bm25, self.encoder = corpus, bm25, encoder
        small = standard_library()
        self.topics = small.topics[small.topics["qid"].isin(small.qrels["qid"])].reset_index(drop=True)
        self.qrels = small.qrels
        self.results = (bm25 % 10)(self.topics)

    def dance(self, **options):
        options = {"encoder": self.encoder, "corpus": self.corpus, "path": self.folder / "run", **options}
        return DanceRetriever(**{"recipe": recipes.mnrl(), "verbose": False, **options})

    def fit(self, topics=None, qrels=None, *validation):
        topics = self.topics if topics is None else topics
        return self.dance().fit(topics, self.qrels if qrels is None else qrels, *validation)

    def first(self, frame, **values):
        """The frame with other values in its first row."""
        frame = frame.astype(dict.fromkeys(values, object))
        for column, value in values.items():
            frame.at[0, column] = value
        return frame


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collection")
    corpus = Corpus.build(standard_library(), folder / "corpus", verbose=False)
    encoder = DualEncoder.static(standard_library().documents["text"].head(30), dim=8, vocab_size=500)
    return Setting(corpus, bm25(corpus, folder / "bm25", threads=1), encoder)


@pytest.fixture
def setting(collection, tmp_path):
    """The collection, with a folder that holds something of somebody else and a file."""
    collection.folder = tmp_path
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "precious.txt").write_text("keep me")
    (tmp_path / "file").write_text("keep me too")
    return collection


@pytest.fixture
def encoded(monkeypatch):
    """Names of the encoding methods that were called; they do what they always do."""
    calls = []
    for name in ("encode_queries", "encode_docs", "encode_queries_torch", "encode_docs_torch", "copy", "save"):
        original = getattr(DualEncoder, name)

        def counted(self, *args, _name=name, _original=original, **kwargs):
            calls.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(DualEncoder, name, counted)
    return calls


def tree(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def is_refused(setting, encoded, call, error, *words):
    """One sentence of ours (or of pt.validate) on one line, naming what is wrong; nothing was written or encoded."""
    before = tree(setting.folder)
    with pytest.raises(error) as caught:
        call(setting)
    message = str(caught.value.args[0])
    assert "\n" not in message and 15 < len(message) < 400, message
    if isinstance(caught.value, pt.validate.InputValidationError):
        message = str(caught.value)
    for word in words:
        assert word in message, message
    raised_in = traceback.extract_tb(caught.value.__traceback__)[-1].filename
    assert raised_in.startswith(FOLDERS), f"the error comes from inside {raised_in}"
    assert encoded == [] and tree(setting.folder) == before


# what fit is given: what is done, the error, and words of its sentence
FRAMES = {
    "topics without query": (lambda s: s.fit(s.topics[["qid"]]), KeyError, "query"),
    "topics without qid": (lambda s: s.fit(s.topics[["query"]]), KeyError, "qid"),
    "topics under another name": (lambda s: s.fit(s.topics.rename(columns={"query": "text"})), KeyError, "query"),
    "topics with a column twice": (
        lambda s: s.fit(pd.concat([s.topics, s.topics[["query"]]], axis=1)), ValueError, "'query'", "once",
    ),
    "qrels without label": (lambda s: s.fit(None, s.qrels[["qid", "docno"]]), KeyError, "label"),
    "qrels without docno": (lambda s: s.fit(None, s.qrels[["qid", "label"]]), KeyError, "docno"),
    "qrels without qid": (lambda s: s.fit(None, s.qrels[["docno", "label"]]), KeyError, "qid"),
    "topics are no frame": (lambda s: s.fit([{"qid": "1", "query": "x"}]), TypeError, "training topics", "list"),
    "qrels are no frame": (lambda s: s.fit(None, {"q": {"d": 1}}), TypeError, "training qrels", "dict"),
    "qrels missing": (lambda s: s.dance().fit(s.topics, None), TypeError, "training qrels", "NoneType"),
    "qrels of other topics": (
        lambda s: s.fit(None, s.qrels.assign(qid="no " + s.qrels["qid"])), ValueError, "training qrels", "'argparse'",
    ),
    "no qrels": (lambda s: s.fit(None, s.qrels.head(0)), ValueError, "training qrels"),
    "nothing relevant": (lambda s: s.fit(None, s.qrels.assign(label=0)), ValueError, "no relevant document"),
    "labels as text": (lambda s: s.fit(None, s.qrels.assign(label="1")), TypeError, "'label'", "'1'"),
    "label missing": (lambda s: s.fit(None, s.first(s.qrels, label=np.nan)), ValueError, "label nan", "'argparse'"),
    "label of one half": (lambda s: s.fit(None, s.qrels.assign(label=0.5)), ValueError, "label 0.5"),
    "labels that disagree": (
        lambda s: s.fit(None, pd.concat([s.qrels, s.qrels.assign(label=0)])), ValueError, "different", "'argparse'",
    ),
    "qrels of unknown documents": (lambda s: s.fit(None, s.first(s.qrels, docno="gone")), ValueError, "'gone'"),
    "qrels with numbers for docnos": (lambda s: s.fit(None, s.first(s.qrels, docno=7)), TypeError, "'docno'", "7"),
    "qrels with no docno": (lambda s: s.fit(None, s.first(s.qrels, docno=None)), TypeError, "'docno'", "None"),
    "qrels with numbers for qids": (lambda s: s.fit(None, s.first(s.qrels, qid=1)), TypeError, "'qid'", "qrels"),
    "text None": (lambda s: s.fit(s.first(s.topics, query=None)), ValueError, "'argparse'", "'query'", "None"),
    "text NaN": (lambda s: s.fit(s.first(s.topics, query=np.nan)), ValueError, "'argparse'", "'query'", "nan"),
    "text empty": (lambda s: s.fit(s.first(s.topics, query="")), ValueError, "'argparse'", "'query'"),
    "text of blanks": (lambda s: s.fit(s.first(s.topics, query=" \t\n ")), ValueError, "'argparse'", "'query'"),
    "text a number": (lambda s: s.fit(s.first(s.topics, query=3)), ValueError, "'argparse'", "'query'", "3"),
    "text in bytes": (lambda s: s.fit(s.first(s.topics, query=b"x")), ValueError, "'argparse'", "'query'"),
    "text a list": (lambda s: s.fit(s.topics.assign(query=[["x"]] * len(s.topics))), ValueError, "'query'"),
    "text with half a character": (lambda s: s.fit(s.first(s.topics, query="a\ud800")), ValueError, "Unicode"),
    "one qid with two texts": (
        lambda s: s.fit(pd.concat([s.topics, s.topics.head(1).assign(query="new")])), ValueError, "'argparse'", "two",
    ),
    "qid None": (lambda s: s.fit(s.first(s.topics, qid=None)), TypeError, "'qid'", "None"),
    "qids of two types": (lambda s: s.fit(s.first(s.topics, qid=5)), TypeError, "'qid'", "5"),
    "qids of numbers": (lambda s: s.fit(s.topics.assign(qid=range(len(s.topics)))), TypeError, "'qid'", "0"),
    "results without docno": (lambda s: s.fit(s.results.drop(columns="docno")), KeyError, "'docno'"),
    "results without query": (lambda s: s.fit(s.results.drop(columns="query")), KeyError, "query"),
    "results with no docno": (lambda s: s.fit(s.first(s.results, docno=None)), TypeError, "'docno'", "None"),
    "results of another corpus": (lambda s: s.fit(s.first(s.results, docno="gone")), ValueError, "'gone'", "results"),
    "results with qids of two types": (lambda s: s.fit(s.first(s.results, qid=5)), TypeError, "'qid'", "5"),
    "no topics": (lambda s: s.fit(s.topics.head(0)), ValueError, "training", "empty"),
    "no results": (lambda s: s.fit(s.results.head(0)), ValueError, "training", "cutoff"),
    "a frame of nothing": (lambda s: s.fit(pd.DataFrame()), ValueError, "training", "empty"),
    "negative cutoff before": (lambda s: (s.bm25 % -1 >> s.dance()).fit(s.topics, s.qrels), ValueError, "cutoff"),
    "cutoff of 0 before": (lambda s: (s.bm25 % 0 >> s.dance()).fit(s.topics, s.qrels), ValueError, "cutoff"),
    "validation without qrels": (lambda s: s.fit(None, None, s.topics), ValueError, "both topics and qrels"),
    "validation without topics": (lambda s: s.fit(None, None, None, s.qrels), ValueError, "both topics and qrels"),
    "validation without query": (lambda s: s.fit(None, None, s.topics[["qid"]], s.qrels), KeyError, "query"),
    "validation topic of blanks": (
        lambda s: s.fit(None, None, s.first(s.topics, query=" "), s.qrels), ValueError, "validation", "'argparse'",
    ),
    "validation qrels of other topics": (
        lambda s: s.fit(None, None, s.topics, s.qrels.assign(qid="other")), ValueError, "validation qrels", "'other'",
    ),
    "validation qrels of another corpus": (
        lambda s: s.fit(None, None, s.topics, s.qrels.assign(docno="gone")), ValueError, "validation qrels", "'gone'",
    ),
    "validation results without docno": (
        lambda s: s.fit(None, None, s.results.drop(columns="docno"), s.qrels), KeyError, "validation", "'docno'",
    ),
    "fit without a corpus": (lambda s: s.dance(corpus=None).fit(s.topics, s.qrels), ValueError, "corpus="),
    "search for None": (lambda s: s.dance()(s.first(s.topics, query=None)), ValueError, "'argparse'", "None"),
    "search without query": (lambda s: s.dance()(s.topics[["qid"]]), KeyError, "query"),
    "search without a corpus": (lambda s: s.dance(corpus=None)(s.topics), (TypeError, ValueError), "documents"),
    "dance % -1": (lambda s: s.dance() % -1, ValueError, "-1", "at least 1"),
    "dance % 0": (lambda s: s.dance() % 0, ValueError, "0", "at least 1"),
    "dance % 2.5": (lambda s: s.dance() % 2.5, ValueError, "2.5", "at least 1"),
    "dance % True": (lambda s: s.dance() % True, ValueError, "True", "at least 1"),
    "a round that is not there": (lambda s: s.dance().retriever(round=3), ValueError, "round=3"),
}  # fmt: skip


@pytest.mark.parametrize("case", FRAMES)
def test_frames(setting, encoded, case):
    is_refused(setting, encoded, *FRAMES[case])


DOCUMENT = {"docno": "a", "text": "x"}

# what the estimator is made with
OPTIONS = {
    "encoder a name": (dict(encoder="all-MiniLM-L6-v2"), TypeError, "encoder", "str"),
    "encoder None": (dict(encoder=None), TypeError, "encoder", "NoneType"),
    "path None": (dict(path=None), TypeError, "path=None"),
    "path a number": (dict(path=3), TypeError, "path=3"),
    "path of bytes": (dict(path=b"run"), TypeError, "path=b'run'"),
    "num_results -1": (dict(num_results=-1), ValueError, "num_results=-1"),
    "num_results 0": (dict(num_results=0), ValueError, "num_results=0"),
    "num_results 1.5": (dict(num_results=1.5), ValueError, "num_results=1.5"),
    "num_results True": (dict(num_results=True), ValueError, "num_results=True"),
    "num_results text": (dict(num_results="10"), ValueError, "num_results='10'"),
    "seed None": (dict(seed=None), ValueError, "seed=None"),
    "seed negative": (dict(seed=-1), ValueError, "seed=-1"),
    "seed too big": (dict(seed=2**31), ValueError, "seed=2147483648"),
    "seed text": (dict(seed="x"), ValueError, "seed='x'"),
    "patience 0": (dict(patience=0), ValueError, "patience=0"),
    "patience 1.5": (dict(patience=1.5), ValueError, "patience=1.5"),
    "patience text": (dict(patience="2"), ValueError, "patience='2'"),
    "keep unknown": (dict(keep="some"), ValueError, "keep='some'", "'best'"),
    "measure no name": (dict(measure="nDGC@10"), ValueError, "measure='nDGC@10'", "ir_measures"),
    "measure a name without cutoff": (dict(measure="RR10@"), ValueError, "measure='RR10@'"),
    "measure None": (dict(measure=None), TypeError, "measure=None"),
    "one of the measures a number": (dict(measure=[nDCG @ 10, 10]), TypeError, "measure=10"),
    "no measure": (dict(measure=[]), ValueError, "measure=[]"),
    "measure without its cutoff": (dict(measure=R), ValueError, "measure=R", "cutoff"),
    "recipe a name": (dict(recipe="ance"), TypeError, "recipe='ance'", "Round"),
    "recipe a function": (dict(recipe=recipes.ance), TypeError, "recipe=", "Round"),
    "recipe of other things": (dict(recipe=[Round(), {}]), TypeError, "entry 2 of the recipe", "Round"),
    "recipe empty": (dict(recipe=[]), ValueError, "no round"),
    "recipe of no rounds": (dict(recipe=recipes.ance(0, warm_up=0)), ValueError, "no round"),
    "corpus empty": (dict(corpus=[]), ValueError, "at least one"),
    "corpus a frame without rows": (dict(corpus=pd.DataFrame(columns=["docno", "text"])), ValueError, "at least one"),
    "corpus a number": (dict(corpus=5), TypeError, "documents", "int"),
    "corpus a name": (dict(corpus="medquad"), TypeError, "documents", "str"),
    "docno twice": (dict(corpus=[DOCUMENT, DOCUMENT]), ValueError, "'a'", "more than once"),
    "docno a number": (dict(corpus=[{**DOCUMENT, "docno": 1}]), TypeError, "docno 1"),
    "docno missing": (dict(corpus=[{"text": "x"}]), TypeError, "docno"),
    "text None": (dict(corpus=[DOCUMENT, {"docno": "b", "text": None}]), ValueError, "'b'", "'text'"),
    "text NaN": (dict(corpus=pd.DataFrame([DOCUMENT, {"docno": "b", "text": np.nan}])), ValueError, "'b'", "'text'"),
    "text missing": (dict(corpus=[{"docno": "b"}]), ValueError, "'b'", "'text'"),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_options(setting, encoded, case):
    options, *expected = OPTIONS[case]
    is_refused(setting, encoded, lambda s: s.dance(**options), *expected)


PATHS = {
    "a folder of somebody else": ("foreign", FileExistsError, "foreign", "no pt_dance run"),
    "a file": ("file", FileExistsError, "file"),
    "below a file": ("file/run", FileExistsError, "file/run"),
}


@pytest.mark.parametrize("case", PATHS)
def test_paths(setting, encoded, case):
    name, *expected = PATHS[case]
    is_refused(setting, encoded, lambda s: s.dance(path=s.folder / name), *expected)
    is_refused(setting, encoded, lambda s: s.dance(path=s.folder / name, corpus=[DOCUMENT]), *expected)


# what a round or a recipe is made with
RECIPES = {
    "loss unknown": (lambda: Round(loss="infonce"), ValueError, "'infonce'", "contrastive"),
    "loss None": (lambda: Round(loss=None), TypeError, "None", "contrastive"),
    "loss a list of nothing": (lambda: Round(loss=[]), ValueError, "loss=[]"),
    "weight of a loss text": (lambda: Round(loss=[("contrastive", "x")]), ValueError, "weight", "'x'"),
    "loss option unknown": (lambda: Round(loss_options={"temprature": 1}), ValueError, "'temprature'", "temperature"),
    "loss option of another loss": (lambda: Round(loss_options={"sides": "both"}), ValueError, "'sides'"),
    "loss options a list": (lambda: Round(loss_options=["dual"]), TypeError, "loss_options=['dual']"),
    "temperature 0": (lambda: Round(loss_options={"temperature": 0}), ValueError, "temperature", "0"),
    "temperature NaN": (lambda: Round(loss_options={"temperature": float("nan")}), ValueError, "temperature", "nan"),
    "temperature text": (lambda: recipes.dance(temperature="x"), ValueError, "temperature", "'x'"),
    "dual weight negative": (lambda: recipes.dance(dual_weight=-1), ValueError, "weight", "-1"),
    "dual weight without dual": (lambda: Round(loss_options={"dual_weight": 1}), ValueError, "dual_weight"),
    "sides unknown": (lambda: recipes.samtone(sides="left"), ValueError, "sides", "'left'"),
    "similarity of a loss unknown": (lambda: Round(loss_options={"similarity": "l2"}), ValueError, "'l2'"),
    "similarity unknown": (lambda: Round(similarity="l2"), ValueError, "similarity='l2'"),
    "recipe option unknown": (lambda: recipes.ance(lerning_rate=1), ValueError, "'lerning_rate'", "learning_rate"),
    "round option unknown": (lambda: recipes.margin_mse_dual(pt.Transformer.identity(), foo=1), ValueError, "'foo'"),
    "rounds negative": (lambda: recipes.ance(-1), ValueError, "rounds=-1"),
    "rounds text": (lambda: recipes.dance("2"), ValueError, "rounds='2'"),
    "warm-up negative": (lambda: recipes.ance(warm_up=-1), ValueError, "warm_up=-1"),
    "epochs 0": (lambda: recipes.mnrl(0), ValueError, "epochs=0"),
    "batch size 0": (lambda: Round(batch_size=0), ValueError, "batch_size=0"),
    "batch size True": (lambda: Round(batch_size=True), ValueError, "batch_size=True"),
    "checkpoint steps 0": (lambda: Round(checkpoint_steps=0), ValueError, "checkpoint_steps=0"),
    "learning rate 0": (lambda: Round(learning_rate=0), ValueError, "learning_rate=0"),
    "learning rate NaN": (lambda: Round(learning_rate=float("nan")), ValueError, "learning_rate=nan"),
    "learning rate text": (lambda: Round(learning_rate="1e-3"), ValueError, "learning_rate='1e-3'"),
    "warmup 1.5": (lambda: Round(warmup=1.5), ValueError, "warmup=1.5"),
    "warmup text": (lambda: Round(warmup="x"), ValueError, "warmup='x'"),
    "scheduler unknown": (lambda: Round(scheduler="steps"), ValueError, "scheduler='steps'", "linear"),
    "scheduler that needs a loss": (lambda: Round(scheduler="reduce_lr_on_plateau"), ValueError, "on_plateau"),
    "training argument unknown": (lambda: Round(training_arguments={"bfloat": 1}), ValueError, "'bfloat'"),
    "training argument of the estimator": (
        lambda: Round(training_arguments={"output_dir": "x"}), ValueError, "'output_dir'", "path",
    ),
    "training arguments a list": (lambda: Round(training_arguments=["bf16"]), TypeError, "training_arguments"),
    "share of queries 0": (lambda: Round(share_of_queries=0), ValueError, "share_of_queries=0"),
    "share of queries text": (lambda: Round(share_of_queries="x"), ValueError, "share_of_queries='x'"),
    "negatives a name": (lambda: Round(negatives="bm25"), TypeError, "negatives='bm25'"),
    "negatives a list of nothing": (lambda: Round(negatives=[]), ValueError, "negative sources"),
    "query negatives a name": (lambda: Round(query_negatives="bm25"), TypeError, "query_negatives='bm25'"),
    "weight of a source negative": (lambda: Round(negatives=[(recipes.current_model, -1)]), ValueError, "-1"),
    "more in a row than there are": (lambda: Round(negatives_per_row=30), ValueError, "negatives_per_row=30"),
    "depth 0": (lambda: Round(depth=0), ValueError, "depth=0"),
    "no negatives": (lambda: Round(negatives_per_query=0), ValueError, "negatives_per_query=0"),
    "sampling unknown": (lambda: Round(sampling="best"), ValueError, "sampling='best'"),
    "rank range turned round": (lambda: Round(rank_range=(5, 1)), ValueError, "rank_range=(5, 1)"),
    "rank range a number": (lambda: Round(rank_range=3), ValueError, "rank_range=3"),
    "filter no function": (lambda: Round(filters=[3]), TypeError, "filters=[3]"),
    "teacher no pipeline": (lambda: recipes.margin_mse("cross-encoder"), TypeError, "teacher='cross-encoder'"),
    "teacher missing": (lambda: Round(loss="margin_mse"), ValueError, "teacher"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_recipes(setting, encoded, case):
    call, *expected = RECIPES[case]
    is_refused(setting, encoded, lambda s: s.dance(recipe=call()), *expected)


def test_a_source_of_another_corpus_is_named(setting, tmp_path):
    elsewhere = setting.results.assign(docno="elsewhere")
    dance = setting.dance(recipe=Round(negatives=elsewhere))
    with pytest.raises(ValueError, match=r"negatives of round 1 name 1 .*'elsewhere'"):
        dance.fit(setting.topics, setting.qrels)


def test_what_may_look_bad_is_taken(setting):
    """Truth values and whole floats as labels, NumPy's numbers as options, a topic twice, validation on a part."""
    dance = setting.dance(num_results=np.int64(20), seed=np.int32(3), measure=(nDCG @ 10,))
    topics = pd.concat([setting.topics, setting.topics.head(3)])
    part = pd.concat([setting.qrels, setting.qrels.head(1).assign(docno="not in this part")])
    dance.fit(topics, setting.qrels.assign(label=1.0), setting.topics, part.assign(label=True))
    assert (dance % np.int64(2))(setting.topics.head(2)).groupby("qid").size().tolist() == [2, 2]
