"""Rounds that carry the optimiser: one schedule, the same as one uninterrupted round, also after an interruption."""

from __future__ import annotations

import contextlib
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers.trainer
from transformers import TrainerCallback

from pt_dance import Corpus, DanceRetriever, DualEncoder, Round
from pt_dance.training.batches import RoundBatches
from pt_dance.training.schedule import plan
from small_collection import standard_library
from small_models import small_bert

BATCH = 8
TOPICS = 28  # three whole batches and a half one


def rounds(number, **options):
    return [Round(carry_optimizer=True, batch_size=4, **options)] * number


def test_rounds_that_carry_on_lie_one_behind_the_other():
    spans = plan(rounds(3), [10] * 3, [1, 2, 3])
    assert [(s.first_step, s.steps, s.total_steps) for s in spans] == [(0, 3, 9), (3, 3, 9), (6, 3, 9)]
    assert [(s.stream_seed, s.first_pass, s.passes) for s in spans] == [(1, 0, 1), (1, 1, 1), (1, 2, 1)]
    assert [s.carried_on for s in spans] == [True, True, False] and {s.schedule_seed for s in spans} == {1}
    alone = plan([Round(batch_size=4)] * 2, [10] * 2, [1, 2])
    assert [(s.first_step, s.total_steps, s.stream_seed, s.carried_on) for s in alone] == [
        (0, 3, 1, False), (0, 3, 2, False),
    ]  # fmt: skip


def test_a_number_of_steps_ends_a_round_in_the_middle_of_a_pass():
    spans = plan(rounds(3, steps=4), [10] * 3, [1, 2, 3])
    assert [(s.first_step, s.steps, s.batches) for s in spans] == [(0, 4, 4), (4, 4, 4), (8, 4, 4)]
    assert [(s.stream_batch, s.first_pass, s.passes) for s in spans] == [(0, 0, 2), (4, 1, 2), (8, 2, 2)]


def test_a_step_of_several_batches_is_not_divided_between_rounds():
    spans = plan(rounds(3, training_arguments={"gradient_accumulation_steps": 2}), [10] * 3, [1, 2, 3])
    assert [(s.steps, s.batches, s.first_batch) for s in spans] == [(2, 4, 0), (2, 4, 4), (2, 3, 8)]
    assert spans[0].total_steps == 6 and spans[0].total_batches == 11


def test_other_pairs_or_batches_begin_a_stream_of_their_own():
    for recipe, pairs in (
        ([*rounds(1), Round(carry_optimizer=True, batch_size=5)], [10, 10]),
        (rounds(2, share_of_queries=0.5), [10, 9]),
    ):
        first, second = plan(recipe, pairs, [1, 2])
        assert (second.stream_seed, second.stream_batch, second.first_step) == (2, 0, first.steps)


def examples(span, pairs=10):
    number = np.arange(pairs * span.passes)
    return SimpleNamespace(pairs=pairs, rows=SimpleNamespace(query=number % pairs, positive=number % pairs))


@pytest.mark.parametrize("options", [{}, {"steps": 4}, {"steps": 2}])
def test_the_batches_of_rounds_are_those_of_one(options):
    spans = plan(rounds(3, **options), [10] * 3, [1, 2, 3])
    (whole,) = plan(rounds(1, steps=spans[0].total_steps), [10], [1])
    expected = [[row % 10 for row in batch] for batch in RoundBatches(examples(whole), whole, 4, False)]
    found = []
    for span in spans:
        listed = list(RoundBatches(examples(span), span, 4, False))
        assert len(listed) == len(RoundBatches(examples(span), span, 4, False)) == len(expected)
        found += [[row % 10 for row in batch] for batch in listed[span.first_batch :][: span.batches]]
    assert found == expected
    assert sorted(row for batch in expected[:3] for row in batch) == list(range(10)) or len(expected) < 3


class Small:
    """Some docstrings with their queries, results for these, a static tower and a small BERT with dropout."""

    def __init__(self, folder):
        collection = standard_library()
        single = collection.qrels.drop_duplicates("qid", keep=False)
        topics = collection.topics[collection.topics["qid"].isin(single["qid"])].drop_duplicates("query").head(TOPICS)
        self.topics, self.qrels = topics, single[single["qid"].isin(topics["qid"])]
        documents = collection.documents.assign(text=collection.documents["text"].str.slice(0, 150))
        self.corpus = Corpus.build(documents, folder / "corpus", verbose=False)
        texts = documents["text"].tolist()
        bert = DualEncoder(small_bert([*texts, *topics["query"]], folder), device="cpu")
        self.encoders = {"static": DualEncoder.static(texts, dim=16, vocab_size=500, seed=1), "bert": bert}
        self.results = DanceRetriever(
            self.encoders["static"], self.corpus, folder / "first", verbose=False, num_results=9
        )
        self.results = self.results(topics)

    def fit(self, path, kind, recipe, **options):
        dance = DanceRetriever(self.encoders[kind], self.corpus, path, recipe=recipe, verbose=False, **options)
        return dance.fit(self.results, self.qrels)

    def round(self, **options):
        """The best results are the negatives, so that each round mines the same ones."""
        options = {"learning_rate": 1e-3, "batch_size": BATCH, **options}
        return Round(sampling="top", negatives_per_query=4, carry_optimizer=True, **options)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Small(tmp_path_factory.mktemp("small"))


