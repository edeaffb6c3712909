"""Published models and plain checkpoints, opened as they were meant: the vectors of pyterrier_dr's encoders.

All are tiny random models of the same architectures, in folders of the published names.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyterrier_dr
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling, Transformer
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)

from pt_dance import DualEncoder
from pt_dance.encoder import opening, published
from small_models import small_bert

QUERIES = ["what causes iron deficiency", "", "mice [MASK] cheese", "iron blood cats " * 20]
DOCS = ["iron deficiency is common", "cats chase mice and mice eat cheese", "", "one two three " * 15]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A plain BERT checkpoint."""
    folder = tmp_path_factory.mktemp("bert")
    small_bert([*QUERIES, *DOCS, "query: passage: [Q] [D] Represent this sentence for searching"], folder)
    return folder / "bert"


@pytest.fixture
def named(bert, tmp_path):
    """A copy of the checkpoint in a folder of a published name; another model with the same tokenizer if given."""

    def make(name, model=None):
        folder = Path(shutil.copytree(bert, tmp_path / name))
        if model is not None:
            for file in ("config.json", "model.safetensors"):
                (folder / file).unlink()
            model.save_pretrained(folder)
            settings = json.loads((folder / "tokenizer_config.json").read_text())
            settings["model_input_names"] = ["input_ids", "attention_mask"]
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return make


def seeded(make, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make(config)


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def roberta(vocabulary):
    config = RobertaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=65,
        pad_token_id=0,
        initializer_range=0.2,
        type_vocab_size=1,
        **SIZES,
    )
    return seeded(RobertaModel, config)


def vocabulary(folder):
    return AutoTokenizer.from_pretrained(folder).vocab_size


