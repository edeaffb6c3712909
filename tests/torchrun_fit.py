"""What each process of a job does in ``test_torchrun.py``: the calls of ``fit`` that a user's script makes.

It is told with what by a JSON object on the command line, and writes what came out of it to a file of its own.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pandas as pd
import pyterrier as pt
from ir_measures import nDCG

from pt_dance import Corpus, DanceRetriever, DenseIndex, DualEncoder, recipes
from pt_dance.engines.worker import Workplace
from pt_dance.mining import mine_documents, mine_queries
from pt_dance.training import teacher
from pt_dance.training.processes import Processes
from pt_dance.training.trainer import RoundTrainer

FRAMES = ("documents", "candidates", "dev", "qrels")


def shared_words(row) -> float:
    """A teacher that needs no model: the share of the query's words that are in the text."""
    words = set(row["query"].lower().split())
    return 8 * len(words & set(row["text"].lower().split())) / len(words)


class ProgramError(Exception):
    """What a negative source of the user's own raises."""


def failing(results):
    raise ProgramError("no such model")


FAST = dict(batch_size=7, learning_rate=1e-3, checkpoint_steps=4)
# Batches of 7 rows, 8 to a pass with the last one smaller: all have to be filled up for two processes.
RECIPES = {
    "mnrl": recipes.mnrl(3, **FAST),
    "ance": recipes.ance(1, **FAST),
    "dance": recipes.dance(1, **FAST),
    "margin_mse": recipes.margin_mse(pt.apply.doc_score(shared_words), **FAST),
    "bert": recipes.mnrl(3, **FAST),
    "bert_rounds": [
        *recipes.dance(1, **FAST),
        *recipes.margin_mse(pt.apply.doc_score(shared_words), negatives=recipes.current_model, **FAST),
    ],
    "cached": recipes.mnrl(1, **FAST, loss_options={"mini_batch_size": 2}),
    "beside": recipes.ance(
        1,
        warm_up=0,
        loss="contrastive",
        steps=24,
        refresh_every=4,
        max_staleness=8,
        depth=20,
        negatives_per_query=4,
        **FAST,
    ),
    "failing": recipes.mnrl(1, negatives=pt.apply.generic(failing), **FAST),
}
RECIPES |= {"killed": RECIPES["dance"], "refused": RECIPES["mnrl"], "again": RECIPES["mnrl"]}


def fit(name: str, path: Path, given: Path, corpus: Corpus, seed: int = 3, **options) -> DanceRetriever:
    """Fit one of the recipes on the frames in the folder ``given``."""
    _, candidates, dev, qrels = (pd.read_parquet(given / f"{frame}.parquet") for frame in FRAMES)
    is_transformer = name in ("bert", "bert_rounds", "cached")
    encoder = DualEncoder.load(given / ("transformer" if is_transformer else "static"), device="cpu")
    options = {"refresh": "beside" if name == "beside" else "between"} | options
    options |= dict(recipe=RECIPES[name], measure=nDCG @ 10, seed=seed, verbose=False)
    return DanceRetriever(encoder, corpus, path, **options).fit(candidates, qrels, dev, qrels)


@contextlib.contextmanager
def small_parts() -> Iterator[Counter]:
    """Divide work into parts that are small enough for this collection; count what this process was given of them."""
    counts: Counter = Counter()
    do = Workplace.do

    def counted(self, *task):
        answer = do(self, *task)
        counts[self._work.__qualname__.split(".")[0]] += 1
        return answer

    sizes = [(mine_documents, "query_block"), (mine_queries, "document_block"), (DenseIndex.__init__, "shard_size")]
    with contextlib.ExitStack() as patches:
        for function, name in sizes:
            patches.enter_context(mock.patch.dict(function.__kwdefaults__, {name: 20}))
        patches.enter_context(mock.patch.object(teacher, "_BLOCK", 20))
        patches.enter_context(mock.patch.object(Workplace, "do", counted))
        yield counts


def outcome(dance: DanceRetriever) -> dict:
    """What two fits are compared by, but for their weights."""
    timed = [name for name in dance.history.columns if name.endswith("_seconds")]
    return {
        "history": json.loads(dance.history.drop(columns=timed).to_json(orient="records", double_precision=15)),
        "best": dance.encoder.fingerprint,
    }


def die(step: int | None, round_: int | None, *, with_launcher: bool) -> None:
    """Be killed in the middle of a step, or while the first process refreshes the index after a round and validates."""

    def killed():
        for process in [os.getppid()] * with_launcher + [os.getpid()]:
            os.kill(process, signal.SIGKILL)

    training_step, from_first = RoundTrainer.training_step, Processes.from_first

    def step_or_die(self, *args, **kwargs):
        if self.state.global_step == step:
            killed()
        return training_step(self, *args, **kwargs)

    def wait_or_die(self, work):
        if getattr(work, "func", work).__name__ == "_finish_round" and work.args[0] == round_:
            killed()
        return from_first(self, work)

    RoundTrainer.training_step, Processes.from_first = step_or_die, wait_or_die


def main(job: dict) -> None:
    gc.freeze()  # half a million objects are imported, among which each round would look for garbage
    rank, given, out = int(os.environ["RANK"]), Path(job["given"]), Path(job["out"])
    corpus = Corpus.build(pd.read_parquet(given / "documents.parquet"), out / "corpus", verbose=False)
    if rank == job.get("dying"):
        die(job.get("step"), job.get("round"), with_launcher=job.get("with_launcher", False))
    found = {}
    with small_parts() as did:
        for name in job["fits"]:
            seed = 4 if name == job.get("differing") and rank == 1 else 3
            try:
                found[name] = outcome(fit(name, out / name, given, corpus, seed))
            except Exception as error:
                found[name] = {"error": type(error).__name__, "message": str(error)}
    (out / f"parts {rank}.json").write_text(json.dumps(did))
    (out / f"process {rank}.json").write_text(json.dumps(found))
    if any("error" in result for result in found.values()) and not job.get("may_fail"):
        sys.exit("; ".join(result["message"] for result in found.values() if "error" in result))


def be_process(job: dict, rank: int, port: str) -> None:
    """Be a process of two that were started without a launcher; errors go to a file."""
    errors = os.open(Path(job["out"]) / f"errors {rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(errors, 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    main(job)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
