"""Kill a fit whose negatives are refreshed beside its training, or its refresher, and see that it comes to a good end.

A child process fits with ``refresh="beside"``. At a random moment it, or the refresher that it started, is killed with
SIGKILL, and the fit is started again on the same folder until it is done. Then nothing may be left over, of files or
processes; every row that was trained on had the texts and the masks of one table; the journal's replay in another
folder must give the same weights to the bit; and nDCG@10 on the training topics must be within --noise of an
undisturbed fit's. What depends on how fast both processes were, the journal, is the only thing that may differ.

    python tests/kill_refresh.py --kills 10 --seed 1 --out experiments/results/kill-refresh-static.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import kill_driver

os.environ.update(kill_driver.ONE_THREAD)  # before torch is imported: the children have one thread, too

import pandas as pd
import psutil
from ir_measures import nDCG

from pt_dance import Corpus, DanceRetriever, DualEncoder, Round, recipes
from pt_dance.losses.base import RetrievalLoss
from pt_dance.training import trainer
from small_collection import standard_library

HANGS_AFTER = 900  # seconds; a fit needs some twenty on a quiet machine
FRAMES = ("topics", "qrels")
MEASURED = {"step", "nDCG@10", "d→q nDCG@10"}
FILES = {"encoder", "index", "negatives.parquet", "refreshes.jsonl", "round.json", "trained.json"}


def make_collection(folder: Path, topics: int) -> list[str]:
    """Write what is fitted on, and return the texts of its documents."""
    small = standard_library()
    Corpus.build(small.documents, folder / "corpus", verbose=False)
    for name, frame in zip(FRAMES, (small.topics.head(topics), small.qrels), strict=True):
        frame.to_parquet(folder / f"{name}.parquet", index=False)
    return small.documents["text"].tolist()


def make_recipe(steps: int) -> list[Round]:
    return recipes.ance(
        1, warm_up=0, loss="contrastive", steps=steps, refresh_every=6, max_staleness=12, batch_size=8,
        checkpoint_steps=7, depth=20, negatives_per_query=4,
    )  # fmt: skip


def fit(
    given: Path, path: Path, steps: int, *, encoder: str = "encoder", validated: bool = False, **options: Any
) -> DanceRetriever:
    """Fit on what is in the folder ``given``, and measure that on the same topics if asked."""
    topics, qrels = (pd.read_parquet(given / f"{name}.parquet") for name in FRAMES)
    began, corpus = DualEncoder.load(given / encoder, device="cpu"), Corpus(given / "corpus")
    options = dict(refresh="beside", recipe=make_recipe(steps), seed=7, verbose=False) | options
    frames = (topics, qrels) * (1 + validated)
    return DanceRetriever(began, corpus, path, **options).fit(*frames)


@contextlib.contextmanager
def rows_seen(corpus: Corpus) -> Iterator[Counter]:
    """Count the rows whose texts and whose masks come from one table ("whole") and from two ("mixed").

    The text of a row's negative, when its batch is made, is compared with that of the document that the loss masks by,
    when the batch is trained on.
    """
    counts, texts = Counter(), {}
    collator, batch_of = trainer.SentenceTransformerDataCollator, RetrievalLoss._batch

    class Remembers(collator):
        def __call__(self, features):
            texts.update({row["label"]: row["negative_1"] for row in features})
            return super().__call__(features)

    def compare(self, columns, labels):
        batch = batch_of(self, columns, labels)
        documents = batch.rows.rows.negatives[batch.rows.numbers, 0]
        for label, document in zip(labels.tolist(), documents.tolist(), strict=True):
            masked = "" if document < 0 else corpus.texts_at([document])[0]
            if label in texts:  # else it is the question whether there is anything to learn from
                counts["whole" if texts[label] == masked else "mixed"] += 1
        return batch

    trainer.SentenceTransformerDataCollator, RetrievalLoss._batch = Remembers, compare
    try:
        yield counts
    finally:
        trainer.SentenceTransformerDataCollator, RetrievalLoss._batch = collator, batch_of


def child(given: str, path: str, steps: int) -> None:
    """What is killed; it adds what it saw of the rows to a file when it ends by itself."""
    with rows_seen(Corpus(Path(given) / "corpus")) as counts:
        print("ready", flush=True)
        try:
            fit(Path(given), Path(path), steps, validated=True)
        except RuntimeError as error:
            sys.exit(str(error))
        finally:
            with open(f"{path}.rows", "a") as out:
                print(json.dumps(counts), file=out)


def refreshers(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return [other for other in process.children() if any("refresher" in part for part in other.cmdline())]
    return []


class Trial:
    """A fit in a folder of its own, killed until it is done."""

    def __init__(self, given: Path, path: Path, steps: int, seconds: float):
        self.given, self.path, self.steps, self.seconds = given, path, steps, seconds

    def killed(self, target: str | None, rng: random.Random) -> str | None:
        """Start the fit and kill it, or its refresher, at a random moment; return where it stood, None when done."""
        job = json.dumps([str(self.given), str(self.path), self.steps])
        command = [sys.executable, str(Path(__file__).resolve()), "--child", job]
        surroundings = {**os.environ, **kill_driver.SURROUNDINGS}
        started = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings, start_new_session=True
        )
        process, deadline, stage = psutil.Process(started.pid), time.monotonic() + HANGS_AFTER, None
        try:
            assert started.stdout.readline() == "ready\n", started.communicate()[1]
            begin = time.monotonic()
            moment = begin + rng.uniform(0, self.seconds)
            while started.poll() is None and target is not None:
                assert time.monotonic() < deadline, "a fit hangs"
                beside = refreshers(process)
                if time.monotonic() >= moment and (target == "trainer" or beside):
                    stage = self.stage(bool(beside))
                    with contextlib.suppress(psutil.Error, ProcessLookupError):
                        (beside[0] if target == "refresher" else process).kill()
                    psutil.wait_procs(beside, timeout=60)
                    break
                time.sleep(0.05)
            errors = started.communicate(timeout=HANGS_AFTER)[1]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
        assert not any(other.is_running() and other.status() != psutil.STATUS_ZOMBIE for other in self.left())
        last = errors.strip().splitlines()[-1] if errors.strip() else ""
        if stage is None:
            assert started.returncode == 0, errors
        elif target == "refresher" and started.returncode:
            assert last.startswith("the refresher beside round 1 failed: it was ended by signal 9 (see "), errors
        return stage

    def left(self) -> list[psutil.Process]:
        """Return refreshers of this trial that are still there."""
        return [
            other for other in psutil.process_iter(["cmdline"])
            if any(str(self.path) in part for part in other.info["cmdline"] or []) and "-m" in other.info["cmdline"]
        ]  # fmt: skip

    def stage(self, beside: bool) -> str:
        """Say where the fit stands."""
        folder = self.path / "rounds" / "01"
        if (folder / "trained.json").exists():
            return "after training"
        if not beside:
            return "before training"
        journal = folder / "refreshes.jsonl"
        return "training on refreshed negatives" if journal.exists() else "training on the first negatives"

    def check_finished(self) -> DanceRetriever:
        """Raise where the fit did not come to its end, or something is left over; return what was fitted."""
        folder = self.path / "rounds" / "01"
        assert {entry.name for entry in folder.iterdir()} == FILES, sorted(folder.iterdir())
        dance = DanceRetriever.load(self.path)
        row = dance.history.iloc[-1]
        assert row["refreshes"] >= 1 and row["steps"] == self.steps
        assert [set(measured) for measured in row["measured_beside"]] == [MEASURED] * int(row["refreshes"])
        return dance

    def check_outcome(self, expected: float, noise: float) -> None:
        """Raise where the finished fit learnt less than an undisturbed one, or its replay gives other weights."""
        dance = self.check_finished()
        assert abs(quality(self.given, dance) - expected) <= noise
        with rows_seen(Corpus(self.given / "corpus")) as counts:
            options = dict(refresh="replay", replay_of=self.path, validated=True)
            again = fit(self.given, self.path.with_name(f"{self.path.name} again"), self.steps, **options)
        assert again.encoder.fingerprint == dance.encoder.fingerprint
        assert again.history.iloc[-1]["measured_beside"] == dance.history.iloc[-1]["measured_beside"]
        assert counts["mixed"] == 0 < counts["whole"]

    def rows(self) -> Counter:
        """Return what processes that ended by themselves saw."""
        lines = Path(f"{self.path}.rows").read_text().splitlines()
        return sum((Counter(json.loads(line)) for line in lines), Counter())


def quality(given: Path, dance: DanceRetriever) -> float:
    """Return nDCG@10 on the training topics, which shows whether anything was learnt."""
    topics, qrels = (pd.read_parquet(given / f"{name}.parquet") for name in FRAMES)
    qrels = qrels[qrels["qid"].isin(topics["qid"])]
    dance.corpus = Corpus(given / "corpus")
    return float((nDCG @ 10).calc_aggregate(_runs(qrels, "label"), _runs(dance(topics), "score")))


def _runs(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    names = {"qid": "query_id", "docno": "doc_id", "label": "relevance"}
    return frame[["qid", "docno", column]].rename(columns=names)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Kill as the options say and return the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10, help="how many SIGKILLs at random moments")
    parser.add_argument("--seed", type=int, default=1, help="fixes the moments")
    parser.add_argument("--topics", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--noise", type=float, default=0.05, help="how far nDCG@10 may be from an undisturbed fit's")
    parser.add_argument("--out", type=Path, default=None, help="file for the summary as JSON")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        child(*json.loads(options.child))
        return {}
    begin = time.perf_counter()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        given = Path(name)
        DualEncoder.static(make_collection(given, options.topics), dim=32, vocab_size=1000, seed=1).save(
            given / "encoder"
        )
        started = time.perf_counter()
        expected = quality(given, fit(given, given / "undisturbed", options.steps))
        seconds = time.perf_counter() - started
        kills, stages, fits, rows = Counter(), Counter(), 0, Counter()
        while kills.total() < options.kills:
            trial = Trial(given, given / f"fit {fits}", options.steps, seconds)
            fits += 1
            while True:
                target = rng.choice(["trainer", "refresher"]) if kills.total() < options.kills else None
                if (stage := trial.killed(target, rng)) is None:
                    break
                kills[target] += 1
                stages[stage] += 1
            trial.check_outcome(expected, options.noise)
            rows += trial.rows()
    summary = {
        "encoder": "static",
        "seed": options.seed,
        "fits": fits,
        "kills": dict(sorted(kills.items())),
        "killed while": dict(sorted(stages.items())),
        "rows with one table": rows["whole"],
        "rows with two": rows["mixed"],
        "nDCG@10 undisturbed": round(expected, 4),
        "seconds": round(time.perf_counter() - begin, 1),
        "result": "every fit came to its end within the noise, its replay has the same weights, nothing is left over",
    }
    assert summary["rows with two"] == 0 < summary["rows with one table"]
    if options.out is not None:
        options.out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


if __name__ == "__main__":
    if summary := main():
        print(json.dumps(summary, indent=1))
