"""Losses at work: in sentence-transformers' trainer, with gradient caching, with two towers, in two processes."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
from datetime import timedelta

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Router, StaticEmbedding, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, BertTokenizerFast

import losses_reference as reference
from pt_dance import losses

WORDS = [f"w{number}" for number in range(60)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def static_tower(seed=0, dim=16):
    torch.manual_seed(seed)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(SPECIAL + WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return StaticEmbedding(tokenizer, embedding_dim=dim)


@pytest.fixture(scope="module")
def transformer_path(tmp_path_factory):
    """A random BERT of two layers that a sentence-transformers Transformer opens."""
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(SPECIAL + WORDS))
    BertTokenizerFast(str(path / "vocab.txt")).save_pretrained(path)
    return str(path)


def transformer(path):
    tower = Transformer(path)
    return SentenceTransformer(modules=[tower, Pooling(16, "mean")], device="cpu")


def collection(seed=0, n=2, m=2, size=48):
    """Twelve queries, each with two positives it shares words with; the training rows and their data set."""
    rng = np.random.default_rng(seed)
    queries, documents = 12, 24
    query_texts = [" ".join(WORDS[5 * q % 55 : 5 * q % 55 + 3]) for q in range(queries)]
    document_texts = [
        " ".join([*rng.permutation(query_texts[d // 2].split())[:2], *rng.choice(WORDS, 4)]) for d in range(documents)
    ]
    relevance = np.zeros((queries, documents), bool)
    relevance[np.arange(documents) // 2, np.arange(documents)] = True
    relevance[(np.arange(0, documents, 6) // 2 + 1) % queries, np.arange(0, documents, 6)] = True  # shared documents
    pairs = np.argwhere(relevance)[rng.integers(relevance.sum(), size=size)]
    negatives = rng.integers(-1, documents, (size, n))
    query_negatives = rng.integers(-1, queries, (size, m))
    scores = rng.normal(5, 2, size), rng.normal(0, 2, (size, n)), rng.normal(0, 2, (size, m))
    rows = losses.TrainingRows(pairs[:, 0], pairs[:, 1], sp.csr_matrix(relevance), negatives, query_negatives, *scores)
    columns = {
        "query": [query_texts[q] for q in pairs[:, 0]],
        "positive": [document_texts[d] for d in pairs[:, 1]],
        **{f"negative_{k + 1}": [document_texts[d] if d >= 0 else "" for d in negatives[:, k]] for k in range(n)},
        **{
            f"query_negative_{k + 1}": [query_texts[q] if q >= 0 else "" for q in query_negatives[:, k]]
            for k in range(m)
        },
        "label": list(range(size)),
    }
    return rows, Dataset.from_dict(columns)


def features(model, data, numbers, tasks=None):
    columns = [name for name in data.column_names if name != "label"]
    texts = data[list(numbers)]
    batch = [model.preprocess(texts[name], **({"task": tasks[name]} if tasks else {})) for name in columns]
    for name, one in zip(columns, batch, strict=True):
        if tasks:
            one["task"] = tasks[name]  # as the trainer's collator does
    return batch


def train(tmp_path, model, loss, data, steps=6, **arguments):
    arguments = {"learning_rate": 0.05, "per_device_train_batch_size": 16, "seed": 7, **arguments}
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path / "run"),
        max_steps=steps,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        **arguments,
    )
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss).train()


@pytest.mark.parametrize("name", sorted(reference.LOSSES))
def test_trains_a_static_tower_in_a_plain_trainer(tmp_path, name):
    rows, data = collection()
    model = SentenceTransformer(modules=[static_tower()], device="cpu")
    loss = reference.make(name, model, rows, mini_batch_size=4)  # which a static tower ignores
    assert not loss.uses_gradient_cache
    everything = torch.arange(len(rows))

    def value():
        with torch.no_grad():
            return loss(features(model, data, everything), everything).item()

    before = value()
    train(tmp_path, model, loss, data)
    assert value() < before


def test_rows_reach_the_loss_through_a_shuffling_trainer(tmp_path):
    """Each row's label arrives with the row's own texts, whatever order the trainer takes them in."""
    rows, data = collection()
    model = SentenceTransformer(modules=[static_tower()], device="cpu")
    seen = []

    class Watching(losses.ContrastiveLoss):
        def loss_of(self, batch):
            seen.append((batch.rows.numbers.copy(), batch.queries.detach().clone(), batch.positives.detach().clone()))
            return super().loss_of(batch)

    loss = Watching(model, rows=rows, similarity="dot", temperature=1.0)
    train(tmp_path, model, loss, data, steps=3, learning_rate=0.0)
    numbers = np.concatenate([numbers for numbers, _, _ in seen])
    assert sorted(numbers) == list(range(len(rows)))
    assert numbers.tolist() != sorted(numbers)
    for numbers, queries, positives in seen:
        texts = data[numbers.tolist()]
        torch.testing.assert_close(queries, model.encode(texts["query"], convert_to_tensor=True))
        torch.testing.assert_close(positives, model.encode(texts["positive"], convert_to_tensor=True))


def test_trains_without_rows_on_a_plain_data_set(tmp_path):
    _, data = collection()
    data = data.select_columns(["query", "positive", "negative_1"])
    model = SentenceTransformer(modules=[static_tower()], device="cpu")
    loss = losses.SamToneLoss(model, sides="both")
    with torch.no_grad():
        before = loss(features(model, data, range(48)), None).item()
    train(tmp_path, model, loss, data)
    with torch.no_grad():
        assert loss(features(model, data, range(48)), None).item() < before


@pytest.mark.parametrize("name", sorted(reference.LOSSES))
def test_cached_gradients_are_the_gradients(transformer_path, name):
    rows, data = collection()
    numbers = torch.tensor([3, 17, 4, 40, 9, 22, 31])
    gradients = []
    for mini_batch_size in (None, 3):
        model = transformer(transformer_path).eval()  # without dropout, which no two passes would share
        loss = reference.make(name, model, rows, mini_batch_size=mini_batch_size)
        assert loss.uses_gradient_cache == (mini_batch_size is not None)
        value = loss(features(model, data, numbers), numbers)
        (2 * value).backward()
        gradients.append((value.detach(), [parameter.grad for parameter in model.parameters()]))
    (plain, plain_gradients), (cached, cached_gradients) = gradients
    torch.testing.assert_close(cached, plain, rtol=1e-5, atol=1e-6)
    largest = max(gradient.abs().max() for gradient in plain_gradients if gradient is not None)
    assert largest > 0
    for a, b in zip(plain_gradients, cached_gradients, strict=True):
        if a is not None:
            assert (a - b).abs().max() <= 1e-5 * max(1, largest)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("name", ["contrastive", "mnrl-dual", "samtone-both"])
def test_cached_gradients_of_a_batch_of_1024(transformer_path, name, dropout):
    """In float64, since the sums over a batch's tokens round by 1e-4 of the largest gradient in float32, cached or not.

    With dropout the gradients are those of the same mini-batches and seed, all kept in memory.
    """
    rows, data = collection(n=1, m=1, size=1024)
    numbers = torch.arange(1024)
    found = []
    for cached in (False, True):
        model = transformer(transformer_path).double().train(dropout)
        loss = reference.make(name, model, rows, mini_batch_size=64 if cached or dropout else None)
        columns = features(model, data, numbers)
        torch.manual_seed(5)
        if cached or not dropout:
            value = loss(columns, numbers)
        else:
            kept = [loss.embed_minibatch_iter(column, with_grad=True, copy_random_state=False) for column in columns]
            value = loss.calculate_loss([[embeddings for embeddings, _ in column] for column in kept], numbers)
        value.backward()
        found.append((value.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (plain, expected), (cached, gradients) = found
    assert cached == pytest.approx(plain, rel=1e-10)
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert largest > 0.1
    assert max((gradients[n] - expected[n]).abs().max() for n in expected) <= 1e-9 * largest


@pytest.mark.parametrize(
    ("kind", "passes"),
    [("plain", None), ("with a prompt", None), ("padded on the left", 2), ("mask of bools", None), ("more inputs", 2)],
)
def test_texts_of_like_length_share_a_forward_pass(transformer_path, monkeypatch, kind, passes):
    """Embeddings and gradients are those of one padded pass; a pass has what fits, and no column of padding."""
    monkeypatch.setattr("pt_dance.losses.base.TOKENS_AT_ONCE", 32)
    rng = np.random.default_rng(0)
    lengths = rng.permuted(np.tile(np.r_[1:13, 26], (3, 1)), axis=1)
    texts = [[" ".join(rng.choice(WORDS, length)) for length in column] for column in lengths]
    found = []
    for loss_embeds in (False, True):
        model = transformer(transformer_path).double().eval()
        model[1].include_prompt = False
        model.tokenizer.padding_side = "left" if kind == "padded on the left" else "right"
        masks = []
        model[0].register_forward_pre_hook(lambda _, inputs, masks=masks: masks.append(inputs[0]["attention_mask"]))
        columns = [model.preprocess(column, prompt="w1 w2 " if kind == "with a prompt" else None) for column in texts]
        assert ("prompt_length" in columns[0]) == (kind == "with a prompt")
        for column in columns:
            if kind == "mask of bools":
                column["attention_mask"] = column["attention_mask"].bool()
            if kind == "more inputs":
                column["more"] = torch.zeros_like(column["input_ids"])
        if loss_embeds:
            embeddings = losses.ContrastiveLoss(model)._embed(columns)
        else:
            embeddings = [model(column)["sentence_embedding"] for column in columns]
        together = torch.stack(embeddings)
        weights = torch.linspace(-1, 1, together.numel(), dtype=together.dtype).reshape(together.shape)
        (together * weights).sum().backward()
        found.append((together.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-12, atol=1e-12)
    for expected, gradient in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)
    assert sum(len(mask) for mask in masks) == 39
    if passes is not None:
        assert len(masks) == passes  # queries, and documents
        return
    assert all(mask.numel() <= 32 or len(mask) == 1 for mask in masks)
    assert all(mask[:, -1].any() for mask in masks)
    assert sum(mask.numel() for mask in masks) < 0.5 * 39 * max(mask.shape[1] for mask in masks)


def peak_of_saved_activations(loss, batch, numbers) -> int:
    """The most bytes that autograd keeps for the backward pass at any one time, weights aside."""
    weights = {parameter.data_ptr() for parameter in loss.parameters()}
    held = {"now": 0, "most": 0}

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            held["now"] += tensor.nbytes
            held["most"] = max(held["most"], held["now"])

        def __del__(self):
            held["now"] -= self.tensor.nbytes

    def pack(tensor):
        return tensor if tensor.data_ptr() in weights else Saved(tensor)

    def unpack(saved):
        return saved.tensor if isinstance(saved, Saved) else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss(batch, numbers).backward()
    return held["most"]


def test_caching_holds_the_activations_of_one_mini_batch(transformer_path):
    rows, data = collection(size=256)
    model = transformer(transformer_path).eval()

    def peak(size, mini_batch_size=None):
        loss = losses.make("samtone", model, rows, dual=True, mini_batch_size=mini_batch_size)
        numbers = torch.arange(size)
        return peak_of_saved_activations(loss, features(model, data, numbers), numbers)

    small, large, cached = peak(8), peak(128), peak(128, mini_batch_size=8)
    assert large > 12 * small
    assert cached < 1.5 * small


@pytest.mark.parametrize("name", ["contrastive", "ance", "margin-mse"])
def test_caching_with_columns_the_loss_does_not_read(transformer_path, name):
    rows, data = collection()
    numbers = torch.arange(6)
    model = transformer(transformer_path).eval()
    loss = losses.DualLoss(reference.make(name, model, rows, mini_batch_size=2), weight=0)
    loss(features(model, data, numbers), numbers).backward()
    cached = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    reference.make(name, model, rows)(features(model, data, numbers), numbers).backward()
    plain = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for a, b in zip(plain, cached, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item() + 1e-7)


def test_caching_trains_and_evaluates_in_the_trainer(transformer_path, tmp_path):
    rows, data = collection()
    model = transformer(transformer_path)
    loss = reference.make("samtone-both", model, rows, mini_batch_size=5)
    everything = torch.arange(len(rows))
    model.eval()
    with torch.no_grad():
        before = loss(features(model, data, everything), everything).item()
    train(tmp_path, model, loss, data, steps=4, learning_rate=1e-3)
    model.eval()
    with torch.no_grad():
        assert loss(features(model, data, everything), everything).item() < before


def test_cached_gradients_do_not_underflow_in_half_precision(transformer_path):
    """float16 ends at 6e-8; the trainer scales the loss up only when the gradients are cached already."""
    rows, data = collection()
    numbers = torch.arange(6)
    model = transformer(transformer_path).half().eval()
    loss = losses.ContrastiveLoss(model, temperature=1e7, rows=rows, mini_batch_size=2)
    (2.0**24 * loss(features(model, data, numbers), numbers)).backward()
    assert any(parameter.grad.abs().max() > 1e-3 for parameter in model.parameters() if parameter.grad is not None)


def tasks(data):
    return {name: "query" if name.startswith("query") else "document" for name in data.column_names if name != "label"}


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_two_towers_get_the_columns_of_their_side(transformer_path, mini_batch_size):
    rows, data = collection()
    routes = {"query": [Transformer(transformer_path), Pooling(16, "mean")]}
    routes["document"] = [Transformer(transformer_path), Pooling(16, "cls")]
    model = SentenceTransformer(modules=[Router.for_query_document(routes["query"], routes["document"])], device="cpu")
    model.eval()
    numbers = torch.arange(7)
    loss = losses.make("contrastive", model, rows, dual=True, dual_weight=1.0, mini_batch_size=mini_batch_size)
    value = loss(features(model, data, numbers, tasks(data)), numbers)
    encode = {"query": model.encode_query, "document": model.encode_document}
    texts = data[numbers.tolist()]
    embeddings = [encode[task](texts[name], convert_to_tensor=True) for name, task in tasks(data).items()]
    expected = loss.compute_loss_from_embeddings([column.clone() for column in embeddings], numbers)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_caching_refuses_one_static_tower_beside_another(transformer_path):
    router = Router.for_query_document([static_tower()], [Transformer(transformer_path), Pooling(16, "mean")])
    model = SentenceTransformer(modules=[router], device="cpu")
    losses.ContrastiveLoss(model)
    with pytest.raises(ValueError, match="one static tower and one that is not: leave mini_batch_size out"):
        losses.ContrastiveLoss(model, mini_batch_size=4)


def test_losses_can_be_copied_with_their_model():
    rows, _ = collection()
    model = SentenceTransformer(modules=[static_tower()], device="cpu")
    loss = copy.deepcopy(reference.make("margin-mse-mnrl-dual", model, rows))
    assert loss.model is loss.loss.model is loss.loss.losses[1].model
    assert loss.model is not model


@pytest.mark.parametrize("kind", ["static", "transformer", "cached"])
def test_matryoshka_is_the_sum_of_the_loss_over_its_dimensions(transformer_path, monkeypatch, kind):
    """Sentence-transformers' loss around ours: the same columns, cut off and normalised, and the same masks."""
    rows, data = collection()
    tower = static_tower() if kind == "static" else None
    model = SentenceTransformer(modules=[tower], device="cpu") if tower else transformer(transformer_path).eval()
    options = {"mini_batch_size": 4} if kind == "cached" else {}
    for loss in (
        losses.DualLoss(losses.ContrastiveLoss(model, rows=rows, **options)),
        losses.MarginMSELoss(model, rows=rows, **options),
    ):
        numbers = torch.arange(12)
        columns = [model(one)["sentence_embedding"].detach() for one in features(model, data, numbers)]
        cut = [[torch.nn.functional.normalize(column[:, :dim], dim=1) for column in columns] for dim in (16, 4)]
        expected = sum(loss.compute_loss_from_embeddings(part, numbers).item() for part in cut)
        monkeypatch.setattr("pt_dance.losses.base.TOKENS_AT_ONCE", 12)  # several passes of a transformer
        value = MatryoshkaLoss(model, loss, [16, 4])(features(model, data, numbers), numbers)
        assert value.item() == pytest.approx(expected, rel=1e-5)
        value.backward()
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
        model.zero_grad()


