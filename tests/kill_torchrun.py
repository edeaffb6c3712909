r"""Kill one of two processes that train together, at random moments, and see that the job comes to the same end.

Two processes make the calls of ``torchrun_fit.py``, as ``torchrun`` starts them, but without it, since it would end the
one when the other dies: MNRL, ANCE, DANCE and Margin-MSE with a static tower, and all of them with a small BERT. At a
random moment one of the two, drawn at random, is killed with SIGKILL. The other one has to end by itself, with one
sentence. The same job is started again on the same folders until it is done. Then the weights, negatives and indexes of
all rounds must have the bytes of an undisturbed job's, both processes must have found the same history, and nothing may
be left over.

    python tests/kill_torchrun.py --kills 6 --seed 1 --fits mnrl dance margin_mse \
        --out experiments/results/kill-torchrun.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import kill_driver

# before torch is imported, and for the processes
os.environ.update({**kill_driver.SURROUNDINGS, "HF_HUB_OFFLINE": "1"})

import torchrun_fit
from pt_dance import DualEncoder
from small_collection import standard_library
from small_models import small_bert

HANGS_AFTER = 900  # seconds
REPORT = "nanobind: leaked"  # how newer versions of torch begin to tell at their end what is left of their bindings
SENTENCE = "one of the 2 processes of the job ended early"
FITS = ("mnrl", "ance", "dance", "margin_mse", "bert", "bert_rounds")
COMPARED = {".safetensors", ".parquet", ".f4", ".npids"}


def last_line(errors: str) -> str:
    """Return what a process said last, but for the report of torch's bindings."""
    return errors.partition(REPORT)[0].splitlines()[-1]


def make_given(folder: Path) -> None:
    """Write what is fitted on: training pairs for a few batches, their candidates, encoders."""
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


def told(given: Path, out: Path, fits: Sequence[str], **options: Any) -> dict[str, Any]:
    """Return what the processes of a job are told."""
    out.mkdir(parents=True, exist_ok=True)
    return {"given": str(given), "out": str(out), "fits": list(fits), **options}


def start(job: dict[str, Any]) -> list[multiprocessing.Process]:
    """Start the two processes of a job without a launcher, from one that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchrun_fit"])
    port = str(free_port())
    children = [context.Process(target=torchrun_fit.be_process, args=(job, rank, port)) for rank in range(2)]
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}):
        for child in children:
            child.start()
    return children


def ends(children: Sequence[multiprocessing.Process], job: dict[str, Any]) -> list[tuple[str, int]]:
    """Wait for processes; return their errors and exit statuses. None of them is left."""
    try:
        for child in children:
            child.join(HANGS_AFTER)
        files = [Path(job["out"]) / f"errors {rank}.txt" for rank in range(len(children))]
        return [(file.read_text(), child.exitcode) for file, child in zip(files, children, strict=True)]
    finally:
        for child in children:
            child.kill()
            child.join()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def found(out: Path) -> list[dict | None]:
    """Return what each process of a job wrote of its fits; None where it did not come to its end."""
    files = [out / f"process {rank}.json" for rank in range(2)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


def content(path: Path) -> dict[str, str]:
    """Return the files of a run, with digests of those that two runs have alike."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() if file.suffix in COMPARED else ""
        for file in path.rglob("*")
        if file.is_file()
    }


class Trial:
    """A job in a folder of its own."""

    def __init__(self, given: Path, out: Path, fits: Sequence[str]):
        self.given, self.out, self.fits = given, out, fits

    def run(self, rank: int | None, moment: float = 0.0) -> tuple[str, str] | None:
        """Start the job and kill one of its processes; return in which fit and at what, None where it was done.

        Args:
            rank: Which process is killed; None lets the job end.
            moment: When, in seconds.
        """
        job = told(self.given, self.out, self.fits)
        children = start(job)
        where = None
        try:
            until = time.monotonic() + moment
            while rank is not None and children[rank].is_alive():
                if time.monotonic() >= until:
                    where = self.where()
                    children[rank].kill()
                    break
                time.sleep(0.02)
        finally:
            ended = ends(children, job)
        if where is None or ended[rank][1] == 0:
            assert [status for _, status in ended] == [0, 0], ended
            return None
        errors, status = ended[1 - rank]
        if status == 0:  # it was done
            assert found(self.out)[1 - rank] is not None
            assert all((self.out / name / "pt_meta.json").exists() for name in self.fits)
        else:
            assert status == 1 and last_line(errors).startswith(SENTENCE), errors
        return where

    def where(self) -> tuple[str, str]:
        """Return the fit that is at work, and what it does, as its folder tells."""
        begun = [name for name in self.fits if (self.out / name).exists()]
        if not begun:
            return "none yet", "before the first fit"
        folders = sorted((self.out / begun[-1]).glob("rounds/[0-9][0-9]"))
        if (self.out / begun[-1] / "pt_meta.json").exists():
            stage = "between two fits"
        elif not folders or not (folders[-1] / "checkpoints").exists():
            stage = "indexing, mining or measuring"
        else:
            stage = "training"
        return begun[-1], stage

    def check(self, expected: Trial) -> None:
        """Raise where the job has not the outcome of another one."""
        first, other = found(self.out)
        assert first == other == found(expected.out)[0]
        for name in self.fits:
            assert content(self.out / name) == content(expected.out / name), name


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Kill as the options say and return the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10, help="how many SIGKILLs at random moments")
    parser.add_argument("--seed", type=int, default=1, help="fixes the moments and the processes")
    parser.add_argument("--fits", nargs="+", choices=FITS, default=FITS, help="what a job fits, one after the other")
    parser.add_argument("--out", type=Path, default=None, help="file for the summary as JSON")
    options = parser.parse_args(arguments)
    begin, rng = time.perf_counter(), random.Random(options.seed)
    ranks, fits, stages, jobs = Counter(), Counter(), Counter(), 0
    with tempfile.TemporaryDirectory() as name:
        given = Path(name)
        make_given(given)
        undisturbed = Trial(given, given / "undisturbed", options.fits)
        started = time.perf_counter()
        undisturbed.run(None)
        seconds = time.perf_counter() - started
        while ranks.total() < options.kills:
            trial = Trial(given, given / f"job {jobs}", options.fits)
            jobs += 1
            started, killed = time.perf_counter(), False
            while True:
                rank = rng.randrange(2) if ranks.total() < options.kills else None
                if (where := trial.run(rank, rng.uniform(0, seconds))) is None:
                    break
                killed = True
                ranks[f"process {rank}"] += 1
                fits[where[0]] += 1
                stages[where[1]] += 1
            if not killed:  # moments lie in what a job takes, which depends on what else the machine does
                seconds = min(seconds, time.perf_counter() - started)
            trial.check(undisturbed)
    summary = {
        "processes": 2,
        "encoder": ", ".join(sorted({"small BERT" if name.startswith("bert") else "static" for name in options.fits})),
        "seed": options.seed,
        "fits of a job": list(options.fits),
        "finished": jobs,
        "kills": dict(sorted(ranks.items())),
        "killed in": dict(sorted(fits.items())),
        "killed while": dict(sorted(stages.items())),
        "seconds": round(time.perf_counter() - begin, 1),
        "result": "every job came to its end with the bytes of an undisturbed one, and nothing is left over",
    }
    if options.out is not None:
        options.out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
