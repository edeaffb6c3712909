"""``fit`` in two processes: it gives what one process gives, one writes and the other waits, a dead one ends it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler

import torchrun_fit
from pt_dance import Corpus, DanceRetriever, DualEncoder
from pt_dance.losses.rows import TrainingRows
from pt_dance.training.batches import RoundBatches
from pt_dance.training.examples import Examples
from pt_dance.training.schedule import Span
from small_collection import standard_library
from small_models import small_bert

pytestmark = pytest.mark.timeout(400)  # each process imports everything anew, on machines that may be busy
HANGS_AFTER = 300
SCRIPT = str(Path(__file__).with_name("torchrun_fit.py"))
SURROUNDINGS = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"), "HF_HUB_OFFLINE": "1"}
WHOLE = ("mnrl", "ance", "dance", "margin_mse", "bert", "cached")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with what is fitted on: training pairs for a few batches, their candidates, encoders."""
    folder = tmp_path_factory.mktemp("given")
    small = standard_library()
    topics = small.topics.head(70)
    train, dev = topics[topics.index % 4 != 0], topics[topics.index % 4 == 0]
    docnos = small.documents["docno"].tolist()
    position = {docno: number for number, docno in enumerate(docnos)}
    candidates = train.merge(small.qrels, on="qid")[["qid", "query", "docno"]]
    candidates = candidates.loc[candidates.index.repeat(10)].reset_index(drop=True)
    step = candidates.groupby("qid").cumcount()
    places = candidates["docno"].map(position) + step
    candidates = candidates.assign(
        docno=[docnos[p % len(docnos)] for p in places], rank=step, score=-step.astype(float)
    )
    frames = (small.documents, candidates.drop_duplicates(["qid", "docno"]), dev, small.qrels)
    for name, frame in zip(torchrun_fit.FRAMES, frames, strict=True):
        frame.to_parquet(folder / f"{name}.parquet", index=False)
    texts = small.documents["text"].tolist()
    DualEncoder.static(texts, dim=32, vocab_size=1000, seed=1).save(folder / "static")
    DualEncoder(small_bert(texts, folder, dropout=0.0), device="cpu", max_length=32).save(folder / "transformer")
    return folder