def opened(folder, **options):
    """The encoder, without a warning, and the same again from the folder it is saved to, in plain libraries, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = DualEncoder(folder, **options)
    saved = encoder.save(Path(folder).parent / "saved" / Path(folder).name).path
    again = DualEncoder.load(saved)
    assert again.fingerprint == encoder.fingerprint
    plain = SentenceTransformer(str(saved))
    assert np.abs(plain.encode_query(QUERIES) - encoder.encode_queries(QUERIES)).max() < 1e-5
    assert np.abs(plain.encode_document(DOCS) - again.encode_docs(DOCS)).max() < 1e-5
    return encoder


def assert_same(encoder, other):
    queries, docs = other.encode_queries(QUERIES), other.encode_docs(DOCS)
    assert np.abs(encoder.encode_queries(QUERIES) - queries).max() < 1e-5
    assert np.abs(encoder.encode_docs(DOCS) - docs).max() < 1e-5
    assert np.abs(docs[0] - docs[1]).max() > 1e-2, "the model gives all texts one vector: the test shows nothing"


def test_tas_b(named, bert):
    config = DistilBertConfig(
        vocab_size=vocabulary(bert), dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=64,
        initializer_range=0.2,
    )  # fmt: skip
    folder = named("sebastian-hofstaetter/distilbert-dot-tas_b-b256-msmarco", seeded(DistilBertModel, config))
    encoder = opened(folder)
    assert (encoder.pooling, encoder.similarity) == ("cls", "dot")
    assert_same(encoder, pyterrier_dr.TasB(str(folder), device="cpu"))


@pytest.mark.parametrize(
    "name", ["Shitao/RetroMAE_MSMARCO_finetune", "RetroMAE_BEIR", "facebook/dragon-roberta-query-encoder"]
)
def test_first_token_and_dot_product(named, name):
    folder = named(name)
    assert_same(opened(folder), pyterrier_dr.RetroMAE(str(folder), device="cpu"))


@pytest.mark.parametrize("name", ["castorini/tct_colbert-msmarco", "castorini/tct_colbert-v2-hnp-msmarco"])
def test_tct_colbert(named, name, monkeypatch):
    folder = named(name)
    original = AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer,
        "from_pretrained",
        lambda path, *args, **kwargs: original(folder if path == "bert-base-uncased" else path, *args, **kwargs),
    )
    encoder = opened(folder)
    assert encoder.similarity == "dot" and encoder.model.prompts["query"] == "[Q] "
    assert_same(encoder, pyterrier_dr.TctColBert(str(folder), device="cpu"))
    # Gradients come through the same tokens.
    encoder.model.eval()
    for torch_way, way in (
        (encoder.encode_queries_torch, encoder.encode_queries),
        (encoder.encode_docs_torch, encoder.encode_docs),
    ):
        assert np.abs(torch_way(QUERIES[:2]).detach().numpy() - way(QUERIES[:2])).max() < 1e-5


def test_ance_with_its_head_among_the_weights(named, bert):
    folder = named("castorini/ance-msmarco-passage", roberta(vocabulary(bert)))
    weights = {f"roberta.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    random = torch.Generator().manual_seed(1)
    head = {
        "embeddingHead.weight": torch.randn(48, 32, generator=random),
        "embeddingHead.bias": torch.randn(48, generator=random),
        "norm.weight": torch.rand(48, generator=random) + 0.5,
        "norm.bias": torch.randn(48, generator=random),
    }
    save_file(weights | head, folder / "model.safetensors", {"format": "pt"})
    encoder = opened(folder)
    assert encoder.dim == 48 and encoder.similarity == "dot"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        tokens = tokenizer(DOCS, padding=True, truncation=True, return_tensors="pt")
        first = model(**tokens).last_hidden_state[:, 0]
        linear = first @ head["embeddingHead.weight"].T + head["embeddingHead.bias"]
        expected = torch.nn.functional.layer_norm(linear, (48,), head["norm.weight"], head["norm.bias"])
    assert np.abs(encoder.encode_docs(DOCS) - expected.numpy()).max() < 1e-5


def test_ance_of_sentence_transformers_compares_by_dot_product(named, bert, tmp_path):
    tower = Transformer(str(named("roberta", roberta(vocabulary(bert)))))
    modules = [tower, Pooling(32, "cls"), Dense(32, 32, activation_function=torch.nn.Identity()), LayerNorm(32)]
    folder = tmp_path / "sentence-transformers" / "msmarco-roberta-base-ance-firstp"
    SentenceTransformer(modules=modules).save(str(folder))
    (folder / "config_sentence_transformers.json").write_text("{}")  # as it was published
    encoder = opened(folder)
    assert encoder.similarity == "dot"
    assert_same(encoder, pyterrier_dr.Ance(str(folder), device="cpu"))


@pytest.mark.parametrize("name", ["intfloat/e5-small-v2", "intfloat/multilingual-e5-base", "e5-large"])
def test_e5(named, name):
    folder = named(name)
    encoder = opened(folder)
    assert encoder.similarity == "cosine"
    assert {task: encoder.model.prompts[task] for task in ("query", "document")} == {
        "query": "query: ",
        "document": "passage: ",
    }
    assert_same(encoder, pyterrier_dr.E5(str(folder), device="cpu"))


def test_gtr(named, bert, tmp_path):
    config = T5Config(vocab_size=vocabulary(bert), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    tower = Transformer(str(named("t5", seeded(T5EncoderModel, config))))
    dense = Dense(32, 24, bias=False, activation_function=torch.nn.Identity())
    folder = tmp_path / "sentence-transformers" / "gtr-t5-base"
    SentenceTransformer(modules=[tower, Pooling(32, "mean"), dense, Normalize()]).save(str(folder))
    encoder = opened(folder)
    assert (encoder.dim, encoder.similarity) == (24, "cosine")
    assert_same(encoder, pyterrier_dr.GTR(str(folder), device="cpu"))


@pytest.mark.parametrize(
    ("name", "pooling", "similarity", "prompt"),
    [
        ("facebook/contriever", "mean", "dot", ""),
        ("facebook/mcontriever-msmarco", "mean", "dot", ""),
        ("BAAI/bge-small-en-v1.5", "cls", "cosine", "Represent this sentence for searching relevant passages: "),
        ("BAAI/bge-base-zh", "cls", "cosine", "为这个句子生成表示以用于检索相关文章："),
        ("BAAI/bge-m3", "cls", "cosine", ""),
    ],
)
def test_contriever_and_bge(named, name, pooling, similarity, prompt):
    folder = named(name)
    encoder = opened(folder)
    assert (encoder.pooling, encoder.similarity) == (pooling, similarity)
    model, tokenizer = BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for texts, vectors in (
        ([prompt + q for q in QUERIES], encoder.encode_queries(QUERIES)),
        (DOCS, encoder.encode_docs(DOCS)),
    ):
        with torch.no_grad():
            tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            states, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
            expected = states[:, 0] if pooling == "cls" else (states * mask).sum(1) / mask.sum(1)
            if similarity == "cosine":
                expected = torch.nn.functional.normalize(expected)
        assert np.abs(vectors - expected.numpy()).max() < 1e-5


def test_dragon_has_two_towers(named, bert, monkeypatch, tmp_path):
    folders = {"facebook/dragon-plus-query-encoder": named("facebook/dragon-plus-query-encoder")}
    other = seeded(BertModel, AutoModel.from_pretrained(bert).config)
    folders["facebook/dragon-plus-context-encoder"] = named("facebook/dragon-plus-context-encoder")
    other.save_pretrained(folders["facebook/dragon-plus-context-encoder"])
    monkeypatch.setattr(opening, "_folder_of", lambda name: folders[name])  # there is no hub here
    encoder = DualEncoder("facebook/dragon-plus", device="cpu")
    assert encoder.has_two_towers and (encoder.pooling, encoder.similarity) == ("cls", "dot")
    assert encoder.path is encoder.NO_PATH  # the name of a repository is no folder
    query_encoder, doc_encoder = map(str, folders.values())
    dragon = pyterrier_dr.Dragon(query_encoder=query_encoder, doc_encoder=doc_encoder)  # it fails if told a device
    monkeypatch.setattr(dragon, "tokenizer", Cut(dragon.tokenizer))
    dragon._query_model().eval(), dragon._doc_model().eval()
    assert np.abs(encoder.encode_queries(QUERIES) - dragon.encode_queries(QUERIES)).max() < 1e-5
    assert np.abs(encoder.encode_docs(DOCS) - dragon.encode_docs(DOCS)).max() < 1e-5
    assert np.abs(encoder.encode_docs(QUERIES) - encoder.encode_queries(QUERIES)).max() > 1e-2


class Cut:
    """A tokenizer that keeps to what a tiny model can read."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, *args, max_length=None, **kwargs):
        return self.tokenizer(*args, max_length=64, **kwargs)


