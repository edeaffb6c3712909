"""Fast encoding: the same vectors whatever the batches, threads and precision, which is chosen once."""

from __future__ import annotations

import itertools
import json
import threading
import time
import warnings

import numpy as np
import pandas as pd
import pyterrier_dr
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer

from pt_dance import DenseIndex, DualEncoder
from pt_dance.encoder import batches as _encoding
from pt_dance.encoder import precision as _precision
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


def test_a_batch_a_core_gives_the_same_bits_as_one_core(bert, two_threads, monkeypatch):
    texts = some_texts(400, seed=1)
    used = []
    original = _encoding._in_threads
    monkeypatch.setattr(_encoding, "_in_threads", lambda *args: used.append(args[2]) or original(*args))
    found = [encode(bert, texts, budget=256) for _ in range(3)]
    assert torch.get_num_threads() == 2, "the caller's threads are as they were"
    torch.set_num_threads(1)
    alone = encode(bert, texts, budget=256)
    assert all(np.array_equal(alone, vectors) for vectors in found) and used == [2, 2, 2, 1]
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


# -- precision ---------------------------------------------------------------------------------------------------------

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


@pytest.fixture
def measured(monkeypatch):
    """Seconds that products are said to take; what was asked for."""
    asked = []

    def say(float32, onednn, bfloat16):
        table = {"float32": float32, "float32-onednn": onednn, "bfloat16": bfloat16}
        monkeypatch.setattr(_precision, "_seconds", lambda device, *shape: asked.append(shape) or table)
        return asked

    return say


@pytest.mark.parametrize(
    ("float32", "onednn", "bfloat16", "dtype", "precision"),
    [
        (10, 10, 10, "float32", "float32"),
        (10, 9, 2, "float32", "float32"),  # too little to be more than noise
        (10, 8, 2, "float32", "float32-onednn"),
        (10, 8, 6.7, "auto", "float32-onednn"),
        (10, 8, 6.6, "auto", "bfloat16"),
        (10, 9, 8.4, "auto", "float32"),
        (10, 9, 8.3, "auto", "bfloat16"),
        (10, float("inf"), 20, "auto", "float32"),
        (10, 5, 20, "bfloat16", "bfloat16"),
    ],
)
def test_the_choice_follows_from_the_products(bert_path, measured, float32, onednn, bfloat16, dtype, precision):
    asked = measured(float32, onednn, bfloat16)
    assert DualEncoder(bert_path, dtype=dtype).precision == precision
    assert asked == [(32, 32), (32, 64), (64, 32)], "the shapes that most of the work is in"


def test_the_choice_is_made_once_whatever_the_amount_of_text(bert_path, measured, monkeypatch):
    asked = measured(10, 10, 2)
    encoder = DualEncoder(bert_path, dtype="auto")
    assert not asked, "opening costs nothing"
    used = []
    original = _encoding.encode
    monkeypatch.setattr(
        _encoding, "encode", lambda *args, **options: used.append(options["precision"]) or original(*args, **options)
    )
    encoder.encode_queries(["iron"])
    measured(10, 10, 20)
    encoder.encode_docs(TEXTS)
    encoder.copy().encode_docs(TEXTS[:3])
    encoder.with_similarity("dot").encode_queries(TEXTS[:3])
    assert used == ["bfloat16"] * 4 and len(asked) == 3
    encoder.encode_docs(TEXTS[:3], precision="float32")
    assert used[-1] == "float32" and encoder.precision == "bfloat16", "another one for one call"
    with pytest.raises(ValueError, match="precision='half' is unknown; choose one of 'float32'"):
        encoder.encode_docs(TEXTS[:3], precision="half")


def test_this_machine_is_measured_and_its_home_left_alone(bert_path, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path))
    threads = torch.get_num_threads()
    _precision._seconds.cache_clear()
    encoder = DualEncoder(bert_path, dtype="auto")
    vectors = encoder.encode_docs(TEXTS)
    assert encoder.precision in _precision.PRECISIONS and torch.get_num_threads() == threads
    seconds = _precision._seconds("cpu", 64, 32)
    assert 0 < seconds["float32"] < 1 and 0 < seconds["bfloat16"] < 1
    assert (0 < seconds["float32-onednn"] < 1) == torch.backends.mkldnn.is_available()
    assert (vectors * encoder.model.encode_document(TEXTS)).sum(1).min() > 0.999
    assert not any(tmp_path.iterdir())


def test_another_device_is_measured_by_the_thread_that_asks(monkeypatch):
    """A new thread has no CUDA context, of which cuBLAS warns; a device without numbers stands in for a GPU."""
    asked = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append((device, threading.current_thread())))
    seconds = _precision._seconds.__wrapped__("meta", 64, 32)
    assert set(asked) == {("meta", threading.current_thread())}
    assert 0 < seconds["float32"] < 1 and 0 < seconds["bfloat16"] < 1


def test_static_towers_have_no_products_to_measure(static, measured):
    asked = measured(10, 5, 1)
    for dtype, precision in (("float32", "float32"), ("auto", "float32"), ("bfloat16", "bfloat16")):
        assert DualEncoder(static.model, dtype=dtype).precision == precision
    assert not asked


