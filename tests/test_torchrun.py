"""``fit`` in two processes: it gives what one process gives, one writes and the other waits, a dead one ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler

import kill_driver
import kill_torchrun
import torchrun_fit
from forked import forked_refreshers
from pt_dance import Corpus, DanceRetriever, DualEncoder
from pt_dance.losses.rows import TrainingRows
from pt_dance.training.batches import RoundBatches
from pt_dance.training.examples import Examples
from pt_dance.training.schedule import Span

pytestmark = pytest.mark.timeout(1500)  # each process imports everything anew, on machines that may be busy
WHOLE = ("mnrl", "dance", "margin_mse", "bert", "bert_rounds", "cached")  # dance begins with the rounds of ance
PARTS = {"PartWriter", "PipelineSearch", "VectorSearch", "Asking", "RangeSearch"}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    kill_torchrun.make_given(folder)
    return folder


class Killed(NamedTuple):
    """A job of which one process was killed.

    The errors and the status of the first one, what it found, the names of the files that were left, and what a fit
    without a launcher says of them.
    """

    errors: str
    status: int
    found: dict
    left: set
    refused: str


class Jobs(NamedTuple):
    """The folders of the same fits in two processes and in one, what each of the two found, and what was killed."""

    two: Path
    one: Path
    found: list
    killed: list


def launched(job):
    """Start a job by torchrun; return the errors of all its processes, of which none is left, and its status."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port"]
    command += [str(kill_torchrun.free_port()), torchrun_fit.__file__, json.dumps(job)]
    surroundings = {**os.environ, **kill_driver.SURROUNDINGS, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=surroundings, stderr=subprocess.PIPE, text=True) as child:
        try:
            errors = child.communicate(timeout=kill_torchrun.HANGS_AFTER)[1]
        finally:
            child.terminate()  # it takes its processes with it
    return errors, child.returncode


@pytest.fixture(scope="module")
def jobs(given, tmp_path_factory):
    """All that takes two processes, with as few starts of them as it takes: each imports everything.

    A job that torchrun started is killed in a step after a checkpoint, and torchrun with it; then one that goes on from
    there, without a launcher, while the first process refreshes an index, in which the other has its share. The script
    goes on with another fit each time. Then one job is whole, started by torchrun.
    """
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    killed = []
    for moment in ({"step": 6, "with_launcher": True}, {"round": len(torchrun_fit.RECIPES["killed"])}):
        job = kill_torchrun.told(given, two, ["killed", "again"], dying=1, **moment)
        if "with_launcher" in moment:
            errors, status = launched(job)
        else:
            (errors, status), (_, of_other) = kill_torchrun.ends(kill_torchrun.start(job), job)
            assert of_other == -signal.SIGKILL
        left = {str(file.relative_to(two)) for name in ("killed", "again") for file in two.glob(f"{name}/**/*")}
        with pytest.raises(ValueError) as refused:
            torchrun_fit.fit("killed", two / "killed", given, Corpus(two / "corpus"))
        killed.append(Killed(errors, status, kill_torchrun.found(two)[0], left, str(refused.value)))
    names = (*WHOLE, "killed", "beside", "failing", "refused")
    job = kill_torchrun.told(given, two, names, differing="refused", may_fail=True)
    errors, status = launched(job)
    assert status == 0, errors
    corpus = Corpus.build(torchrun_fit.pd.read_parquet(given / "documents.parquet"), one / "corpus", verbose=False)
    sizes = {name: set() for name in WHOLE}
    whole = RoundBatches._whole
    for name in WHOLE:
        with pytest.MonkeyPatch.context() as patch, torchrun_fit.small_parts():
            patch.setattr(RoundBatches, "_whole", lambda b, n=name: (sizes[n].add(len(x)) or x for x in whole(b)))
            torchrun_fit.fit(name, one / name, given, corpus)
    assert all(len(found) == 2 for found in sizes.values()), sizes  # each pass ends with a smaller batch
    return Jobs(two, one, kill_torchrun.found(two), killed)