def launched(given, out, fits, **options):
    """Run a job of two processes by torchrun; return its exit status, its errors, and what each process found."""
    job = json.dumps({"given": str(given), "out": str(out), "fits": list(fits), **options})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", str(free_port())]
    out.mkdir(parents=True, exist_ok=True)
    child = subprocess.Popen(
        [*command, SCRIPT, job], env=SURROUNDINGS, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    errors = end_of(child)
    files = [out / f"process {rank}.json" for rank in range(2)]
    return child.returncode, errors, [json.loads(f.read_text()) if f.exists() else None for f in files]


def started(given, out, fits, **options):
    """Start the same two processes without a launcher that would end the one when the other died; return errors."""
    job = json.dumps({"given": str(given), "out": str(out), "fits": list(fits), **options})
    out.mkdir(parents=True, exist_ok=True)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    children = [
        subprocess.Popen(
            [sys.executable, SCRIPT, job], env={**SURROUNDINGS, **where, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )
        for rank in "01"
    ]  # fmt: skip
    return [(end_of(child), child.returncode) for child in children]


def end_of(child):
    try:
        return child.communicate(timeout=HANGS_AFTER)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def both(given, tmp_path_factory):
    """The folders of the same fits in two processes and in one, and what each of the two found."""
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    status, errors, found = launched(given, two, (*WHOLE, "beside"))
    assert status == 0, errors
    corpus = Corpus.build(torchrun_fit.pd.read_parquet(given / "documents.parquet"), one / "corpus", verbose=False)
    sizes = {name: set() for name in WHOLE}
    whole = RoundBatches._whole
    for name in WHOLE:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RoundBatches, "_whole", lambda b, n=name: (sizes[n].add(len(x)) or x for x in whole(b)))
            torchrun_fit.fit(name, one / name, given, corpus)
    assert all(len(found) == 2 for found in sizes.values()), sizes  # each pass ends with a smaller batch
    return two, one, found


def weights(path, number):
    encoder = DualEncoder.load(path / "rounds" / f"{number:02d}" / "encoder", device="cpu")
    return encoder.model.state_dict()


@pytest.mark.parametrize("name", WHOLE)
def test_two_processes_train_as_one_does_on_the_same_batches(both, name):
    two, one, found = both
    assert found[0][name] == found[1][name]
    theirs, ours = (DanceRetriever.load(path / name, measure="nDCG@10") for path in (two, one))
    last = len(torchrun_fit.RECIPES[name])
    assert ours.history["steps"].sum() >= (20 if name in ("mnrl", "bert") else 8)
    for number in range(1, last + 1):
        mine = weights(one / name, number)
        for parameter, tensor in weights(two / name, number).items():
            if parameter.endswith("key.bias"):  # changes no attention, so its gradient is nothing but rounding
                continue
            difference = (tensor - mine[parameter]).abs().max().item()
            assert difference < 1e-5, (number, parameter, difference)
    for column in ("training_loss", "nDCG@10", "steps"):
        values = [history[column].to_numpy(float) for history in (theirs.history, ours.history)]
        assert values[0] == pytest.approx(values[1], abs=1e-5, nan_ok=True)
    moved = weights(one / name, last)
    start = weights(one / name, 0)
    assert max((moved[p] - start[p]).abs().max().item() for p in moved) > 1e-3


def test_two_processes_have_one_table_of_refreshed_negatives_at_a_time(both, given):
    """Which table each batch had is told by the first process, and one process that replays it has the same weights."""
    two, one, found = both
    assert found[0]["beside"] == found[1]["beside"]
    assert found[0]["beside"]["history"][-1]["refreshes"] >= 1
    assert not (two / "beside" / "rounds" / "01" / "refresh").exists()
    options = dict(refresh="replay", replay_of=two / "beside")
    torchrun_fit.fit("beside", one / "beside", given, Corpus(one / "corpus"), **options)
    journals = [(path / "beside" / "rounds" / "01" / "refreshes.jsonl").read_text() for path in (one, two)]
    steps = [[(line["batch"], line["step"]) for line in map(json.loads, text.splitlines())] for text in journals]
    assert steps[0] == steps[1] != []
    mine = weights(one / "beside", 1)
    for parameter, tensor in weights(two / "beside", 1).items():
        assert (tensor - mine[parameter]).abs().max().item() < 1e-5


def test_each_process_has_its_part_of_every_batch_also_after_an_interruption():
    """What accelerate deals out, and goes on with after a checkpoint, adds up to the batches of one process."""
    span = Span(
        schedule_seed=1, first_step=0, steps=30, total_steps=30, first_batch=0, batches=30, total_batches=30,
        per_pass=10, stream_seed=1, stream_batch=0, carried_on=False,
    )  # fmt: skip
    rows = TrainingRows(np.tile(np.arange(77), 3), np.tile(np.arange(77), 3), np.eye(77, dtype=bool))
    examples = Examples(None, rows, 77, 3)
    expected = list(RoundBatches(examples, span, 8, False))
    assert len(expected) == 30 and sorted(chain.from_iterable(expected)) == list(range(231))

    def dealt(processes, skipped):
        batches = []
        for process in range(processes):
            whole = RoundBatches(examples, span, 8, False, processes)
            shard = BatchSamplerShard(whole, processes, process, even_batches=False)
            assert len(shard) == 30
            batches.append(list(SkipBatchSampler(shard, skipped)))
        assert all(len({len(part) for part in parts}) == 1 for parts in zip(*batches, strict=True))
        return [list(chain.from_iterable(parts)) for parts in zip(*batches, strict=True)]

    for processes in (2, 3):
        for skipped in (0, 13, 29):
            found = dealt(processes, skipped)
            assert [[row for row in batch if row >= 0] for batch in found] == expected[skipped:]
            assert all(batch.count(-1) < processes for batch in found)


def test_a_killed_process_ends_the_job_and_the_next_call_gives_the_same_weights(given, both, tmp_path):
    """One dies in a step after a checkpoint, then one that waits; a call with another number of them is refused."""
    path = tmp_path / "dance"
    ended = started(given, tmp_path, ["dance"], dying=1, step=6)
    assert ended[1][1] == -signal.SIGKILL and ended[0][1] == 1
    assert_ended(ended[0][0])
    assert any(path.glob("rounds/01/checkpoints/checkpoint-4")) and not (path / "pt_meta.json").exists()
    last = len(torchrun_fit.RECIPES["dance"])
    ended = started(given, tmp_path, ["dance"], dying=1, round=last)
    assert ended[1][1] == -signal.SIGKILL and ended[0][1] == 1
    assert_ended(ended[0][0])
    assert (path / "rounds" / f"{last:02d}" / "round.json").exists() and not (path / "pt_meta.json").exists()
    corpus = Corpus(tmp_path / "corpus")
    with pytest.raises(ValueError, match=r"other settings \(processes was 2, is 1\)"):
        torchrun_fit.fit("dance", path, given, corpus)
    status, errors, found = launched(given, tmp_path, ["dance"])
    assert status == 0, errors
    assert found[0] == found[1] == {"dance": both[2][0]["dance"]}  # the losses and fingerprints of all rounds
    for number in range(1, last + 1):
        whole = weights(both[0] / "dance", number)
        assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(path, number).items())


def assert_ended(errors):
    assert "RuntimeError" not in errors.splitlines()[-1]  # sys.exit's sentence
    assert errors.splitlines()[-1].startswith("one of the 2 processes of the job ended early")


def test_what_is_wrong_in_one_process_is_said_in_both(given, tmp_path):
    status, _, found = launched(given, tmp_path, ["failing", "mnrl"], differing="mnrl", may_fail=True)
    assert status == 0
    first, other = found
    assert first["failing"] == {"error": "ProgramError", "message": "no such model"}
    assert other["failing"]["message"].startswith("the first of the 2 processes of the job failed")
    assert not (tmp_path / "failing" / "pt_meta.json").exists()
    for result, names in ((first, ""), (other, " (seed)")):
        assert result["mnrl"]["error"] == "ValueError"
        assert f"call fit with different settings or data{names};" in result["mnrl"]["message"]
    assert not (tmp_path / "mnrl").exists()