# --- several processes -----------------------------------------------------------------------------------------------


def linear_model():
    torch.manual_seed(0)
    return torch.nn.Linear(6, 5).double()


def distributed_batch():
    """A batch of seven rows and one that fills it up, as inputs of a linear model, column by column."""
    rows = reference.random_rows(np.random.default_rng(11), 30, 2, 2, padding=0.3)
    numbers = torch.tensor([3, 1, 3, 29, 8, 14, 20, -1])
    generator = torch.Generator().manual_seed(1)
    return rows, numbers, [torch.randn(8, 6, generator=generator, dtype=torch.float64) for _ in range(6)]


def distributed_gradients(part: slice, gather: bool):
    """Value and gradients of every loss on a part of the batch."""
    rows, numbers, inputs = distributed_batch()
    found = {}
    for name in reference.LOSSES:
        model = linear_model()
        loss = reference.make(name, model, rows, gather_across_devices=gather)
        value = loss.compute_loss_from_embeddings([model(column[part]) for column in inputs], numbers[part])
        value.backward()
        found[name] = [value.detach(), *(parameter.grad for parameter in model.parameters())]
    return found


def distributed_worker(rank: int, folder: str):
    """One of two processes; each leaves what it found in a file."""
    threads = torch.get_num_threads()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    try:
        torch.set_num_threads(1)
        torch.save(distributed_gradients(slice(4 * rank, 4 * rank + 4), gather=True), f"{folder}/rank{rank}.pt")
    finally:
        torch.set_num_threads(threads)
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional.all_gather is deprecated")
def test_two_processes_that_gather_compute_the_loss_of_the_whole_batch(tmp_path):
    """As data-parallel training averages them: the mean over the processes, of the value and of the gradients.

    Of the seven rows one process has four and the other three, and one that only fills its part up.
    """
    # Where there is a GPU, gradients were computed by threads that a fork has not.
    how = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    other = how.Process(target=distributed_worker, args=(1, str(tmp_path)))
    other.start()
    try:
        distributed_worker(0, str(tmp_path))
        other.join(120)
    finally:
        other.kill()
    assert other.exitcode == 0
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    whole = distributed_gradients(slice(0, 7), gather=False)
    for name, expected in whole.items():
        for first, second, value in zip(ranks[0][name], ranks[1][name], expected, strict=True):
            torch.testing.assert_close((first + second) / 2, value, rtol=1e-9, atol=1e-10, msg=name)
    # Without gathering each process knows its own half only, which is another loss.
    halves = [distributed_gradients(slice(0, 4), gather=False), distributed_gradients(slice(4, 8), gather=False)]
    for name in ("contrastive", "ance", "samtone-both", "margin-mse", "regularized"):
        assert abs(sum(half[name][0] for half in halves) / 2 - whole[name][0]) > 1e-6, name
    for name, rank in itertools.product(("contrastive", "samtone-both"), range(2)):
        assert ranks[rank][name][0] != whole[name][0]