def test_what_a_folder_says_counts(named, tmp_path, bert):
    tower = Transformer(str(bert))
    folder = tmp_path / "intfloat" / "e5-small-v2"
    model = SentenceTransformer(modules=[tower, Pooling(32, "cls")], prompts={"query": "q: "}, similarity_fn_name="dot")
    model.save(str(folder))
    encoder = DualEncoder(folder)
    assert (encoder.pooling, encoder.similarity, encoder.model.prompts["query"]) == ("cls", "dot", "q: ")
    assert DualEncoder(folder, similarity="cosine").similarity == "cosine"
    trained = DualEncoder(bert, pooling="mean", similarity="cosine").save(tmp_path / "e5-base")
    assert DualEncoder(tmp_path / "e5-base").fingerprint == trained.fingerprint
    assert published.find("someone/else") is None and published.find("e5-small-v2-tuned") is None


def test_plain_checkpoints_say_what_is_assumed(bert):
    with pytest.warns(UserWarning, match="pooling='mean' and similarity='cosine' are assumed"):
        assumed = DualEncoder(bert)
    with pytest.warns(UserWarning, match="similarity='cosine' is assumed"):
        DualEncoder(bert, pooling="cls")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = DualEncoder(bert, pooling="cls", similarity="dot")
        said = DualEncoder(bert, pooling="mean", similarity="cosine")
    assert said.fingerprint == assumed.fingerprint
    assert_same(encoder, pyterrier_dr.HgfBiEncoder.from_pretrained(str(bert), device="cpu"))
    for options in ({"pooling": "max"}, {"similarity": "l2"}):
        with pytest.raises(ValueError, match="is unknown; choose one of"):
            DualEncoder(bert, **options)
    for model in (said.model, said.save(bert.parent / "said").path):
        with pytest.raises(ValueError, match="pooling='cls' is for plain transformers checkpoints"):
            DualEncoder(model, pooling="cls")


