"""Fast encoding: the same vectors whatever the batches, threads and precision; probes that are measured once."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pandas as pd
import pyterrier_dr
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer

from pt_dance import DualEncoder
from pt_dance.encoder import batches as _encoding
from pt_dance.encoder import packed as _packed
from pt_dance.encoder import precision as _probe
from pt_dance.encoder.reading import AnyReader, StaticReader, TransformerReader, reader_for
from pt_dance.encoder.stages import HANDED_OVER
from small_models import small_bert

WORDS = [
    "iron",
    "blood",
    "cats",
    "chase",
    "mice",
    "eat",
    "cheese",
    "what",
    "causes",
    "one",
    "two",
    "three",
    "and",
    "the",
    "of",
]


def some_texts(n, seed=0, longest=90):
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, size)) for size in random.integers(0, longest, n)]


TEXTS = some_texts(300)


@pytest.fixture(scope="module")
def bert_path(tmp_path_factory):
    return small_bert([" ".join(WORDS)], tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def bert(bert_path):
    return DualEncoder(bert_path)


@pytest.fixture(scope="module")
def static():
    return DualEncoder.static(TEXTS, dim=8, vocab_size=200)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def encode(encoder, texts, budget=1024, **options):
    return _encoding.encode(encoder.model, texts, "document", dim=encoder.dim, budget=budget, **options)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("prompt", ["", "what causes "])
def test_batches_are_what_sentence_transformers_makes_of_the_same_texts(bert_path, side, prompt):
    model = SentenceTransformer(bert_path)
    model[0].processor.padding_side = side
    model.prompts["document"] = prompt
    reader = reader_for(model, "document")
    assert isinstance(reader, TransformerReader)
    seen = []
    for positions, features in _encoding.batches(reader, TEXTS[:60], 256, 1024):
        expected = model.preprocess([TEXTS[i] for i in positions], prompt=prompt)
        assert {k for k in expected if isinstance(expected[k], torch.Tensor)} == set(features)
        for name in features:
            assert torch.equal(features[name], expected[name]), name
        seen.extend(positions.tolist())
    assert sorted(seen) == list(range(60)), "every text once"


def test_static_batches_are_what_sentence_transformers_makes(static):
    reader = reader_for(static.model, "query")
    assert isinstance(reader, StaticReader)
    for positions, features in _encoding.batches(reader, TEXTS[:60], 256, 25):
        expected = static.model.preprocess([TEXTS[i] for i in positions])
        assert len(positions) <= 25 and all(torch.equal(features[name], expected[name]) for name in expected)


def test_batches_keep_to_the_budget_and_are_of_like_length(bert):
    reader = reader_for(bert.model, "document")
    cut = list(_encoding.batches(reader, TEXTS, 300, 1024))
    assert len(cut) > 10
    real = sum(int(features["attention_mask"].sum()) for _, features in cut)
    assert max(features["input_ids"].numel() for _, features in cut) <= 300
    assert sum(features["input_ids"].numel() for _, features in cut) < 1.1 * real, "too much padding"
    assert all(len(positions) == 1 for positions, _ in _encoding.batches(reader, TEXTS[:9], 1, 1024))
    assert max(len(positions) for positions, _ in _encoding.batches(reader, TEXTS, 10_000, 3)) == 3


def test_same_vectors_whatever_the_batches(bert, static):
    for encoder in (bert, static):
        expected = encoder.model.encode_document(TEXTS, batch_size=1)
        for options in ({"budget": 1}, {"budget": 100}, {"budget": 100_000}, {"most": 2}, {"most": 7, "budget": 512}):
            assert np.abs(encode(encoder, TEXTS, **options) - expected).max() < 1e-5
        for batch_size in (None, 1, 5, 1000):
            assert np.abs(encoder.encode_docs(TEXTS, batch_size) - expected).max() < 1e-5
        shuffled = np.random.default_rng(3).permutation(len(TEXTS))
        again = encoder.encode_docs([TEXTS[i] for i in shuffled])
        assert np.abs(again - expected[shuffled]).max() < 1e-5


def test_more_texts_than_are_read_at_once(static, monkeypatch, bert):
    monkeypatch.setattr(_encoding, "READ_AT_ONCE", 32)
    for encoder in (bert, static):
        assert np.abs(encode(encoder, TEXTS) - encoder.model.encode_document(TEXTS)).max() < 1e-5


def test_a_batch_a_core_gives_the_same_bits_as_one_core(bert, two_threads):
    texts = some_texts(400, seed=1)
    assert _encoding._workers(bert.model, reader_for(bert.model, "document"), texts, 256) == 2
    found = [encode(bert, texts, budget=256) for _ in range(3)]
    assert torch.get_num_threads() == 2, "the caller's threads are as they were"
    torch.set_num_threads(1)
    assert _encoding._workers(bert.model, reader_for(bert.model, "document"), texts, 256) == 1
    alone = encode(bert, texts, budget=256)
    assert all(np.array_equal(alone, vectors) for vectors in found)
    inside = []
    thread = threading.Thread(target=lambda: inside.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    encode(bert, texts, budget=256)
    thread.start()
    thread.join()
    assert inside == [2], "new threads begin with one core only"


def test_errors_in_the_background_come_to_the_front(bert, two_threads):
    class Stop(RuntimeError):
        pass

    def failing(count):
        raise Stop

    texts = some_texts(400, seed=1)
    threads = threading.active_count()
    modes = [m.training for m in bert.model.modules()]
    for run in (lambda: encode(bert, texts, budget=256, progress=failing), lambda: _broken(bert, texts, Stop)):
        for cores in (2, 1):
            torch.set_num_threads(cores)
            with pytest.raises(Stop):
                run()
            _wait_until(lambda: threading.active_count() == threads)
            assert [m.training for m in bert.model.modules()] == modes


def _broken(encoder, texts, error):
    def hook(module, arguments):
        raise error

    handle = encoder.model[1].register_forward_pre_hook(hook)
    try:
        encode(encoder, texts, budget=256)
    finally:
        handle.remove()


def _wait_until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    assert true()


def test_error_while_tokenising(bert, monkeypatch):
    def read(self, texts):
        raise OSError("the tokenizer is gone")

    monkeypatch.setattr(TransformerReader, "read", read)
    with pytest.raises(OSError, match="the tokenizer is gone"):
        bert.encode_docs(TEXTS)


class OtherTransformer(Transformer):
    """An input module whose tokenisation nobody here knows: it reverses the words."""

    def preprocess(self, inputs, prompt=None, **kwargs):
        return super().preprocess([" ".join(reversed(text.split())) for text in inputs], prompt, **kwargs)


def test_unknown_input_modules_tokenise_for_themselves(bert_path, bert):
    parts = SentenceTransformer(bert_path)
    model = SentenceTransformer(modules=[OtherTransformer(bert_path), parts[1], parts[2]])
    assert isinstance(reader_for(model, "document"), AnyReader)
    encoder = DualEncoder(model)
    vectors = encoder.encode_docs(TEXTS)
    assert np.abs(vectors - model.encode_document(TEXTS)).max() < 1e-5
    assert np.abs(vectors - bert.encode_docs(TEXTS)).max() > 1e-2


@pytest.mark.parametrize("option", ["processing_kwargs", "document_length"])
def test_unusual_tokenisation_is_kept(bert_path, option):
    value = {"text": {"max_length": 9}} if option == "processing_kwargs" else 9
    parts = SentenceTransformer(bert_path)
    model = SentenceTransformer(modules=[Transformer(bert_path, **{option: value}), parts[1], parts[2]])
    encoder = DualEncoder(model)
    assert np.abs(encoder.encode_docs(TEXTS) - model.encode_document(TEXTS)).max() < 1e-5
    assert np.abs(encoder.encode_docs(TEXTS) - parts.encode_document(TEXTS)).max() > 1e-2
    assert isinstance(reader_for(model, "document"), AnyReader if option == "processing_kwargs" else TransformerReader)


def test_bfloat16(bert, bert_path):
    half = DualEncoder(bert_path, dtype="bfloat16")
    for texts in (TEXTS, TEXTS[:1]):
        vectors, expected = half.encode_docs(texts), bert.encode_docs(texts)
        assert vectors.dtype == np.float32 and not np.array_equal(vectors, expected)
        assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6
        assert (vectors * expected).sum(1).min() > 0.999
    # A linear layer leaves bfloat16 behind, and lengths computed in it are off.
    projected = DualEncoder.two_towers(bert_path, bert_path, shared_projection=24, dtype="bfloat16")
    assert np.abs(np.linalg.norm(projected.encode_docs(TEXTS), axis=1) - 1).max() < 1e-6
    assert half.encode_docs_torch(TEXTS[:2]).dtype != torch.bfloat16
    assert half != bert and half.fingerprint == bert.fingerprint


# -- probes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_probe(monkeypatch, tmp_path):
    monkeypatch.setattr(_probe, "_settled", {})
    monkeypatch.setattr(_probe, "_cosines", {})
    monkeypatch.setattr(_probe, "LARGE", 1000)
    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path))
    return tmp_path / "pt_dance" / "encoding"


def test_budget_is_measured_once_and_kept(bert, fresh_probe, monkeypatch):
    encoder = bert.copy()
    encoder.encode_docs(TEXTS[:5])
    assert encoder.probe is None and not fresh_probe.exists(), "small encodes need no probe"
    first = encoder.encode_docs(TEXTS)
    budget = encoder.probe["budget"]
    assert str(budget) in encoder.probe["tokens_per_second"]
    files = sorted(p.name for p in fresh_probe.iterdir())
    (file,) = fresh_probe.glob("*-batch.json")
    assert json.loads(file.read_text())["budget"] == budget
    # Another process finds the file, measures nothing, and cuts the same batches.
    monkeypatch.setattr(_probe, "_settled", {})
    monkeypatch.setattr(_probe, "_speed", None)
    with torch.no_grad():
        next(encoder.model.parameters()).mul_(1.0)
    assert np.array_equal(encoder.encode_docs(TEXTS), first)
    assert sorted(p.name for p in fresh_probe.iterdir()) == files


@pytest.mark.parametrize("content", ["", "[]", '{"budget": "much"}', '{"budget": -1}', '{"budget": 1e99}'])
def test_a_damaged_probe_is_measured_again(bert, fresh_probe, monkeypatch, content):
    bert.copy().encode_docs(TEXTS)
    for file in fresh_probe.iterdir():
        file.write_text(content)
    monkeypatch.setattr(_probe, "_settled", {})
    encoder = bert.copy()
    encoder.encode_docs(TEXTS)
    # Another measurement may choose with or without oneDNN, and so measure batches under another name.
    packed = encoder.probe.get("onednn_speedup", 0.0) >= _probe._MIN_SPEEDUP
    (file,) = (file for file in fresh_probe.glob("*-batch.json") if ("-onednn-" in file.name) == packed)
    assert json.loads(file.read_text())["budget"] == encoder.probe["budget"]
    if packed:
        (file,) = fresh_probe.glob("*-onednn.json")
        assert json.loads(file.read_text())["speedup"] == encoder.probe["onednn_speedup"]


def test_a_home_that_cannot_be_written_to(bert, fresh_probe):
    fresh_probe.parent.parent.joinpath("pt_dance").write_text("a file in the way")
    encoder = bert.copy()
    assert np.abs(encoder.encode_docs(TEXTS) - bert.model.encode_document(TEXTS)).max() < 1e-5
    assert encoder.probe["budget"] > 0


def speeds(table):
    def speed(model, reader, sample, task, budget, bfloat16):
        return table["bfloat16" if bfloat16 else budget]

    return speed


@pytest.mark.parametrize(
    ("table", "budget"),
    [
        ({512: 99, 1024: 100, 2048: 90}, 1024),
        ({512: 90, 1024: 100, 2048: 102}, 1024),  # too little to leave the default
        ({512: 90, 1024: 100, 2048: 120, 4096: 110}, 2048),
        ({512: 90, 1024: 100, 2048: 120, 4096: 140, 8192: 150}, 8192),
        ({256: 90, 512: 110, 1024: 100, 2048: 90}, 512),
    ],
)
def test_the_fastest_budget_is_chosen(bert, fresh_probe, monkeypatch, table, budget):
    monkeypatch.setattr(_probe, "_speed", speeds(table))
    plan = _probe.plan(bert.model, TEXTS, "document", "float32", bert.dim)
    assert plan.budget == budget and plan.measured["tokens_per_second"] == {str(k): v for k, v in table.items()}


@pytest.mark.parametrize(
    ("speed", "cosine", "chosen"), [(200, 0.99995, True), (105, 0.99995, False), (80, 1.0, False), (300, 0.9998, False)]
)
def test_auto_takes_bfloat16_only_if_faster_and_close(bert, fresh_probe, monkeypatch, speed, cosine, chosen):
    monkeypatch.setattr(_probe, "_speed", speeds({512: 90, 1024: 100, 2048: 90, "bfloat16": speed}))
    monkeypatch.setattr(_probe, "_cosine", lambda model, task, dim, pack: cosine)
    plan = _probe.plan(bert.model, TEXTS, "document", "auto", bert.dim)
    assert plan.bfloat16 is chosen and plan.measured["dtype"] == ("bfloat16" if chosen else "float32")
    assert not _probe.plan(bert.model, TEXTS, "document", "float32", bert.dim).bfloat16
    assert _probe.plan(bert.model, TEXTS, "document", "bfloat16", bert.dim).bfloat16


def test_auto_measures_this_machine(bert, fresh_probe):
    encoder = bert.copy()
    encoder.dtype = "auto"
    encoder.encode_docs(TEXTS)
    assert encoder.probe["bfloat16_speedup"] > 0 and encoder.probe["dtype"] in ("float32", "bfloat16")
    kinds = ["batch", "bfloat16"] + ["onednn"] * _packed.available()
    assert sorted(p.stem.rpartition("-")[2] for p in fresh_probe.iterdir()) == kinds
    pack = encoder.probe.get("onednn_speedup", 0) >= _probe._MIN_SPEEDUP
    cosine = _probe._cosine(bert.model, "document", bert.dim, pack)
    assert 0.99 < cosine < 1 and list(_probe._cosines.values()).count(cosine) == 1


def test_static_towers_need_no_probe(static, fresh_probe):
    assert _probe.plan(static.model, TEXTS, "document", "auto", 8) == (1024, False, False, None)


needs_onednn = pytest.mark.skipif(not _packed.available(), reason="this build of PyTorch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize(("speedup", "chosen"), [(1.5, True), (1.05, False)])
def test_onednn_is_used_where_it_is_faster(bert, fresh_probe, monkeypatch, speedup, chosen):
    used = []

    def speed(model, reader, sample, task, budget, bfloat16):
        used.append(any("forward" in vars(module) for module in model.modules()))
        return {512: 90, 1024: 100, 2048: 90}[budget] * (speedup if used[-1] else 1)

    monkeypatch.setattr(_probe, "_speed", speed)
    encoder = bert.copy()
    vectors = encoder.encode_docs(TEXTS)
    assert encoder.probe["onednn_speedup"] == speedup and used[-1] is chosen
    assert _probe.plan(encoder.model, TEXTS, "document", "float32", encoder.dim).packed is chosen
    assert np.abs(vectors - bert.model.encode_document(TEXTS)).max() < 1e-5


@needs_onednn
def test_onednn_gives_the_same_vectors_and_leaves_nothing_behind(bert, minilm_path):
    for model in (bert.model, DualEncoder(minilm_path).model):
        options = dict(dim=model.get_embedding_dimension(), budget=256)
        plain = _encoding.encode(model, TEXTS[:60], "document", **options)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        found = _encoding.encode(model, TEXTS[:60], "document", **options, pack=True)
        assert np.abs(found - plain).max() < 1e-5
        assert not any("forward" in vars(module) for module in model.modules())
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@needs_onednn
def test_packed_layers_do_what_they_always_do_with_gradients():
    layer = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2, bias=False))
    inputs = torch.randn(4, 5)
    expected = layer(inputs)
    with _packed.packed(layer), _packed.packed(layer):
        assert torch.equal(layer(inputs), expected)
        layer(inputs).sum().backward()
        assert layer[0].weight.grad.abs().sum() > 0
        with torch.no_grad():
            assert (layer(inputs) - expected).abs().max() < 1e-6
            assert (layer(inputs.double().float()[:, None]) - expected[:, None]).abs().max() < 1e-6
            layer[0].weight.mul_(2)  # what is packed is a copy, good for one encode
    with torch.no_grad():
        assert not torch.allclose(layer(inputs), expected)
    assert not any("forward" in vars(module) for module in layer)


@needs_onednn
def test_a_layer_with_a_forward_of_somebody_else_is_left_alone():
    layer = torch.nn.Linear(2, 2)
    layer.forward = lambda inputs: inputs * 0
    with _packed.packed(layer), torch.no_grad():
        assert layer(torch.ones(1, 2)).sum() == 0
    assert layer(torch.ones(1, 2)).sum() == 0


# -- pipelines ---------------------------------------------------------------------------------------------------------


def test_pipelines_hand_over_big_chunks(bert, static, tmp_path):
    sizes = []

    class Noting(DualEncoder):
        def _encode(self, texts, task, batch_size, verbose):
            sizes.append(len(texts))
            return super()._encode(texts, task, batch_size, verbose)

    docs = [{"docno": f"d{i}", "text": f"{text} {i}"} for i, text in enumerate(TEXTS)]
    noting = Noting(static.model, batch_size=4)
    for number, stage in enumerate((noting, noting.doc_encoder())):
        sizes.clear()
        index = pyterrier_dr.FlexIndex(str(tmp_path / str(number)))
        (stage >> index).index(iter(docs))
        assert sizes == [300]
        vectors = index.vec_loader()(pd.DataFrame({"docno": [d["docno"] for d in docs]}))["doc_vec"]
        assert np.array_equal(np.stack(vectors), static.encode_docs([d["text"] for d in docs]))
    assert noting.batch_size == HANDED_OVER == noting.doc_encoder().batch_size >= 4096
    assert DualEncoder(static.model, batch_size=10_000).batch_size == 10_000
    gradients = noting.encode_docs_torch(TEXTS[:9])
    assert gradients.requires_grad and len(gradients) == 9


def test_progress_counts_every_text(bert, static, two_threads):
    for encoder in (bert, static):
        for budget in (64, 100_000):
            done = []
            encode(encoder, TEXTS, budget=budget, progress=done.append)
            assert sum(done) == len(TEXTS)
