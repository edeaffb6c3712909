"""Static towers from nothing or from a transformer's embeddings, and models with two towers."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pyterrier_dr
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Router, StaticEmbedding

from pt_dance import Corpus, DualEncoder
from pt_dance.encoder.wordpiece import SPECIAL, train_wordpiece
from small_models import small_bert

TEXTS = [
    "Iron deficiency causes anaemia; iron is in blood.",
    "cats chase mice, mice eat cheese",
    "Müller's naïve café — 100 °C",
    "中文 tokens",
    "",
    "a" * 300,
]
QUERIES = ["what causes anaemia?", "", "mice and cheese " * 30]


@pytest.fixture(scope="module")
def bert_path(tmp_path_factory):
    return small_bert(TEXTS, tmp_path_factory.mktemp("a"))


@pytest.fixture(scope="module")
def other_path(tmp_path_factory):
    return small_bert(TEXTS, tmp_path_factory.mktemp("b"), seed=1)


@pytest.fixture(scope="module")
def static():
    return DualEncoder.static(TEXTS * 2, dim=32, vocab_size=150)


def assert_same_as_sentence_transformers(encoder, model=None):
    model = model or encoder.model
    assert np.abs(encoder.encode_queries(QUERIES) - model.encode_query(QUERIES)).max() < 1e-6
    assert np.abs(encoder.encode_docs(TEXTS) - model.encode_document(TEXTS)).max() < 1e-6


# -- static towers -----------------------------------------------------------------------------------------------------


def test_static_tower_is_the_mean_of_its_tokens(static):
    assert static.is_static and not static.has_two_towers and static.dim == 32 and static.similarity == "cosine"
    tower = static.model[0]
    ids = tower.tokenizer.encode(TEXTS[0], add_special_tokens=False).ids
    mean = tower.embedding.weight.detach()[ids].mean(0)
    assert np.allclose(static.encode_docs(TEXTS[:1])[0], mean / mean.norm(), atol=1e-6)
    assert np.array_equal(static.encode_docs([""]), np.zeros((1, 32), np.float32))
    raw = DualEncoder.static(TEXTS * 2, dim=32, vocab_size=150, normalize=False)
    assert raw.similarity == "dot" and np.allclose(raw.encode_docs(TEXTS[:1])[0], mean, atol=1e-6)


def test_tokenizer_is_berts_kind(static):
    tokenizer = static.model[0].tokenizer
    assert tokenizer.encode("Iron, MÜLLER!", add_special_tokens=False).tokens[:2] == ["iron", ","]
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == [0, 1, 2, 3, 4]
    assert tokenizer.encode("\u0416", add_special_tokens=False).tokens == ["[UNK]"]
    assert tokenizer.get_vocab_size() <= 150


def test_vocabulary_size_is_a_limit_and_rare_characters_give_way():
    texts = ["alpha beta gamma", *(chr(c) for c in range(0x4E00, 0x4E00 + 500))] + ["alpha beta gamma"] * 5
    for size in (7, 20, 60, 5000):
        tokenizer, frequencies = train_wordpiece(texts, size)
        assert len(frequencies) == tokenizer.get_vocab_size() <= size
    tokenizer, _ = train_wordpiece(texts, 60)
    assert "[UNK]" not in tokenizer.encode("alpha gamma beta").tokens


def test_embeddings_begin_as_tf_idf():
    texts = ["common rare"] + ["common"] * 30 + ["common other"] * 5
    encoder = DualEncoder.static(texts * 2, dim=512, vocab_size=100)
    tokenizer, weights = encoder.model[0].tokenizer, encoder.model[0].embedding.weight.detach()
    for word, n in (("common", 72), ("rare", 2), ("other", 10)):
        assert tokenizer.token_to_id(word) is not None
        length = float(weights[tokenizer.token_to_id(word)].norm())
        assert abs(length - max(np.log(73 / (n + 1)), 0.1)) < 0.12 * length, word


def test_same_texts_and_seed_same_encoder_in_any_process():
    code = (
        "from pt_dance import DualEncoder\n"
        "texts = [f'{a}{b} {b}{c} {c}' for a in 'abcdefgh' for b in 'ijklmnop' for c in 'qrstuvwx']\n"
        "print(DualEncoder.static(texts, dim=4, vocab_size=90).fingerprint)\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    found = {run.stdout.strip().splitlines()[-1]}
    texts = [f"{a}{b} {b}{c} {c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"]
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    found.add(DualEncoder.static(texts, dim=4, vocab_size=90).fingerprint)
    assert torch.equal(torch.random.get_rng_state(), state), "the global random state was used"
    assert len(found) == 1
    assert DualEncoder.static(texts, dim=4, vocab_size=90, seed=7).fingerprint not in found


def test_static_streams_and_checks_its_texts():
    def stream():
        yield "iron and blood"
        yield "iron and blood"

    assert DualEncoder.static(stream(), dim=2, vocab_size=50).dim == 2
    with pytest.raises(ValueError, match="there are no texts"):
        DualEncoder.static(iter([]))
    with pytest.raises(ValueError, match="not one word in the 2 texts"):
        DualEncoder.static(["", " \n"])
    with pytest.raises(TypeError, match="not as one str"):
        DualEncoder.static("one text")
    for bad in (None, float("nan"), 3):
        with pytest.raises(TypeError, match="text number 1 is"):
            DualEncoder.static(["fine", bad])

    def broken():
        yield "fine"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        DualEncoder.static(broken())
    assert DualEncoder.static(["half \ud83d", "a \ud83d character"] * 2, dim=2).dim == 2
    for options in ({"dim": 0}, {"dim": 2.0}, {"vocab_size": 6}, {"vocab_size": "x"}, {"seed": -1}, {"seed": None}):
        with pytest.raises(ValueError, match=next(iter(options))):
            DualEncoder.static(TEXTS, **options)


def test_maximum_length_of_a_static_tower(static, tmp_path):
    short = DualEncoder(static.model, max_length=3)
    cut = static.model[0].tokenizer.encode(TEXTS[0], add_special_tokens=False).tokens[:3]
    words = " ".join(cut).replace(" ##", "")
    assert np.allclose(short.encode_docs(TEXTS[:1]), static.encode_docs([words]), atol=1e-6)
    assert static.model[0].tokenizer.truncation is None
    assert short.fingerprint != static.fingerprint
    short.save(tmp_path / "short")
    loaded = DualEncoder.load(tmp_path / "short")
    assert loaded.fingerprint == short.fingerprint and loaded.max_length == 3
    assert_same_as_sentence_transformers(loaded, SentenceTransformer(str(tmp_path / "short")))


def test_static_from_a_transformer(bert_path, tmp_path):
    source = SentenceTransformer(bert_path)
    encoder = DualEncoder.static_from(source)
    table = source[0].auto_model.get_input_embeddings().weight.detach()
    assert torch.equal(encoder.model[0].embedding.weight.detach(), table)
    assert encoder.model[0].embedding.weight.data_ptr() != table.data_ptr() and encoder.dim == 32
    ids = source[0].tokenizer(QUERIES[:1], add_special_tokens=False)["input_ids"][0]
    mean = table[ids].mean(0)
    assert np.allclose(encoder.encode_queries(QUERIES[:1])[0], mean / mean.norm(), atol=1e-6)
    # Texts are not cut at the transformer's length.
    assert np.abs(encoder.encode_docs(["iron " * 100 + "cats"]) - encoder.encode_docs(["iron " * 100])).max() > 1e-3
    reduced = DualEncoder.static_from(DualEncoder(bert_path), dim=8)
    weights = reduced.model[0].embedding.weight.detach().double()
    centred = table.double() - table.double().mean(0)
    singular = torch.linalg.svdvals(centred)
    assert torch.allclose(weights.norm(dim=0), singular[:8], rtol=1e-4)
    products = weights.T @ weights
    assert (products - products.diag().diag()).abs().max() < 1e-3 * products.diag().max(), "components correlate"
    assert reduced.fingerprint == DualEncoder.static_from(bert_path, dim=8).fingerprint
    assert DualEncoder.static_from(reduced, dim=4).dim == 4
    reduced.save(tmp_path / "m")
    assert_same_as_sentence_transformers(reduced, SentenceTransformer(str(tmp_path / "m")))
    with pytest.raises(ValueError, match="only 32 dimensions"):
        DualEncoder.static_from(bert_path, dim=33)
    with pytest.raises(ValueError, match=r"dim=.* must be a whole number of at least 1"):
        DualEncoder.static_from(bert_path, dim=0)
    with pytest.raises(ValueError, match="begins with Router"):
        DualEncoder.static_from(DualEncoder.two_towers(bert_path, bert_path))


# -- two towers --------------------------------------------------------------------------------------------------------


def test_two_towers_encode_by_task(bert_path, other_path):
    encoder = DualEncoder.two_towers(bert_path, other_path)
    assert encoder.has_two_towers and not encoder.is_static and encoder.dim == 32
    assert isinstance(encoder.model[0], Router) and isinstance(encoder.model[-1], Normalize) and len(encoder.model) == 2
    assert_same_as_sentence_transformers(encoder)
    assert np.allclose(encoder.encode_queries(QUERIES), DualEncoder(bert_path).encode_queries(QUERIES), atol=1e-6)
    assert np.allclose(encoder.encode_docs(TEXTS), DualEncoder(other_path).encode_docs(TEXTS), atol=1e-6)
    assert np.abs(encoder.encode_docs(QUERIES) - encoder.encode_queries(QUERIES)).max() > 1e-2
    for part, texts in ((encoder.encode_queries, QUERIES), (encoder.encode_docs, TEXTS)):
        torch_part = getattr(encoder, f"{part.__name__}_torch")
        assert np.abs(torch_part(texts).detach().numpy() - part(texts)).max() < 1.0  # the same tower, in train mode
    encoder.model.eval()
    assert np.abs(encoder.encode_docs_torch(TEXTS).detach().numpy() - encoder.encode_docs(TEXTS)).max() < 1e-6


@pytest.mark.parametrize("given", ["path", "sentence transformer", "encoder"])
def test_the_same_model_twice_gives_two_towers(bert_path, given):
    made = {"path": lambda: bert_path, "sentence transformer": lambda: SentenceTransformer(bert_path)}
    model = made.get(given, lambda: DualEncoder(bert_path))()
    encoder = DualEncoder.two_towers(model, model)
    towers = encoder.model[0].sub_modules
    assert not {p.data_ptr() for p in towers["query"].parameters()} & {
        p.data_ptr() for p in towers["document"].parameters()
    }
    before = encoder.encode_docs(TEXTS)
    fingerprint = encoder.fingerprint
    with torch.no_grad():
        for parameter in towers["query"].parameters():
            parameter.add_(0.1)
    assert np.array_equal(encoder.encode_docs(TEXTS), before) and encoder.fingerprint != fingerprint
    if given != "path":
        source = model.model if given == "encoder" else model
        assert np.allclose(source.encode_document(TEXTS), before, atol=1e-6), "the model that was given has changed"


@pytest.mark.parametrize("kind", ["bert", "static", "mixed"])
@pytest.mark.parametrize("projection", [None, 12])
def test_saved_loaded_indexed_and_trained_as_one(bert_path, other_path, static, tmp_path, kind, projection):
    towers = {"bert": (bert_path, other_path), "static": (static, static), "mixed": (static, bert_path)}[kind]
    encoder = DualEncoder.two_towers(*towers, shared_projection=projection)
    assert encoder.dim == (projection or 32) and encoder.is_static == (kind == "static")
    assert_same_as_sentence_transformers(encoder)
    encoder.save(tmp_path / "m")
    loaded = DualEncoder.load(tmp_path / "m")
    assert loaded.fingerprint == encoder.fingerprint and loaded == encoder and loaded.has_two_towers
    assert np.array_equal(loaded.encode_queries(QUERIES), encoder.encode_queries(QUERIES))
    assert_same_as_sentence_transformers(encoder, SentenceTransformer(str(tmp_path / "m")))
    index = pyterrier_dr.FlexIndex(str(tmp_path / "index"))
    docs = [{"docno": f"d{i}", "text": text} for i, text in enumerate(TEXTS)]
    (loaded >> index).index(docs)
    got = (loaded >> index.np_retriever(num_results=6))(pd.DataFrame({"qid": ["0"], "query": QUERIES[:1]}))
    expected = encoder.encode_docs(TEXTS) @ encoder.encode_queries(QUERIES[:1])[0]
    scores = got.set_index("docno")["score"]
    assert all(abs(scores[f"d{i}"] - expected[i]) < 1e-5 for i in range(6))
    loss = -(encoder.encode_queries_torch(QUERIES[:1]) @ encoder.encode_docs_torch(TEXTS).T).sum()
    loss.backward()
    towers = encoder.model[0].sub_modules
    assert all(any(p.grad is not None and p.grad.abs().sum() > 0 for p in t.parameters()) for t in towers.values())
    if projection:
        assert encoder.model[1].linear.weight.grad.abs().sum() > 0
    with torch.no_grad():
        torch.optim.SGD(encoder.model.parameters(), lr=0.1).step()
    assert encoder.fingerprint != loaded.fingerprint


def test_shared_projection_is_linear_and_shared(bert_path, other_path):
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    encoder = DualEncoder.two_towers(bert_path, other_path, shared_projection=12)
    assert torch.equal(torch.random.get_rng_state(), state)
    dense = encoder.model[1]
    assert isinstance(dense, Dense) and dense.linear.bias is None
    assert isinstance(dense.activation_function, torch.nn.Identity)
    weight = dense.linear.weight.detach()
    assert torch.allclose(weight @ weight.T, torch.eye(12), atol=1e-5)
    plain = DualEncoder.two_towers(bert_path, other_path, similarity="dot")
    for got, raw in (
        (encoder.encode_queries(QUERIES), plain.encode_queries(QUERIES)),
        (encoder.encode_docs(TEXTS), plain.encode_docs(TEXTS)),
    ):
        expected = raw @ weight.numpy().T
        assert np.allclose(got, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)
    assert DualEncoder.two_towers(bert_path, other_path, 12).fingerprint == encoder.fingerprint
    assert DualEncoder.two_towers(bert_path, other_path, 12, seed=1).fingerprint != encoder.fingerprint
    own = Dense(32, 5, activation_function=None)
    assert DualEncoder.two_towers(bert_path, other_path, own).model[1] is own


def test_maximum_lengths_and_prompts_of_each_tower(bert_path, static, tmp_path):
    queries = SentenceTransformer(bert_path, prompts={"query": "what causes ", "document": "never "})
    documents = SentenceTransformer(bert_path, prompts={"query": "never ", "document": "iron and "})
    short = DualEncoder(queries, max_length=6)
    encoder = DualEncoder.two_towers(short, documents)
    assert np.allclose(encoder.encode_queries(QUERIES), short.encode_queries(QUERIES), atol=1e-6)
    assert np.allclose(encoder.encode_docs(TEXTS), DualEncoder(documents).encode_docs(TEXTS), atol=1e-6)
    encoder.save(tmp_path / "m")
    loaded = DualEncoder.load(tmp_path / "m")
    assert loaded.fingerprint == encoder.fingerprint
    assert np.array_equal(loaded.encode_queries(QUERIES), encoder.encode_queries(QUERIES))
    assert_same_as_sentence_transformers(loaded, SentenceTransformer(str(tmp_path / "m")))
    both = DualEncoder.two_towers(bert_path, static, max_length=4)
    towers = both.model[0].sub_modules
    assert towers["query"][0].max_seq_length == 4 and towers["document"][0].tokenizer.truncation["max_length"] == 4
    assert both.fingerprint != DualEncoder.two_towers(bert_path, static).fingerprint


def test_towers_of_towers_and_similarities(bert_path, other_path, static):
    pair = DualEncoder.two_towers(bert_path, other_path)
    swapped = DualEncoder.two_towers(other_path, pair)
    assert np.allclose(swapped.encode_docs(TEXTS), pair.encode_docs(TEXTS), atol=1e-6)
    assert np.allclose(swapped.encode_queries(TEXTS), pair.encode_docs(TEXTS), atol=1e-6)
    dot = pair.with_similarity("dot")
    assert dot.has_two_towers and len(dot.model) == 1
    raw = dot.encode_docs(TEXTS)
    assert np.allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), pair.encode_docs(TEXTS), atol=1e-6)
    with pytest.raises(ValueError, match="say similarity"):
        DualEncoder.two_towers(static, static.with_similarity("dot"))
    with pytest.raises(ValueError, match="similarity='l2' is unknown; choose one of 'cosine', 'dot'"):
        DualEncoder.two_towers(static, static, similarity="l2")
    assert DualEncoder.two_towers(static, static.with_similarity("dot"), similarity="dot").similarity == "dot"
    # A Router made elsewhere, whose towers normalise for themselves.
    made = SentenceTransformer(
        modules=[Router.for_query_document(list(SentenceTransformer(bert_path)), list(SentenceTransformer(other_path)))]
    )
    opened = DualEncoder(made)
    assert len(made) == 1 and opened.similarity == "cosine" and isinstance(opened.model[-1], Normalize)
    assert_same_as_sentence_transformers(opened, made)
    assert np.allclose(opened.with_similarity("dot").encode_docs(TEXTS), raw, atol=1e-5)


def test_towers_that_do_not_fit(bert_path, static, tmp_path_factory):
    narrow = DualEncoder.static(TEXTS * 2, dim=5)
    with pytest.raises(ValueError, match="have 32 dimensions and the document tower's 5; give shared_projection"):
        DualEncoder.two_towers(bert_path, narrow)
    with pytest.raises(ValueError, match="takes 7 dimensions, the towers give 32"):
        DualEncoder.two_towers(bert_path, static, Dense(7, 3))
    for projection in (0, 1.5, "8", True):
        with pytest.raises(ValueError, match=r"shared_projection=.* must be a whole number"):
            DualEncoder.two_towers(bert_path, static, projection)
    assert isinstance(static.model[0], StaticEmbedding)


def test_unlike_towers_meet_in_a_shared_projection(bert_path, tmp_path):
    narrow = DualEncoder.static(TEXTS * 2, dim=5)
    made = DualEncoder.two_towers(bert_path, narrow, 4, similarity="dot")
    assert made.dim == 4 and made.encode_queries(TEXTS).shape == made.encode_docs(TEXTS).shape == (len(TEXTS), 4)
    shared, own = made.model[1], made.model[0].sub_modules["document"][-1]
    assert (shared.in_features, own.in_features, own.out_features) == (32, 5, 32)
    # Its own layer keeps the narrow tower's dot products: the shared one alone decides what is lost.
    raw = narrow.with_similarity("dot").encode_docs(TEXTS)
    wide = raw @ own.linear.weight.detach().numpy().T
    assert np.abs(wide @ wide.T - raw @ raw.T).max() < 1e-4
    assert np.abs(made.encode_docs(TEXTS) - wide @ shared.linear.weight.detach().numpy().T).max() < 1e-5
    loaded = DualEncoder.load(made.save(tmp_path / "m").path)
    assert loaded.fingerprint == made.fingerprint
    assert (
        np.abs(SentenceTransformer(str(tmp_path / "m")).encode_document(TEXTS) - made.encode_docs(TEXTS)).max() < 1e-6
    )
    given = DualEncoder.two_towers(bert_path, narrow, Dense(32, 3), similarity="dot")
    assert given.dim == 3


def test_static_reads_documents(tmp_path):
    expected = DualEncoder.static(TEXTS * 2, dim=8, vocab_size=150).fingerprint
    docs = [{"docno": f"d{i}", "body": text, "text": "x"} for i, text in enumerate(TEXTS * 2)]

    class Data:
        def get_corpus_iter(self):
            return iter(docs)

    for source in (docs, iter(docs), pd.DataFrame(docs), Data()):
        encoder = DualEncoder.static(source, dim=np.int64(8), vocab_size=np.int32(150), text_field="body")
        assert encoder.fingerprint == expected and encoder.text_field == "body"
    corpus = Corpus.build([{"docno": d["docno"], "text": d["body"]} for d in docs], tmp_path / "c", verbose=False)
    assert DualEncoder.static(corpus, dim=8, vocab_size=150).fingerprint == expected
    with pytest.raises(ValueError, match="document 'd0' has no field 'title'"):
        DualEncoder.static(docs, text_field="title")
    with pytest.raises(ValueError, match="no column 'title'"):
        DualEncoder.static(pd.DataFrame(docs), text_field="title")
    with pytest.raises(TypeError, match="not as one str"):
        DualEncoder.static("one text")


# -- ANCE's head -------------------------------------------------------------------------------------------------------


def layer_normed(vectors, dense, norm):
    out = vectors @ dense.linear.weight.detach().numpy().T + dense.linear.bias.detach().numpy()
    out = (out - out.mean(1, keepdims=True)) / np.sqrt(out.var(1, keepdims=True) + norm.norm.eps)
    return out * norm.norm.weight.detach().numpy() + norm.norm.bias.detach().numpy()


@pytest.mark.parametrize("init", ["orthogonal", "normal"])
def test_layernorm_head_of_one_tower(bert_path, init, tmp_path):
    encoder = DualEncoder(bert_path)
    state = torch.random.get_rng_state()
    made = encoder.with_head("layernorm", dim=np.int64(48), init=init)
    assert torch.equal(state, torch.random.get_rng_state())
    assert made.dim == 48 and made.similarity == "dot" and encoder.dim == 32 and encoder.similarity == "cosine"
    assert [type(module).__name__ for module in made.model] == ["Transformer", "Pooling", "Dense", "LayerNorm"]
    raw = encoder.with_similarity("dot").encode_docs(TEXTS)
    vectors = made.encode_docs(TEXTS)
    assert np.abs(vectors - layer_normed(raw, made.model[2], made.model[3])).max() < 1e-4
    weight = made.model[2].linear.weight.detach()
    if init == "orthogonal":
        assert (weight.T @ weight - torch.eye(32)).abs().max() < 1e-5
    else:
        assert abs(float(weight.std()) - 0.02) < 2e-3
    # LayerNorm leaves lengths of sqrt(dim), so that dot products rank as cosines do.
    assert np.abs(np.linalg.norm(vectors, axis=1) - 48**0.5).max() < 1e-2
    assert made.fingerprint == encoder.with_head(dim=48, init=init).fingerprint
    assert made.fingerprint != encoder.with_head(dim=48, init=init, seed=1).fingerprint
    made.save(tmp_path / "m")
    plain = SentenceTransformer(str(tmp_path / "m"))
    assert plain.similarity_fn_name == "dot"
    assert np.abs(plain.encode_document(TEXTS) - vectors).max() < 1e-6
    loaded = DualEncoder(tmp_path / "m")
    assert loaded.fingerprint == made.fingerprint and np.array_equal(loaded.encode_docs(TEXTS), vectors)
    with torch.no_grad():
        next(made.model.parameters()).add_(1)
    assert encoder.fingerprint == DualEncoder(bert_path).fingerprint, "the copy shares weights"


@pytest.mark.parametrize("shared", [True, False])
def test_layernorm_head_of_two_towers(bert_path, other_path, shared, tmp_path):
    pair = DualEncoder.two_towers(bert_path, other_path)
    made = pair.with_head("layernorm", dim=24, shared=shared)
    raw = pair.with_similarity("dot")
    towers = made.model[0].sub_modules
    heads = {task: (list(made.model)[1:] if shared else list(part)[-2:]) for task, part in towers.items()}
    assert len(made.model) == (3 if shared else 1) and made.dim == 24
    assert (heads["query"][0] is heads["document"][0]) is shared
    for task, encode in (("query", "encode_queries"), ("document", "encode_docs")):
        expected = layer_normed(getattr(raw, encode)(TEXTS), *heads[task])
        assert np.abs(getattr(made, encode)(TEXTS) - expected).max() < 1e-4
    loaded = DualEncoder.load(made.save(tmp_path / "m").path)
    assert loaded.fingerprint == made.fingerprint and loaded.has_two_towers
    plain = SentenceTransformer(str(tmp_path / "m"))
    assert np.abs(plain.encode_query(TEXTS) - made.encode_queries(TEXTS)).max() < 1e-6
    assert np.abs(plain.encode_document(TEXTS) - made.encode_docs(TEXTS)).max() < 1e-6


def test_bad_heads(bert_path):
    encoder = DualEncoder(bert_path)
    for options, match in (
        ({"head": "mlp"}, "head='mlp' is unknown"),
        ({"dim": 0}, "dim=0 must be a whole number"),
        ({"init": "ones"}, "init='ones' is unknown"),
        ({"seed": -1}, "seed=-1 must be"),
    ):
        with pytest.raises(ValueError, match=match):
            encoder.with_head(**options)
    with pytest.raises(ValueError, match="the towers share a projection"):
        DualEncoder.two_towers(bert_path, bert_path, 8).with_head(shared=False)