def test_slow_float32_is_told_once(bert_path, measured, monkeypatch):
    measured(10, 5, 2)
    monkeypatch.setattr(_precision, "_said", False)
    many = TEXTS + TEXTS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DualEncoder(bert_path).encode_docs(TEXTS[:9])
        DualEncoder(bert_path, dtype="auto").encode_docs(many)
    with pytest.warns(UserWarning, match="bfloat16 are 2.5 times as fast here: .*dtype='auto'"):
        DualEncoder(bert_path).encode_docs(many)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DualEncoder(bert_path).encode_docs(many)
    measured(10, 5, 2.6)
    monkeypatch.setattr(_precision, "_said", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DualEncoder(bert_path).encode_docs(many)


def test_an_index_keeps_the_precision_it_was_begun_with(bert_path, measured, monkeypatch, tmp_path):
    docs = [{"docno": f"d{i}", "text": f"{text} {i}"} for i, text in enumerate(TEXTS)]
    queries = pd.DataFrame({"qid": ["1", "2"], "query": ["iron blood", "cats"]})

    def encoder(bfloat16):
        """The encoder as another session would open it, whose machine is measured anew."""
        measured(10, 10, 5 if bfloat16 else 20)
        return DualEncoder(bert_path, dtype="auto")

    def index(name, bfloat16):
        return DenseIndex(tmp_path / name, encoder(bfloat16), shard_size=64, verbose=False)

    def results(found):
        return found.retriever(num_results=5)(queries)[["qid", "docno", "score"]]

    whole = index("whole", True).index(docs)
    assert whole.precision == "bfloat16"
    assert json.loads((tmp_path / "whole" / "pt_meta.json").read_text())["encoder"]["precision"] == "bfloat16"
    expected = encoder(True).encode_docs([d["text"] for d in docs[:64]])
    assert np.array_equal(whole.open().vectors[:64], expected)
    assert not np.array_equal(encoder(False).encode_docs([d["text"] for d in docs[:64]]), expected)

    # A session that would choose float32 retrieves with bfloat16, too,
    pd.testing.assert_frame_equal(results(index("whole", False)), results(whole))
    # appends with it,
    index("appended", True).index(docs[:192])
    appended = index("appended", False).append(docs[192:])
    assert appended.precision == "bfloat16" and np.array_equal(appended.open().vectors, whole.open().vectors)
    # and goes on with it after an interruption.
    with pytest.raises(RuntimeError):
        index("resumed", True).index(itertools.chain(docs[:200], iter(lambda: 1 / 0, None)))
    resumed = index("resumed", False).index(iter(docs))
    assert resumed.precision == "bfloat16" and np.array_equal(resumed.open().vectors, whole.open().vectors)

    # Another dtype is another wish: what was begun is not gone on with.
    with pytest.raises(RuntimeError):
        index("other", True).index(itertools.chain(docs[:200], iter(lambda: 1 / 0, None)))
    plain = DenseIndex(tmp_path / "other", DualEncoder(bert_path), shard_size=64, verbose=False).index(iter(docs))
    assert plain.precision == "float32"
    assert np.array_equal(plain.open().vectors[:64], DualEncoder(bert_path).encode_docs([d["text"] for d in docs[:64]]))


@needs_onednn
def test_onednn_gives_the_same_vectors_and_leaves_nothing_behind(bert_path, minilm_path, two_threads):
    for path in (bert_path, minilm_path):
        encoder = DualEncoder(path)
        texts = TEXTS if path == bert_path else TEXTS[:12]
        plain = encode(encoder, texts, budget=256)
        before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
        laid_out = _precision.with_onednn(encoder.model)
        assert len([m for m in laid_out.modules() if isinstance(m, _precision._OneDnnLinear)]) == len(
            [m for m in encoder.model.modules() if type(m) is torch.nn.Linear]
        )
        found = encode(encoder, texts, budget=256, precision="float32-onednn")
        assert np.abs(found - plain).max() < 1e-6
        assert all(torch.equal(before[name], value) for name, value in encoder.model.state_dict().items())
        assert not any(isinstance(module, _precision._OneDnnLinear) for module in encoder.model.modules())
        assert np.array_equal(encode(encoder, texts, budget=256), plain)
        # Weights are laid out anew for every call: training is never missed.
        with torch.no_grad():
            next(m for m in encoder.model.modules() if type(m) is torch.nn.Linear).weight.data.mul_(1.5)
        moved = encode(encoder, texts, budget=256, precision="float32-onednn")
        assert np.abs(moved - encode(encoder, texts, budget=256)).max() < 1e-6 < np.abs(moved - plain).max()


@needs_onednn
def test_onednn_layers_compute_what_linear_layers_do():
    shared = torch.nn.Linear(5, 5)
    narrow, last = torch.nn.Linear(5, 3, bias=False), torch.nn.Linear(5, 2)
    model = torch.nn.Sequential(shared, narrow, torch.nn.Sequential(shared), last)
    model[2].insert(0, torch.nn.Linear(3, 5))
    model[3].forward = lambda inputs: inputs * 0  # somebody else's forward
    model[2][0].register_forward_hook(lambda module, inputs, output: output + 1)
    made = _precision.with_onednn(model)
    inputs = torch.randn(4, 7, 5)
    with torch.no_grad():
        assert (made[:3](inputs) - model[:3](inputs)).abs().max() < 1e-6
        assert made(inputs).abs().sum() == 0
    kinds = [type(module).__name__ for module in made]
    assert kinds == ["_OneDnnLinear", "_OneDnnLinear", "Sequential", "Linear"]
    assert made[2][1] is made[0] and type(made[2][0]) is torch.nn.Linear


# -- pipelines ---------------------------------------------------------------------------------------------------------


def test_pipelines_hand_over_big_chunks(bert, static, tmp_path):
    sizes = []

    class Noting(DualEncoder):
        def _encode(self, texts, *args):
            sizes.append(len(texts))
            return super()._encode(texts, *args)

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