def test_pickled_weights_are_refused_with_the_line_that_converts_them(bert, tmp_path):
    folder = Path(shutil.copytree(bert, tmp_path / "pickled"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="pickled weights") as error:
        DualEncoder(folder, pooling="cls", similarity="dot")
    _, code = str(error.value).split("python -c ")
    assert "\n" not in str(error.value)
    subprocess.run([sys.executable, "-c", *shlex.split(code)], cwd=folder, check=True, timeout=100)
    encoder = DualEncoder(folder, pooling="cls", similarity="dot")
    assert encoder.fingerprint == DualEncoder(bert, pooling="cls", similarity="dot").fingerprint


# -- weights in half precision -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_opened_as_float32(bert, tmp_path, dtype):
    tower = Transformer(str(bert))
    model = SentenceTransformer(modules=[tower, Pooling(32, "mean"), Normalize()]).to(dtype)
    model.save(str(tmp_path / "half"))
    for given in (tmp_path / "half", model):
        encoder = DualEncoder(given)
        assert {p.dtype for p in encoder.model.parameters()} == {torch.float32}
        vectors = encoder.encode_docs(DOCS)
        assert vectors.dtype == np.float32 and np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6
        exact = model[0].auto_model.get_input_embeddings().weight.float()
        assert torch.equal(encoder.model[0].auto_model.get_input_embeddings().weight, exact)
    assert {p.dtype for p in model.parameters()} == {dtype}, "the model that was given has changed"
    half = DualEncoder(tmp_path / "half", dtype="bfloat16").encode_docs(DOCS)
    assert np.abs(np.linalg.norm(half, axis=1) - 1).max() < 1e-6
    # Small steps arrive: in half precision they would be rounded away.
    encoder.model.train()
    step = torch.optim.AdamW(encoder.model.parameters(), lr=1e-6)
    before = [p.detach().clone() for p in encoder.model.parameters()]
    encoder.encode_docs_torch(DOCS)[:, 0].sum().backward()
    step.step()
    moved = sum(
        int((p != old).sum()) for p, old in zip(encoder.model.parameters(), before, strict=True) if p.grad is not None
    )
    assert moved > 0.5 * sum(int((p.grad != 0).sum()) for p in encoder.model.parameters() if p.grad is not None)


# -- options -----------------------------------------------------------------------------------------------------------


def test_paths_and_numbers(bert, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    encoder = DualEncoder(bert, pooling="mean", similarity="cosine", batch_size=np.int64(4), max_length=np.int32(9))
    assert type(encoder._batch_size) is int and type(encoder.max_length) is int
    encoder.save("~/models/a")
    assert encoder.path == tmp_path / "models" / "a" and encoder.path.is_dir()
    monkeypatch.chdir(tmp_path / "models")
    for given in ("~/models/a", "a", "./a", Path("a")):
        for found in (DualEncoder(given), DualEncoder.load(given)):
            assert found.path == tmp_path / "models" / "a" and found.fingerprint == encoder.fingerprint
    relative = DualEncoder.load("a")
    monkeypatch.chdir(tmp_path)
    assert relative.path.is_dir()
    assert np.array_equal(encoder.encode_docs(DOCS, batch_size=np.int64(2)), relative.encode_docs(DOCS, batch_size=2))
