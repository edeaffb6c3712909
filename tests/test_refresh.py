"""Negatives that are refreshed while a round is trained: every row has one table, and what was done can be repeated."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pyterrier as pt
import pytest
from ir_measures import RR
from safetensors.torch import load_model, save_model
from torch.utils.data import DataLoader

import kill_refresh
from forked import forked_refreshers
from pt_dance import Corpus, DenseIndex, DualEncoder, Round, recipes
from pt_dance.analysis.trained import citations, with_facts
from pt_dance.losses.rows import TrainingRows
from pt_dance.mining import positive_pairs
from pt_dance.training import validation
from pt_dance.training.batches import RoundBatches
from pt_dance.training.examples import build_examples
from pt_dance.training.processes import Processes
from pt_dance.training.refresh import beside
from pt_dance.training.refresh.journal import Journal, Switch
from pt_dance.training.refresh.tables import Exchange
from pt_dance.training.round_table import recipe_table
from pt_dance.training.schedule import Span
from small_collection import standard_library
from small_models import small_bert

pytestmark = pytest.mark.timeout(600)  # a refresher imports everything anew, on machines that may be busy
STEPS = 48


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with what is fitted on, and the folders of a static tower and of a small BERT with dropout."""
    folder = tmp_path_factory.mktemp("given")
    texts = kill_refresh.make_collection(folder, 64)
    DualEncoder.static(texts, dim=32, vocab_size=1000, seed=1).save(folder / "encoder")
    DualEncoder(small_bert(texts, folder), device="cpu", max_length=32).save(folder / "transformer")
    return folder


def assert_nothing_left(path):
    assert {entry.name for entry in (path / "rounds" / "01").iterdir()} == kill_refresh.FILES
    assert not kill_refresh.refreshers(psutil.Process())


@contextlib.contextmanager
def trainer_seen(folder):
    """Keep all weights that are handed over, and give the rounds that this process itself has measured."""
    hand_over, search, measured = Exchange.hand_over, validation.documents_to_queries, []

    def keep(exchange, step, model):
        hand_over(exchange, step, model)
        save_model(model, str(folder / f"{step}.safetensors"))

    def measure(index, *given):
        measured.append(Path(index.index_path).parent.name)
        return search(index, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "hand_over", keep)
        patch.setattr(validation, "documents_to_queries", measure)
        yield measured


def quality(given, folder, model):
    """The mean reciprocal rank of an encoder on the topics that are fitted on; any step changes it."""
    topics, qrels = (pd.read_parquet(given / f"{name}.parquet") for name in kill_refresh.FRAMES)
    index = DenseIndex(folder, model, verbose=False).index(Corpus(given / "corpus"))
    return pt.Evaluate(index.retriever()(topics), qrels[qrels["qid"].isin(topics["qid"])], [RR])["RR"]