def weights(path, number):
    encoder = DualEncoder.load(path / "rounds" / f"{number:02d}" / "encoder", device="cpu")
    return encoder.model.state_dict()


@pytest.mark.parametrize("name", WHOLE)
def test_two_processes_train_as_one_does_on_the_same_batches(jobs, name):
    two, one, found, _ = jobs
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


def test_two_processes_have_one_table_of_refreshed_negatives_at_a_time(jobs, given):
    """Which table each batch had is told by the first process, and one process that replays it has the same weights."""
    two, one, found, _ = jobs
    assert found[0]["beside"] == found[1]["beside"]
    assert found[0]["beside"]["history"][-1]["refreshes"] >= 1
    assert not (two / "beside" / "rounds" / "01" / "refresh").exists()
    options = dict(refresh="replay", replay_of=two / "beside")
    with forked_refreshers():
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
    examples = Examples(None, rows, 77)
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


def test_processes_share_encoding_search_mining_and_teacher(jobs):
    """What the first one makes of it has the bytes of one process, as long as the weights have."""
    did = [json.loads((jobs.two / f"parts {rank}.json").read_text()) for rank in range(2)]
    assert set(did[0]) == set(did[1]) == PARTS
    for part in PARTS:  # one more each time that what is divided has an odd number of parts
        assert 2 * did[1][part] >= did[0][part] >= did[1][part] > 0
    for name in WHOLE:
        theirs, ours = (_first_work(path / name) for path in (jobs.two, jobs.one))
        assert theirs == ours and len(ours) >= 3, name


def _first_work(path):
    made = ("rounds/00/index/", "rounds/01/negatives.parquet")
    return {file: digest for file, digest in kill_torchrun.content(path).items() if file.startswith(made)}


def test_a_killed_process_ends_the_job_and_the_next_call_gives_the_same_weights(given, jobs):
    """One dies in a step after a checkpoint, then one that waits. Nobody waits for it.

    What follows in the other process says so, too, at once, and a call with another number of processes is refused.
    """
    assert [status for _, status, *_ in jobs.killed] == [-signal.SIGKILL, 1]  # torchrun's, and the process's own
    for killed in jobs.killed:
        assert kill_torchrun.last_line(killed.errors).startswith(kill_torchrun.SENTENCE)  # sys.exit's sentence
        for name in ("killed", "again"):
            assert killed.found[name]["error"] == "RuntimeError"
            assert killed.found[name]["message"].startswith(kill_torchrun.SENTENCE)
        assert "with other settings (processes was 2, is 1);" in killed.refused and "\n" not in killed.refused
    last = len(torchrun_fit.RECIPES["killed"])
    first, second = (killed.left for killed in jobs.killed)
    assert any(name.startswith("killed/rounds/01/checkpoints/checkpoint-4") for name in first)
    assert f"killed/rounds/{last:02d}/trained.json" in second
    assert not any(name.startswith("again") for name in first | second) and "killed/pt_meta.json" not in first | second
    path = jobs.two / "killed"
    for process in jobs.found:
        assert process["killed"] == jobs.found[0]["dance"]  # the losses of all rounds
    for number in range(1, last + 1):
        whole = weights(jobs.two / "dance", number)
        assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(path, number).items())


def test_what_is_wrong_in_one_process_is_said_in_both(jobs):
    first, other = jobs.found
    assert first["failing"] == {"error": "ProgramError", "message": "no such model"}
    assert other["failing"]["message"].startswith("the first of the 2 processes of the job failed")
    assert not (jobs.two / "failing" / "pt_meta.json").exists()
    for result, names in ((first, ""), (other, " (seed)")):
        assert result["refused"]["error"] == "ValueError"
        assert f"call fit with different settings or data{names};" in result["refused"]["message"]
    assert not (jobs.two / "refused").exists()