class Watch(TrainerCallback):
    """The steps, rates and weights of all trainings, as the trainer's own callbacks are told."""

    def __init__(self):
        self.steps, self.stop_at = [], None

    def on_step_end(self, args, state, control, model=None, lr_scheduler=None, **_):
        total = sum(float(parameter.detach().double().sum()) for parameter in model.parameters())
        self.steps.append((state.global_step, lr_scheduler.get_last_lr()[0], total))

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.stop_at:
            self.stop_at = None
            raise KeyboardInterrupt


@contextlib.contextmanager
def watched():
    watch = Watch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS, watch])
        yield watch


@pytest.fixture
def watch():
    with watched() as watch:
        yield watch


def weights(encoder):
    return {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}


def equal(first, second):
    first, second = weights(first), weights(second)
    return all(torch.equal(first[name], second[name]) for name in first)


TWO = {"training_arguments": {"gradient_accumulation_steps": 2}}
CASES = {
    "static": ("static", {"epochs": 1}, {"epochs": 3}),
    "bert": ("bert", {"epochs": 1}, {"epochs": 3}),
    "bert, every five steps": ("bert", {"steps": 5}, {"steps": 15}),
    "bert, two batches a step": ("bert", {"epochs": 1, **TWO}, {"epochs": 3, **TWO}),
}


@pytest.mark.parametrize("case", CASES)
def test_three_rounds_are_step_by_step_one_uninterrupted_run(small, tmp_path, watch, case):
    kind, part, whole = CASES[case]
    one = small.fit(tmp_path / "one", kind, [small.round(**whole)])
    expected, watch.steps = watch.steps, []
    three = small.fit(tmp_path / "three", kind, [small.round(**part)] * 3)
    assert [step for step, _, _ in expected] == list(range(1, len(expected) + 1))
    assert watch.steps == expected
    assert len({rate for _, rate, _ in expected}) > len(expected) - 2, (
        "the rate must change for the test to mean anything"
    )
    assert equal(one.encoder, three.encoder)
    assert three.history["steps"].sum() == len(expected)
    assert not list(tmp_path.rglob("checkpoint-*"))
    if case == "static":  # and without carrying, each round is a training of its own
        watch.steps = []
        apart = Round(**{**vars(small.round(**part)), "carry_optimizer": False})
        anew = small.fit(tmp_path / "anew", kind, [apart] * 3)
        assert [step for step, _, _ in watch.steps] != [step for step, _, _ in expected]
        assert not equal(anew.encoder, three.encoder)


@pytest.fixture(scope="module")
def uninterrupted(small, tmp_path_factory):
    """A recipe, its fit, and the steps of it."""
    recipe = [small.round(checkpoint_steps=1, training_arguments={"weight_decay": 0.1})] * 3
    with watched() as watch:
        fit = small.fit(tmp_path_factory.mktemp("uninterrupted") / "run", "bert", recipe)
    return recipe, fit, watch.steps


@pytest.mark.parametrize("stop_at", [2, 4, 11])
def test_rounds_that_carry_on_are_resumed_to_the_bit(small, uninterrupted, tmp_path, watch, stop_at):
    recipe, whole, expected = uninterrupted
    watch.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        small.fit(tmp_path / "stopped", "bert", recipe)
    assert len(watch.steps) == stop_at
    again = small.fit(tmp_path / "stopped", "bert", recipe)
    assert watch.steps == expected, "nothing is repeated or left out"
    assert equal(whole.encoder, again.encoder)
    columns = ["training_loss", "steps"]
    assert again.history[columns].equals(whole.history[columns])


def test_killed_when_the_encoder_was_to_be_written(small, tmp_path, monkeypatch, watch):
    recipe = [small.round(checkpoint_steps=1)] * 2
    whole = small.fit(tmp_path / "whole", "bert", recipe)

    def killed(self, path):
        if path.parent.name == "01":
            raise KeyboardInterrupt
        return save(self, path)

    save = DualEncoder.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DualEncoder, "save", killed)
        small.fit(tmp_path / "stopped", "bert", recipe)
    watch.steps = []
    again = small.fit(tmp_path / "stopped", "bert", recipe)
    assert [step for step, _, _ in watch.steps] == [5, 6, 7, 8], "the first round's steps are not taken again"
    assert equal(whole.encoder, again.encoder)
    assert again.history["training_loss"].equals(whole.history["training_loss"])


def test_a_lost_state_is_named(small, tmp_path, watch):
    recipe = [small.round(checkpoint_steps=1)] * 2
    watch.stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        small.fit(tmp_path / "run", "static", recipe)
    (state,) = (tmp_path / "run").rglob("checkpoint-4")
    shutil.rmtree(state)
    with pytest.raises(ValueError, match=r"optimiser's state after step 4.*rounds/01/checkpoints"):
        small.fit(tmp_path / "run", "static", recipe)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_trained_in_float32(small, tmp_path, dtype):
    encoder = small.encoders["bert"].copy()
    encoder.model.to(dtype)
    before = {name: tensor.float() for name, tensor in weights(encoder).items()}
    dance = DanceRetriever(
        encoder, small.corpus, tmp_path / "run", recipe=[small.round(learning_rate=1e-4)], verbose=False
    )
    dance.fit(small.results, small.qrels)
    after = weights(dance.encoder)
    floats = [name for name, tensor in after.items() if tensor.is_floating_point() and "pooler" not in name]
    assert {after[name].dtype for name in floats} == {torch.float32}
    moved = [float((after[name] != before[name]).float().mean()) for name in floats if "embeddings" not in name]
    assert np.mean(moved) > 0.95, "steps smaller than half precision can tell apart must count"
    assert all(torch.isfinite(after[name]).all() for name in floats)