def test_a_transformers_fit_and_its_replay_have_the_same_weights_and_no_row_has_two_tables(given, tmp_path):
    """A replay gives them although its refresher is as fast as it likes: what is journalled decides.

    The refresher measures what it mines with; the trainer measures the ends of rounds alone.
    """
    corpus = Corpus(given / "corpus")
    options = dict(encoder="transformer", validated=True, measure=RR)
    with kill_refresh.rows_seen(corpus) as rows, trainer_seen(tmp_path) as measured_here:
        live = kill_refresh.fit(given, tmp_path / "live", STEPS, **options)
    assert measured_here == ["00", "01"]
    assert rows["mixed"] == 0 and rows["whole"] >= 6 * STEPS
    assert_nothing_left(tmp_path / "live")
    journal = Journal(tmp_path / "live" / "rounds" / "01" / "refreshes.jsonl")
    row = live.history.iloc[-1]
    assert row["refreshes"] == len(journal.switches) >= 1
    assert all(switch.step % 6 == 0 and switch.batch > switch.step for switch in journal.switches)
    assert 0 < row["staleness"] <= row["longest_staleness"] < STEPS and row["beside_seconds"] > 0
    assert [measured["step"] for measured in row["measured_beside"]] == [switch.step for switch in journal.switches]
    for measured in row["measured_beside"]:
        assert set(measured) == {"step", "RR", "d→q RR"}
        encoder = DualEncoder.load(given / "transformer", device="cpu")
        load_model(encoder.model, str(tmp_path / f"{measured['step']}.safetensors"))
        expected = quality(given, tmp_path / f"index {measured['step']}", encoder)
        assert measured["RR"] == pytest.approx(expected, abs=1e-6) != pytest.approx(row["RR"], abs=1e-6)
    last = live.retriever(round=1).index
    assert row["RR"] == pytest.approx(quality(given, tmp_path / "index", last.encoder), abs=1e-6)
    settings = json.loads((tmp_path / "live" / "settings.json").read_text())
    assert (settings["refresh"], settings["round 1 refresh_every"], settings["round 1 max_staleness"]) == (
        "beside", 6, 12,
    )  # fmt: skip
    options |= dict(refresh="replay", replay_of=tmp_path / "live")
    with forked_refreshers():
        again = kill_refresh.fit(given, tmp_path / "again", STEPS, **options)
    assert again.retriever(round=1).index.encoder.fingerprint == last.encoder.fingerprint
    assert repr(Journal(tmp_path / "again" / "rounds" / "01" / "refreshes.jsonl")) == repr(journal)
    same = ["training_loss", "staleness", "RR", "measured_beside"]
    assert again.history.iloc[-1][same].equals(row[same])
    assert_nothing_left(tmp_path / "again")
    with pytest.raises(ValueError, match=r"cannot be replayed with other settings than its own \(round 1 steps\)$"):
        kill_refresh.fit(given, tmp_path / "other", STEPS - 1, **options)


