"""Attributes of public objects are live or cannot be set: what may be given may be set, and nothing else."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import CrossEncoder
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from pt_dance import (
    AnnRetriever,
    Corpus,
    CrossEncoderScorer,
    DanceRetriever,
    DenseIndex,
    DenseRetriever,
    DualEncoder,
    Round,
)  # fmt: skip
from small_collection import standard_library


class NoEngine:
    """Has what an engine has; nothing is asked of it."""

    map = broadcast = None


ENGINE = NoEngine()


# Attributes that may be set, each with a value other than the one it has. All others are refused.
LIVE = {
    "encoder": dict(text_field="body", verbose=True),
    "scorer": dict(batch_size=1, text_field="body", dtype="bfloat16", verbose=True),
    "corpus": {},
    "passages": {},
    "loader": dict(verbose=True),
    "index": dict(text_field="title", vec_dtype="float16", shard_size=7, device="cpu", verbose=False),
    "retriever": dict(num_results=3, batch_size=5, drop_query_vec=False, rescore_cutoff=2, verbose=True, engine=ENGINE),
    "ann": dict(num_results=3, batch_size=5, drop_query_vec=True, rescore_cutoff=2, candidates=2000, threads=2),
    "dance": dict(
        num_results=3,
        measure="RR@5",
        seed=7,
        patience=1,
        keep="best",
        verbose=True,
        recipe=[Round(epochs=2)],
    ),
}
# What they are made of or called; setting these gives the object another model or name, as it says.
REPLACED = {"encoder": ("model", "name", "origin", "path"), "scorer": ("model",), "ann": ("verbose",)}
REPLACED |= {
    "index": ("given_encoder", "sim_fn"),
    "retriever": ("index", "encoder"),
    "dance": ("corpus", "engine", "refresh", "replay_of"),
}
REPLACED["ann"] += (*REPLACED["retriever"], "engine")


def cross_encoder(folder) -> CrossEncoder:
    """A cross-encoder with random weights."""
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "ce")
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=13)
    BertForSequenceClassification(BertConfig(num_labels=1, **sizes)).save_pretrained(folder / "ce")
    return CrossEncoder(str(folder / "ce"), device="cpu")


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Functions that make each object, with options."""
    folder = tmp_path_factory.mktemp("objects")
    collection = standard_library()
    corpus = Corpus.build(collection, folder / "corpus", verbose=False)
    passages = corpus.to_passages(folder / "passages", length=30, stride=15, verbose=False)
    encoder = DualEncoder.static(corpus, dim=8, vocab_size=300)
    index = DenseIndex(folder / "index", encoder, verbose=False).index(corpus)
    model = cross_encoder(folder)
    return {
        "encoder": lambda **options: DualEncoder(encoder.model, **options),
        "scorer": lambda **options: CrossEncoderScorer(model, **options),
        "corpus": lambda: Corpus(corpus.path),
        "passages": lambda: type(passages)(passages.path),
        "loader": lambda **options: corpus.text_loader(**options),
        "index": lambda **options: DenseIndex(index.index_path, encoder, **options),
        "retriever": lambda **options: DenseRetriever(index, **options),
        "ann": lambda **options: AnnRetriever(index, **options),
        "dance": lambda **options: DanceRetriever(encoder, corpus, folder / "run", **{"verbose": False, **options}),
    }


def public(thing) -> list[str]:
    """Its attributes and properties that are no methods, constants or somebody else's."""
    ours = [kind for kind in type(thing).__mro__ if kind.__module__.startswith("pt_dance")]
    properties = {name for kind in ours for name, value in vars(kind).items() if isinstance(value, property)}
    theirs = {"transform_iter"}  # PyTerrier puts this method of an indexer into the object
    return sorted(name for name in {*vars(thing), *properties} - theirs if not name.startswith("_"))


@pytest.mark.parametrize("kind", LIVE)
def test_every_public_attribute_is_live_or_refuses(make, kind):
    thing = make[kind]()
    names = public(thing)
    assert set(LIVE[kind]) <= set(names)
    for name in names:
        before = getattr(thing, name)
        if name in REPLACED.get(kind, ()):
            setattr(thing, name, before)
        elif name in LIVE[kind]:
            value = LIVE[kind][name]
            setattr(thing, name, value)
            assert getattr(thing, name) == getattr(make[kind](**{name: value}), name) != before
        else:
            with pytest.raises(AttributeError):
                setattr(thing, name, before)
            assert getattr(thing, name) is before or np.all(getattr(thing, name) == before)


