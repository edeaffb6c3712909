"""DualEncoder: sentence-transformers' vectors in PyTerrier's pipelines, on disk, and told apart by weights."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyterrier as pt
import pyterrier_dr
import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from huggingface_hub.utils.tqdm import progress_bar_states
from ir_measures import RR
from lz4.frame import LZ4FrameFile
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from transformers.utils import logging as transformers_logging

from pt_dance import DualEncoder
from pt_dance.encoder.models import no_bars
from small_models import small_bert

TEXTS = [
    "what causes iron deficiency?",
    "",
    "Zürich 中文 naïve",
    "one two three " * 150,
    "tokens, punctuation; and (brackets)!",
]
DOCS = pd.DataFrame(
    {
        "docno": ["d1", "d2", "d3", "d4"],
        "text": ["iron and blood", "cats chase mice", "mice eat cheese", "iron and blood"],
        "title": list("abcd"),
    }
)
TOPICS = pd.DataFrame({"qid": ["1", "2", "3"], "query": ["iron", "mice", "iron"]})


@pytest.fixture(scope="module")
def minilm(minilm_path):
    return DualEncoder(minilm_path)


@pytest.fixture(scope="module")
def static():
    return DualEncoder.static([*TEXTS, *DOCS["text"], *TOPICS["query"]] * 2, dim=16, vocab_size=120)


@pytest.fixture(scope="session")
def bert_path(tmp_path_factory):
    return small_bert([*TEXTS, *DOCS["text"]], tmp_path_factory.mktemp("bert"))


@pytest.fixture
def bert(bert_path):
    return DualEncoder(bert_path)


@pytest.fixture
def small(static):
    return static.copy()


def rows(n_queries=2):
    return TOPICS[:n_queries].merge(DOCS, how="cross")


# -- the same vectors as sentence-transformers ---------------------------------------------------------------------


def assert_same_as_sentence_transformers(encoder, model):
    assert np.abs(encoder.encode_queries(TEXTS) - model.encode_query(TEXTS)).max() < 1e-6
    assert np.abs(encoder.encode_docs(TEXTS) - model.encode_document(TEXTS)).max() < 1e-6


def test_minilm_as_sentence_transformers(minilm, minilm_path):
    assert_same_as_sentence_transformers(minilm, SentenceTransformer(minilm_path))


@pytest.mark.parametrize(
    "prompts",
    [
        {"query": "what causes ", "document": "iron and "},
        {"query": "what causes ", "passage": "iron and "},
        {"query": "", "corpus": "iron and "},
    ],
)
def test_prompts_are_those_that_sentence_transformers_chooses(bert_path, prompts):
    model = SentenceTransformer(str(Path(bert_path)))
    model.prompts = prompts
    encoder = DualEncoder(model)
    assert_same_as_sentence_transformers(encoder, model)
    if prompts["query"]:
        assert np.abs(encoder.encode_queries(TEXTS) - encoder.encode_docs(TEXTS)).max() > 1e-2


def test_default_prompt_and_prompt_excluded_from_pooling(bert_path):
    model = SentenceTransformer(str(Path(bert_path)))
    model.prompts, model.default_prompt_name = {"sts": "same meaning as: "}, "sts"
    model.set_pooling_include_prompt(False)
    plain = SentenceTransformer(bert_path).encode_query(TEXTS)
    encoder = DualEncoder(model)
    assert_same_as_sentence_transformers(encoder, model)
    assert np.abs(encoder.encode_queries(TEXTS) - plain).max() > 1e-2


def test_static_as_sentence_transformers(static):
    assert_same_as_sentence_transformers(static, static.model)


def test_torch_encoding_gives_the_same_vectors_and_keeps_gradients(bert, small):
    for encoder in (bert, small):
        model = encoder.model
        was = model.training
        try:
            for training in (False, True):
                model.train(training)
                for part in (encoder.encode_queries_torch, encoder.encode_docs_torch):
                    vectors = part(TEXTS, batch_size=2)
                    assert vectors.requires_grad and vectors.shape == (len(TEXTS), encoder.dim)
                    assert model.training is training and all(m.training is training for m in model.modules())
                    gradients = torch.autograd.grad(vectors[:, 0].sum(), next(model.parameters()))
                    assert gradients[0].abs().sum() > 0
            model.eval()
            got = encoder.encode_docs_torch(TEXTS, batch_size=2).detach().numpy()
            assert np.abs(got - encoder.encode_docs(TEXTS)).max() < 1e-6
            assert encoder.encode_queries_torch([]).shape == (0, encoder.dim)
        finally:
            model.train(was)


def test_encoding_puts_every_module_back_in_its_mode(bert_path):
    encoder = DualEncoder(bert_path)
    expected = encoder.encode_docs(TEXTS)
    encoder.model.train()
    encoder.model[1].eval()
    before = [module.training for module in encoder.model.modules()]
    # In train mode dropout would make the vectors random.
    assert np.array_equal(encoder.encode_docs(TEXTS), expected)
    assert [module.training for module in encoder.model.modules()] == before
    with pytest.raises(TypeError):
        encoder.encode_docs([None])
    assert [module.training for module in encoder.model.modules()] == before


# -- similarity ------------------------------------------------------------------------------------------------------


def test_ends_with_normalize_iff_cosine(bert, bert_path):
    assert bert.similarity == "cosine" and isinstance(bert.model[-1], Normalize)
    dot = bert.with_similarity("dot")
    assert dot.similarity == "dot" and not isinstance(dot.model[-1], Normalize)
    raw = dot.encode_docs(TEXTS)
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).max() > 0.1
    assert np.allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), bert.encode_docs(TEXTS), atol=1e-6)
    back = dot.with_similarity("cosine")
    assert back.fingerprint == bert.fingerprint != dot.fingerprint
    with torch.no_grad():
        next(dot.model.parameters()).add_(1)
    assert back.fingerprint == bert.fingerprint, "the copy shares weights"
    # A model that forgets to normalise, but whose similarity is cosine.
    tower = SentenceTransformer(bert_path)
    bare = SentenceTransformer(modules=[tower[0], tower[1]], similarity_fn_name="cosine")
    assert np.allclose(DualEncoder(bare).encode_docs(TEXTS), bert.encode_docs(TEXTS), atol=1e-6)
    assert len(bare) == 2
    with pytest.raises(ValueError, match="'manhattan'"):
        DualEncoder(SentenceTransformer(modules=[tower[0], tower[1]], similarity_fn_name="manhattan"))
    with pytest.raises(ValueError, match="similarity='euclidean' is unknown"):
        bert.with_similarity("euclidean")


def test_truncated_dimensions_are_part_of_the_model(bert_path, tmp_path):
    model = SentenceTransformer(bert_path, truncate_dim=8)
    encoder = DualEncoder(model).save(tmp_path / "m")
    expected = model.encode_document(TEXTS, normalize_embeddings=False)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert encoder.dim == 8 and model.truncate_dim == 8 and len(model) == 3
    assert np.abs(encoder.encode_docs(TEXTS) - expected).max() < 1e-6
    assert np.abs(encoder.encode_docs_torch(TEXTS).detach().numpy() - expected).max() < 1e-6
    assert np.abs(SentenceTransformer(str(tmp_path / "m")).encode_document(TEXTS) - expected).max() < 1e-6


def test_a_model_in_memory_is_shared_but_not_changed(bert_path):
    model = SentenceTransformer(bert_path, prompts={"query": "q: "})
    model.eval()
    before = (len(model), model.max_seq_length, dict(model.prompts))
    expected = model.encode_query(TEXTS)
    encoder = DualEncoder(model, max_length=8)
    assert encoder.model.prompts == model.prompts
    assert (len(model), model.max_seq_length, dict(model.prompts)) == before
    assert encoder.model.max_seq_length == 8
    assert np.array_equal(model.encode_query(TEXTS), expected)
    assert {id(p) for p in model.parameters()} == {id(p) for p in encoder.model.parameters()}
    assert np.abs(encoder.encode_queries(TEXTS[3:4]) - expected[3:4]).max() > 1e-2, "max_length had no effect"


# -- identity --------------------------------------------------------------------------------------------------------


def test_fingerprint_changes_with_all_that_changes_vectors(bert_path, small):
    encoder = DualEncoder(bert_path)
    first = encoder.fingerprint
    assert len(first) == 32 and DualEncoder(bert_path).fingerprint == first == encoder.copy().fingerprint
    encoder.encode_docs(TEXTS)
    encoder.model.train()
    assert encoder.fingerprint == first, "using it is no change"
    found = {first}
    with torch.no_grad():
        weight = encoder.model[0].auto_model.encoder.layer[1].output.dense.bias
        weight[5] += 1e-6
    found.add(encoder.fingerprint)
    weight.data[5] -= 1e-6
    encoder.model.prompts["query"] = "q: "
    found.add(encoder.fingerprint)
    encoder.model.prompts["query"] = ""
    encoder.model.max_seq_length = 50
    found.add(encoder.fingerprint)
    encoder.model[1].pooling_mode = "cls"
    found.add(encoder.fingerprint)
    encoder.model[0].tokenizer.add_tokens(["blabla"])
    found.add(encoder.fingerprint)
    assert len(found) == 6
    static_first = small.fingerprint
    small.model[0].tokenizer.enable_truncation(3)
    assert small.fingerprint != static_first


def test_equality_is_by_weights_also_for_pyterrier_dr(small):
    other = small.copy()
    assert small == other and hash(small) == hash(other) and small is not other
    assert small.doc_encoder() == other.doc_encoder() and hash(small.doc_encoder()) == hash(other.doc_encoder())
    with torch.no_grad():
        next(other.model.parameters())[3] += 0.5
    assert small != other
    for make in ("query_encoder", "doc_encoder", "scorer"):
        assert getattr(small, make)() != getattr(other, make)()
    # pyterrier_dr's own classes around our encoders
    for kind in (pyterrier_dr.biencoder.BiQueryEncoder, pyterrier_dr.biencoder.BiDocEncoder):
        assert kind(small) == kind(small.copy()) and kind(small) != kind(other)
    assert small.query_encoder() != small.doc_encoder() != "something else"


def test_experiment_plans_agree_before_and_after_training(small, tmp_path):
    other = small.copy()
    with torch.no_grad():
        weights = next(other.model.parameters())
        weights.copy_(torch.randn(weights.shape, generator=torch.Generator().manual_seed(1)))
    index = pyterrier_dr.FlexIndex(str(tmp_path / "index"))
    (small >> index).index(DOCS.to_dict("records"))
    pipelines = [small >> index.np_retriever(num_results=k) for k in (4, 3)]
    pipelines += [other >> index.np_retriever(num_results=k) for k in (4, 3)]
    qrels = pd.DataFrame({"qid": ["1", "2", "3"], "docno": ["d1", "d3", "d4"], "label": [1, 1, 1]})
    tables = [pt.Experiment(pipelines, TOPICS, qrels, [RR], plan=plan)["RR"].tolist() for plan in ("linear", "tree")]
    assert tables[0] == tables[1]
    assert tables[0][0] != tables[0][2], "the two encoders rank alike: the test shows nothing"


def test_pickle_and_deepcopy(small):
    for copied in (pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
        assert copied == small and copied.path is copied.NO_PATH
        assert np.array_equal(copied.encode_docs(TEXTS), small.encode_docs(TEXTS))


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "static"])
def test_saved_folder_opens_everywhere(kind, request, tmp_path):
    encoder = request.getfixturevalue(kind).copy()
    encoder.model.prompts["query"] = "q: "
    path = tmp_path / "saved" / "encoder"
    assert encoder.save(path) is encoder and encoder.path == path
    expected = encoder.encode_queries(TEXTS), encoder.encode_docs(TEXTS)
    assert_same_as_sentence_transformers(encoder, SentenceTransformer(str(path)))
    for opened in (DualEncoder.load(path), DualEncoder(path), pt.Artifact.load(str(path))):
        assert isinstance(opened, DualEncoder) and opened.fingerprint == encoder.fingerprint
        assert np.array_equal(opened.encode_queries(TEXTS), expected[0])
        assert np.array_equal(opened.encode_docs(TEXTS), expected[1])
    meta = json.loads((path / "pt_meta.json").read_text())
    assert meta["type"] == "bi_encoder" and meta["package_hint"] == "pt_dance"
    assert meta["fingerprint"] == encoder.fingerprint
    assert not list(path.rglob("*.bin")) and list(path.rglob("*.safetensors"))
    assert [p.name for p in path.parent.iterdir()] == ["encoder"]
    with pytest.raises(FileExistsError, match="exists already"):
        encoder.save(path)
    (tmp_path / "foreign").mkdir()
    with pytest.raises(FileExistsError):
        encoder.save(tmp_path / "foreign")
    if kind == "bert":
        assert np.allclose(pyterrier_dr.SBertBiEncoder(str(path)).encode_docs(TEXTS), expected[1], atol=1e-6)


def test_settings_are_saved_and_may_be_overridden(bert_path, tmp_path):
    DualEncoder(bert_path, text_field="body", batch_size=7, max_length=16, dtype="auto").save(tmp_path / "m")
    loaded = DualEncoder.load(tmp_path / "m")
    assert (loaded.text_field, loaded._batch_size, loaded.dtype, loaded.max_length) == ("body", 7, "auto", 16)
    assert loaded.model.max_seq_length == 16
    assert DualEncoder.load(tmp_path / "m", text_field="text").text_field == "text"


def test_package_is_the_encoder_as_it_is_now(small, tmp_path):
    with pytest.raises(ValueError, match="say where"):
        small.build_package()
    small.save(tmp_path / "m")
    with torch.no_grad():
        next(small.model.parameters()).mul_(2)
    package = small.build_package(str(tmp_path / "p.tar.lz4"), verbose=False)
    with LZ4FrameFile(package) as packed, tarfile.open(fileobj=packed) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    again = pt.Artifact.load(str(tmp_path / "unpacked"))
    assert again.fingerprint == small.fingerprint
    assert DualEncoder.load(tmp_path / "m").fingerprint != small.fingerprint


def test_checkpoint_without_config_in_its_root(minilm_path, minilm, tmp_path):
    old = tmp_path / "old"
    (old / "0_Transformer").mkdir(parents=True)
    for file in Path(minilm_path).iterdir():
        if file.is_file() and file.name not in ("modules.json", "config_sentence_transformers.json", "README.md"):
            shutil.copy(file, old / "0_Transformer")
    shutil.copytree(Path(minilm_path) / "1_Pooling", old / "1_Pooling")
    modules = json.loads((Path(minilm_path) / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (old / "modules.json").write_text(json.dumps(modules))
    assert np.array_equal(DualEncoder(old).encode_docs(TEXTS), minilm.encode_docs(TEXTS))
    assert DualEncoder(old).fingerprint == minilm.fingerprint


def test_plain_transformers_folder_is_mean_pooled(minilm_path, minilm, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(Path(minilm_path) / name, tmp_path)
    assert np.allclose(DualEncoder(tmp_path, max_length=256).encode_docs(TEXTS), minilm.encode_docs(TEXTS), atol=1e-6)


class Bomb:
    def __reduce__(self):
        return (open, (str(Path(__file__).parent / "boom"), "w"))


def test_nothing_is_unpickled_or_run(static, bert_path, tmp_path):
    boom = Path(__file__).parent / "boom"
    static_folder = static.copy().save(tmp_path / "static").path
    weights = next(static_folder.rglob("model.safetensors"))
    weights.with_name("pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert DualEncoder(static_folder).fingerprint == static.fingerprint, "safetensors beside a pickle are fine"
    weights.unlink()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin holds pickled weights"):
        DualEncoder(static_folder)
    hidden = shutil.copytree(bert_path, tmp_path / "hidden")
    (hidden / "model.safetensors").unlink()
    (hidden / "pytorch_model-00001-of-00001.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="pickled weights"):
        DualEncoder(hidden)
    disguised = shutil.copytree(bert_path, tmp_path / "disguised")
    (disguised / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="cannot be read as a sentence-transformers model"):
        DualEncoder(disguised)
    foreign = shutil.copytree(bert_path, tmp_path / "foreign")
    modules = json.loads((foreign / "modules.json").read_text())
    modules[1]["type"] = "evil.Module"
    (foreign / "modules.json").write_text(json.dumps(modules))
    (foreign / "evil.py").write_text(f"open({str(boom)!r}, 'w')\nclass Module: pass\n")
    with pytest.raises(ValueError, match="third-party code"):
        DualEncoder(foreign)
    assert not boom.exists()


@pytest.mark.parametrize("damage", ["truncated weights", "empty weights", "modules.json", "config.json", "tokenizer"])
def test_damaged_folders_give_one_plain_sentence(bert_path, tmp_path, damage):
    folder = shutil.copytree(bert_path, tmp_path / "m")
    weights = folder / "model.safetensors"
    if damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "empty weights":
        weights.write_bytes(b"")
    elif damage == "tokenizer":
        (folder / "tokenizer.json").write_text('{"version"')
    else:
        (folder / damage).write_text('[{"idx": 0')
    with pytest.raises(ValueError, match="cannot be read as a sentence-transformers model") as error:
        DualEncoder(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_bad_arguments(tmp_path, static, small, bert_path):
    with pytest.raises(FileNotFoundError, match="there is no model folder"):
        DualEncoder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no such model could be fetched"):
        DualEncoder("nobody/nothing-of-this-name")
    with pytest.raises(FileNotFoundError, match="there is no encoder folder"):
        DualEncoder.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"neither modules\.json nor config\.json"):
        DualEncoder(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        DualEncoder(tmp_path / "file")
    for model in (None, 3, ["a"], ""):
        with pytest.raises(TypeError, match="a model is given as"):
            DualEncoder(model)
    for options, match in (
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"dtype": "float16"}, "dtype"),
        ({"text_field": None}, "text_field"),
        ({"max_length": 0}, "max_length"),
        ({"max_length": "long"}, "max_length"),
    ):
        with pytest.raises(ValueError, match=match):
            DualEncoder(static.model, **options)
    with pytest.raises(ValueError, match="reads at most 64 tokens"):
        DualEncoder(bert_path, max_length=65)
    small.save(tmp_path / "m")
    (tmp_path / "m" / "pt_meta.json").write_text("{nonsense")
    with pytest.raises(ValueError, match=r"pt_meta\.json is not valid JSON"):
        DualEncoder.load(tmp_path / "m")
    (tmp_path / "m" / "pt_meta.json").write_text('{"type": "dense_index"}')
    with pytest.raises(ValueError, match=r"is no encoder: its pt_meta\.json says type 'dense_index'"):
        DualEncoder.load(tmp_path / "m")


# -- in pipelines ------------------------------------------------------------------------------------------------------


class TestEncoder(pt.testing.transformer_test_class(lambda: _tiny())):
    pass


class TestQueryEncoder(pt.testing.transformer_test_class(lambda: _tiny().query_encoder())):
    pass


class TestDocEncoder(pt.testing.transformer_test_class(lambda: _tiny().doc_encoder())):
    pass


class TestScorer(pt.testing.transformer_test_class(lambda: _tiny().scorer())):
    pass


def _tiny():
    return DualEncoder.static(["a few words", "a few more words"], dim=4, vocab_size=60)


class Counting(DualEncoder):
    """An encoder that notes the texts it was asked to encode."""

    def _encode(self, texts, task, batch_size, verbose):
        texts = list(texts)
        self.__dict__.setdefault("asked", []).append((task, texts))
        return super()._encode(texts, task, batch_size, verbose)


def test_scorer_scores_rows_in_their_order_and_encodes_once(static):
    encoder = Counting(static.model)
    frame = rows(3).sample(frac=1, random_state=3)
    before = frame.copy()
    scored = encoder.scorer()(frame)
    pd.testing.assert_frame_equal(frame, before)
    assert scored.index.equals(frame.index)
    pd.testing.assert_frame_equal(scored[frame.columns.tolist()], frame)
    assert sorted(encoder.asked) == sorted(
        [("query", list(dict.fromkeys(frame["query"]))), ("document", list(dict.fromkeys(frame["text"])))]
    )
    expected = [
        float(static.encode_queries([q])[0] @ static.encode_docs([t])[0])
        for q, t in zip(frame["query"], frame["text"], strict=True)
    ]
    assert np.allclose(scored["score"], expected, atol=1e-6)
    for _, group in scored.groupby("qid"):
        assert group.sort_values("rank")["score"].is_monotonic_decreasing and set(group["rank"]) == set(range(4))
    assert encoder.scorer()(frame.drop(columns="docno"))["score"].tolist() == scored["score"].tolist()


def test_scorer_uses_vectors_that_are_there(static):
    frame = static.query_encoder()(static.doc_encoder()(rows(3)))
    expected = static.scorer()(rows(3))["score"]
    for dropped in ([], ["query"], ["text"], ["query", "text"]):
        got = static.scorer()(frame.drop(columns=dropped))
        assert np.array_equal(got["score"], expected) and "query_vec" in got.columns
    twisted = frame.assign(query_vec=[-v for v in frame["query_vec"]])
    assert np.allclose(static.scorer()(twisted)["score"], -expected)
    with pytest.raises(ValueError, match="dimensions"):
        static.scorer()(frame.assign(query_vec=[v[:3] for v in frame["query_vec"]]))
    with pytest.raises(ValueError, match="sim_fn"):
        static.scorer(sim_fn=pyterrier_dr.SimFn.cos)


def test_dispatch_by_columns(static):
    assert list(static(TOPICS).columns) == ["qid", "query", "query_vec"]
    docs = static(DOCS)
    assert list(docs.columns) == ["docno", "text", "title", "doc_vec"]
    assert docs["doc_vec"][0].dtype == np.float32 and docs["doc_vec"][0].shape == (16,)
    assert np.array_equal(docs["doc_vec"][0], docs["doc_vec"][3])
    assert {"score", "rank"} <= set(static(rows()).columns)
    body = DualEncoder(static.model, text_field="title")
    assert np.array_equal(np.stack(body(DOCS)["doc_vec"]), static.encode_docs(DOCS["title"]))
    with pytest.raises(KeyError):
        static(pd.DataFrame({"nothing": [1]}))


def test_no_rows(static):
    for made, frame, new in (
        (static.query_encoder(), TOPICS, ["query_vec"]),
        (static.doc_encoder(), DOCS, ["doc_vec"]),
        (static.scorer(), rows(), ["score", "rank"]),
        (static.scorer(), static.query_encoder()(rows()), ["score", "rank"]),
        (static.scorer(), static.doc_encoder()(rows()), ["score", "rank"]),
    ):
        got = made(frame[:0])
        assert len(got) == 0 and list(got.columns) == [*frame.columns, *new] == list(made(frame).columns)
    assert static.encode_queries([]).shape == static.encode_docs([]).shape == (0, 16)


@pytest.mark.parametrize("bad", [None, float("nan"), 7, b"bytes"])
def test_missing_texts_are_named(static, bad):
    topics = TOPICS.astype(object)
    topics.loc[1, "query"] = bad
    with pytest.raises(ValueError, match=r"query of qid '2' is .*not a string"):
        static.query_encoder()(topics)
    docs = DOCS.astype(object)
    docs.loc[2, "text"] = bad
    with pytest.raises(ValueError, match=r"text of docno 'd3' is .*not a string"):
        static.doc_encoder()(docs)
    with pytest.raises(ValueError, match=r"text of docno 'd3' is"):
        static.scorer()(TOPICS.merge(docs, how="cross"))
    with pytest.raises(ValueError, match=r"text of row number 2 is"):
        static.doc_encoder()(docs[["text"]])
    with pytest.raises(TypeError, match="query number 1"):
        static.encode_queries(["fine", bad])
    with pytest.raises(TypeError, match="document number 0"):
        static.encode_docs_torch([bad])


def test_other_bad_texts(static, bert):
    for encoder in (static, bert):
        with pytest.raises(TypeError, match="not as one str"):
            encoder.encode_docs("one text")
        with pytest.raises(ValueError, match="document number 1 is no valid Unicode"):
            encoder.encode_docs(["fine", "half \ud83d a character"])
        vectors = encoder.encode_docs(["", " ", "\x00\n\t", "\u202e\ufeff", "x" * 1_000_000, "\U0001f600" * 50])
        assert np.isfinite(vectors).all()
    with pytest.raises(ValueError, match="batch_size"):
        static.encode_docs(["a"], batch_size=0)


def test_with_pyterrier_drs_indexes_and_components(static, tmp_path):
    index = pyterrier_dr.FlexIndex(str(tmp_path / "index"))
    (static >> index).index(DOCS.to_dict("records"))
    expected = static.encode_queries(TOPICS["query"]) @ static.encode_docs(DOCS["text"]).T
    got = (static >> index.np_retriever(num_results=4))(TOPICS)
    for _, row in got.iterrows():
        q, d = int(row["qid"]) - 1, DOCS["docno"].tolist().index(row["docno"])
        assert abs(row["score"] - expected[q, d]) < 1e-6
    assert len(got) == 12
    retrieved = static >> index
    assert len(retrieved(TOPICS)) == 12
    prf = static >> index.np_retriever(num_results=3) >> index.vec_loader() >> pyterrier_dr.AveragePrf(k=2)
    assert len((prf >> index.np_retriever(num_results=2))(TOPICS)) == 6
    rescored = pt.text.get_text(_Texts(), "text") >> static.scorer()
    assert np.allclose(rescored(got.drop(columns="query_vec"))["score"], got["score"], atol=1e-6)
    assert static.query_encoder().fuse_rank_cutoff(3) is not None


class _Texts:
    def text_loader(self, fields="*", *, verbose=False):
        texts = dict(zip(DOCS["docno"], DOCS["text"], strict=True))
        return pt.apply.text(lambda row: texts[row["docno"]])


def test_repr_and_silence(static, capfd):
    assert repr(static) == "DualEncoder('static')" and len(repr(static.scorer())) < 40
    static.copy()(TOPICS)
    assert capfd.readouterr() == ("", "")
    loud = static.copy()
    loud.verbose = True
    loud.doc_encoder()(DOCS)
    assert "Encoding docs" in capfd.readouterr().err
    assert pt.inspect.transformer_attributes(DualEncoder(static.model, batch_size=5))[1].value == 5


def test_a_model_that_ends_in_dense(bert_path, tmp_path):
    torch.manual_seed(1)
    tower = Transformer(str(Path(bert_path)))
    model = SentenceTransformer(modules=[tower, Pooling(32, "cls"), Dense(32, 8)], similarity_fn_name="dot")
    encoder = DualEncoder(model)
    assert encoder.dim == 8 and encoder.similarity == "dot"
    assert_same_as_sentence_transformers(encoder, model)
    encoder.save(tmp_path / "m")
    assert DualEncoder.load(tmp_path / "m").fingerprint == encoder.fingerprint
    assert_same_as_sentence_transformers(encoder, SentenceTransformer(str(tmp_path / "m")))


@pytest.mark.parametrize("of_transformers", [True, False])
@pytest.mark.parametrize("of_the_hub", [True, False])
def test_progress_bars_are_shown_afterwards_as_they_were(monkeypatch, of_transformers, of_the_hub):
    monkeypatch.setattr(transformers_logging, "_tqdm_active", of_transformers)
    monkeypatch.setitem(progress_bar_states, "_global", of_the_hub)
    with no_bars():
        assert are_progress_bars_disabled() and not transformers_logging.is_progress_bar_enabled()
    assert transformers_logging.is_progress_bar_enabled() == of_transformers
    assert are_progress_bars_disabled() != of_the_hub