def test_a_refresher_has_what_training_leaves(monkeypatch):
    """Cores of all processes of the job on this machine are training's; the last GPU is free if there are more."""
    monkeypatch.setattr(beside.torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(beside.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(beside.torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = []
    for name, value in {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "4,7,9"}.items():
        monkeypatch.setenv(name, value)
        surroundings = beside.surroundings()
        found.append((surroundings["OMP_NUM_THREADS"], surroundings["CUDA_VISIBLE_DEVICES"]))
        assert "WORLD_SIZE" not in surroundings and "LOCAL_WORLD_SIZE" not in surroundings
    assert found == [("13", "2"), ("10", "2"), ("10", "9")]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert beside.surroundings()["CUDA_VISIBLE_DEVICES"] == "4,7,9"


def test_a_refresher_that_fails_ends_the_fit_with_one_sentence_and_the_same_call_goes_on(given, tmp_path):
    calls = tmp_path / "calls"

    def source(dense):
        if sys.argv[0].endswith("refresher.py"):
            calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
            if calls.read_text() == "x":
                raise ConnectionError("no such model")
            if calls.read_text() == "xx":
                os.kill(os.getpid(), signal.SIGKILL)
        return dense

    def fit():
        recipe = [replace(kill_refresh.make_recipe(STEPS)[0], negatives=source)]
        return kill_refresh.fit(given, tmp_path / "run", STEPS, recipe=recipe)

    said = r"the refresher beside round 1 failed: ConnectionError: no such model \(see '.*refresher.log'\); what was"
    with pytest.raises(RuntimeError, match=said) as caught:
        fit()
    assert "\n" not in str(caught.value) and not kill_refresh.refreshers(psutil.Process())
    log = tmp_path / "run" / "rounds" / "01" / "refresh" / "refresher.log"
    assert "no such model" in log.read_text() and "Traceback" in log.read_text()
    with forked_refreshers(), pytest.raises(RuntimeError, match="beside round 1 failed: it was ended by signal 9"):
        fit()
    with forked_refreshers():
        done = fit()
    assert done.history.iloc[-1]["refreshes"] >= 1
    assert_nothing_left(tmp_path / "run")


def test_a_killed_fit_goes_on_and_its_refresher_ends_with_it(given, tmp_path):
    """The script that does it at length, in short: it also compares what was learnt, and replays it."""
    trial = kill_refresh.Trial(given, tmp_path / "run", STEPS, seconds=2)
    assert trial.killed("trainer", random.Random(2))
    with kill_refresh.rows_seen(Corpus(given / "corpus")) as rows, forked_refreshers():
        kill_refresh.fit(given, trial.path, STEPS, validated=True)
    trial.check_finished()
    assert rows["mixed"] == 0 < rows["whole"]


def test_between_rounds_is_one_round_a_refresh(given, tmp_path):
    """To the bit the same as rounds that say so themselves."""
    recipe = kill_refresh.make_recipe(14)
    one = kill_refresh.fit(given, tmp_path / "one", 14, refresh="between", recipe=recipe)
    plain = replace(recipe[0], refresh_every=None, max_staleness=None)
    parts = [replace(plain, steps=6), *(replace(plain, steps=steps, carry_optimizer=True) for steps in (6, 2))]
    parts_fit = kill_refresh.fit(given, tmp_path / "parts", 14, refresh="between", recipe=parts)
    assert one.history["steps"].tolist() == [0, 6, 6, 2]
    assert one.encoder.fingerprint == parts_fit.encoder.fingerprint
    first, second = (one.negatives(number, texts=False) for number in (1, 2))
    assert second["new"].any() and len(first) == len(second)
    assert "recipe_round" not in parts_fit.history and one.history["recipe_round"].tolist() == [0, 1, 1, 1]


def test_what_is_said_of_parts_is_said_of_the_round_that_they_are_parts_of(given, tmp_path):
    recipe = [*kill_refresh.make_recipe(12), Round(name="second", loss="samtone", steps=2)]
    dance = kill_refresh.fit(given, tmp_path / "run", 12, refresh="between", recipe=recipe)
    rows = dance.history.to_dict("records")
    assert [row["recipe_round"] for row in rows] == [0, 1, 1, 2]
    for row, rate in zip(rows, (None, 0.1, 0.2, 0.3), strict=True):
        row["learning_rate"] = rate
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", recipe_table([*recipe], rows))
    place = cells.index("learning rate")
    assert ["0.1" in cells[place + 1], "0.3" in cells[place + 2]] == [True, True]
    # in the model card of the second part, the second round's loss has no citation yet
    cited = [with_facts(dance._encoder_of(n), dance, n, rows).origin["trainings"][-1]["citations"] for n in (2, 3)]
    assert cited == [citations(recipe[:1]), citations(recipe)] and cited[0] != cited[1]


@pytest.mark.parametrize(
    ("options", "rounds", "message"),
    [
        ({"refresh": "besides"}, {}, "refresh='besides'"),
        ({"refresh": "beside"}, {"refresh_every": None, "max_staleness": None}, "refresh_every=... .steps."),
        ({"refresh": "beside"}, {"negatives": "first_stage"}, "come from the current model"),
        ({"refresh": "beside"}, {"share_of_queries": 0.5}, "share_of_queries=0.5 in turn"),
        ({"refresh": "replay"}, {}, "replay_of=... .* belong together"),
        ({"replay_of": "runs/other"}, {}, "replay_of=... .* belong together"),
    ],
)
def test_options_that_make_no_sense(given, tmp_path, options, rounds, message):
    recipe = [replace(kill_refresh.make_recipe(STEPS)[0], **rounds)]
    with pytest.raises(ValueError, match=message):
        kill_refresh.fit(given, tmp_path / "run", STEPS, **{"refresh": "between", "recipe": recipe, **options})
    assert not (tmp_path / "run").exists()


def test_a_bound_that_cannot_be_kept():
    for options in ({"max_staleness": 5}, {"max_staleness": 5, "refresh_every": 6}):
        with pytest.raises(ValueError, match="max_staleness=5 steps cannot be kept with refresh_every="):
            Round(**options)


def test_what_cannot_be_handed_over_is_said(given, tmp_path):
    class Engine:
        def __reduce__(self):
            raise TypeError("an engine cannot be pickled")

    engine = Engine()

    def source(dense):
        return dense if engine else None

    recipe = [replace(kill_refresh.make_recipe(STEPS)[0], negatives=source)]
    said = r"cannot be handed to the refresher, a process of its own \(an engine cannot be pickled\); make what"
    with pytest.raises(ValueError, match=said) as caught:
        kill_refresh.fit(given, tmp_path / "run", STEPS, recipe=recipe)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- tables and journal, without a process


@pytest.fixture
def refreshed(given, tmp_path):
    """Examples with three versions of their negatives, and where the later two lie."""
    small = standard_library()
    topics, corpus = small.topics.head(20), Corpus(given / "corpus")
    pairs = positive_pairs(topics, small.qrels[small.qrels["qid"].isin(topics["qid"])])
    made = [
        build_examples(topics, pairs, corpus, negatives=_any_negatives(pairs, corpus, number), negatives_per_row=2)
        for number in range(3)
    ]
    (tmp_path / "refresh").mkdir()
    exchange = Exchange(tmp_path / "refresh")
    for number in (1, 2):
        exchange.publish(number, made[number].rows, {"seconds": 1.0})
    made[0].rows.later = exchange.read
    return made, exchange, corpus


def _any_negatives(pairs, corpus, number):
    rng = np.random.default_rng(number)
    frame = pairs[["qid"]].loc[pairs.index.repeat(4)].reset_index(drop=True)
    docnos = [docno for docno in corpus.docno(np.arange(len(corpus))) if docno not in set(pairs["docno"])]
    return frame.assign(docno=rng.choice(docnos, len(frame))).drop_duplicates()


@pytest.mark.parametrize("workers", [0, 2])
def test_texts_and_masks_of_a_batch_come_from_the_table_that_its_labels_name(refreshed, workers):
    """Also where other processes make the batches, which never hear of a change."""
    made, _, corpus = refreshed
    first = made[0]
    count = len(first.rows)
    span = Span(
        schedule_seed=1, first_step=0, steps=9, total_steps=9, first_batch=0, batches=9, total_batches=9,
        per_pass=-(-first.pairs // 8), stream_seed=1, stream_batch=0, carried_on=False,
    )  # fmt: skip
    span = replace(span, batches=span.per_pass, total_batches=span.per_pass)
    versions = {0: 0, 1: 2}
    batches = RoundBatches(first, span, 8, False, version=lambda batch: versions.get(batch, 1))
    seen = set()
    for features in DataLoader(first.dataset, batch_sampler=batches, num_workers=workers, collate_fn=list):
        labels = np.array([row["label"] for row in features])
        seen |= set(labels // count)
        table, numbers = first.rows.of(labels)
        for row, number in zip(features, numbers, strict=True):
            masked = [corpus.texts_at([d])[0] if d >= 0 else "" for d in table.negatives[number]]
            assert [row["negative_1"], row["negative_2"]] == masked
            own = made[row["label"] // count].rows
            assert (own.negatives[number] == table.negatives[number]).all()
            assert own.positive[number] == table.positive[number] == first.rows.positive[number]
    assert seen == {0, 1, 2}
    assert (made[0].rows.negatives != made[1].rows.negatives).any()


def test_a_batch_of_two_tables_is_refused_and_so_is_a_table_of_other_rows(refreshed):
    made, exchange, _ = refreshed
    rows, count = made[0].rows, len(made[0].rows)
    table, numbers = rows.of(np.array([count + 3, -1, count + 1]))
    assert numbers.tolist() == [3, -1, 1] and (table.negatives == made[1].rows.negatives).all()
    assert rows.of(np.array([3, -1])) [0] is rows  # fmt: skip
    with pytest.raises(ValueError, match=r"rows of different tables of negatives: \[0, 2\]"):
        rows.of(np.array([1, 2 * count]))
    with pytest.raises(FileNotFoundError, match="table-00000007"):
        rows.of(np.array([7 * count]))
    exchange.drop([1])
    assert exchange.tables() == [2]
    short = TrainingRows(rows.query[:2], rows.positive[:2], rows.relevance, rows.negatives[:2])
    with pytest.raises(ValueError, match="negatives must have shape"):
        rows.with_mined(short.negatives, rows.query_negatives)


def test_what_a_crash_cut_short_is_no_switch_and_is_written_over(tmp_path):
    journal = Journal(tmp_path / "journal")
    for switch in (Switch(4, 2, 1.5, 0.0), Switch(9, 6, 2.0, 0.5)):
        journal.add(switch)
    assert [Journal(journal.path).step_at(batch) for batch in (0, 3, 4, 8, 9, 90)] == [0, 0, 2, 2, 6, 6]
    whole = journal.path.read_bytes()
    with open(journal.path, "ab") as out:
        out.write(b'{"batch": 12, "st')
    again = Journal(journal.path)
    assert again.switches == journal.switches
    again.add(Switch(11, 8))
    assert journal.path.read_bytes().startswith(whole) and Journal(journal.path).last == Switch(11, 8)
    journal.path.write_bytes(b"{}\n" + whole)
    with pytest.raises(ValueError, match=r"is damaged: line 1 is no switch"):
        Journal(journal.path)


def test_staleness_is_the_age_of_the_weights_in_steps(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.add(Switch(6, 2, 1.0, 0.25))  # the fourth step, of two batches each
    journal.add(Switch(10, 4, 2.0, 0.5))
    expected = {
        "refreshes": 2, "staleness": (0 + 1 + 2 + 1 + 2 + 1) / 6, "longest_staleness": 2,
        "beside_seconds": 3.0, "waited_seconds": 0.75,
    }  # fmt: skip
    assert journal.report(6, 2) == expected
    journal.add(Switch(12, 6, measured={"nDCG@10": 0.5}))  # without validation topics there are none
    report = Journal(journal.path).report(6, 2)
    assert report.pop("measured_beside") == [{"step": 6, "nDCG@10": 0.5}]
    assert report == {**expected, "refreshes": 3}


def test_after_an_interruption_only_what_belongs_to_the_trained_steps_is_used(tmp_path, monkeypatch):
    """And what is journalled stays so: tables that were published meanwhile change no batch that was made."""
    folder = tmp_path / "rounds" / "01"
    round_ = Round(negatives=recipes.current_model, refresh_every=10, batch_size=8)
    span = Span(
        schedule_seed=1, first_step=0, steps=100, total_steps=100, first_batch=0, batches=100, total_batches=100,
        per_pass=10, stream_seed=1, stream_batch=0, carried_on=False,
    )  # fmt: skip
    model = DualEncoder.static(["a few words"] * 3, dim=4, vocab_size=30, seed=1).model
    rows = TrainingRows(np.arange(3), np.arange(3), np.eye(3, dtype=bool), np.array([[1], [2], [0]]))
    exchange = Exchange(folder / "refresh")
    exchange.folder.mkdir(parents=True)
    journal = Journal(folder / "refreshes.jsonl")
    for step in (10, 20, 30, 40):
        exchange.publish(step, rows, {"seconds": 1.0})
    for step in (30, 50):
        exchange.hand_over(step, model)
    journal.add(Switch(14, 10))
    journal.add(Switch(44, 40))
    started = []
    monkeypatch.setattr(beside, "_started", lambda *args: started.append(args) or type("P", (), {"poll": _none})())
    monkeypatch.setattr(beside, "end", lambda process: None)
    refreshes = beside.Refreshes(folder, round_, span, Processes(on_cpu=True))
    refreshes.work = None
    with refreshes.beside(25):
        # of the tables after step 25 the journal names that of step 40; weights after it were of another training
        assert exchange.tables() == [10, 20, 40] and exchange.weights() == []
        assert [refreshes.version(batch) for batch in (5, 25, 30, 43, 44)] == [0, 1, 1, 1, 4]
        refreshes.after_step(30, model)  # the journal does not need it
        assert exchange.weights() == []
        refreshes.after_step(50, model)
        refreshes.after_step(60, model)  # the newest is enough
        assert exchange.weights() == [60]
        assert refreshes.version(61) == 4
        exchange.publish(60, rows, {"seconds": 1.0})
        assert refreshes.version(62) == 6
    assert len(started) == 1 and Journal(journal.path).last == Switch(62, 60, 1.0, refreshes.journal.last.waited)


def _none(*args):
    return None