ANY = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2000), st.floats(), st.text(max_size=4), st.just([]),
    st.sampled_from([np.int64(4), "float32", "float16", "all", "text", "RR@3", Round(), [Round()], b"x"]),
)  # fmt: skip
SHOWN = ("verbose", "engine")  # change where and how results come, not which
UNCHECKED = {"verbose", "drop_query_vec", "device"}
CHECKED = [(kind, name) for kind, names in LIVE.items() for name in names if name not in UNCHECKED]


@given(st.sampled_from(CHECKED), ANY)
def test_what_may_be_given_may_be_set_and_what_may_not_is_refused_alike(make, attribute, value):
    kind, name = attribute
    thing = make[kind]()
    before = getattr(thing, name)
    if (kind, name) == ("dance", "recipe") and value is None:
        return  # given, it means the default; set, it means none, as for a loaded retriever whose loss is not stored
    try:
        expected, error = getattr(make[kind](**{name: value}), name), None
    except (TypeError, ValueError) as refused:
        expected, error = before, refused
    if error is None:
        setattr(thing, name, value)
    else:
        with pytest.raises(type(error)) as again:
            setattr(thing, name, value)
        assert str(again.value) == str(error)
    assert getattr(thing, name) == expected and type(getattr(thing, name)) is type(expected)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (kind, {name: LIVE[kind][name]})
        for kind in ("retriever", "ann")
        for name in LIVE[kind]
        if name not in ("verbose", "engine")
    ],
    ids=str,
)
def test_what_is_set_on_a_retriever_counts_from_the_next_call(make, kind, options):
    topics = standard_library().topics.head(4)
    results = make["retriever"](num_results=12)(topics)
    thing, expected = make[kind](num_results=12), make[kind](**{"num_results": 12, **options})
    thing(topics)
    for name, value in options.items():
        setattr(thing, name, value)
    for frame in (topics, results):
        pd.testing.assert_frame_equal(thing(frame), expected(frame))


@pytest.mark.parametrize("name", ["text_field", "vec_dtype", "shard_size"])
def test_what_is_set_on_an_index_counts_when_it_is_made(make, tmp_path, name):
    documents = standard_library().documents
    encoder, value = make["encoder"](), LIVE["index"][name]
    set_after = DenseIndex(tmp_path / "a", encoder, verbose=False)
    setattr(set_after, name, value)
    given_before = DenseIndex(tmp_path / "b", encoder, verbose=False, **{name: value})
    plain = DenseIndex(tmp_path / "c", encoder, verbose=False).index(documents)
    vectors = [np.asarray(index.index(documents).open().vectors) for index in (set_after, given_before)]
    np.testing.assert_array_equal(*vectors)
    same = vectors[0].dtype == np.float32 and np.array_equal(vectors[0], np.asarray(plain.open().vectors))
    assert same == (name == "shard_size")


def test_what_is_set_on_an_encoder_or_scorer_counts_from_the_next_call(make):
    documents = pd.DataFrame({"qid": ["1"], "query": ["a b"], "docno": ["d"], "body": ["c d"]})
    for kind, use in (
        ("encoder", lambda e: e.doc_encoder()(documents[["docno", "body"]])),
        ("scorer", lambda s: s(documents)),
    ):
        thing = make[kind]()
        with pytest.raises(KeyError):
            use(thing)
        thing.text_field = "body"
        assert len(use(thing)) == 1


@pytest.mark.parametrize("kind", ["encoder", "corpus", "passages", "index", "retriever", "dance"])
def test_copies_and_pickles_have_the_same_attributes_and_refuse_the_same(make, kind):
    thing = make[kind]()
    copies = [copy.copy(thing)] + ([] if kind == "dance" else [pickle.loads(pickle.dumps(thing))])
    fixed = [name for name in ("path", "index_path", "max_length") if name in public(thing)]
    for other in copies:
        assert public(other) == public(thing)
        for name in set(fixed) - set(REPLACED.get(kind, ())):
            assert getattr(other, name) == getattr(thing, name)
            with pytest.raises(AttributeError, match="make a new"):
                setattr(other, name, getattr(thing, name))


def test_what_makes_no_sense_is_refused_by_every_checked_attribute(make):
    for kind, name in CHECKED:
        thing = make[kind]()
        before = getattr(thing, name)
        with pytest.raises((TypeError, ValueError)):
            setattr(thing, name, b"x")
        assert getattr(thing, name) == before
