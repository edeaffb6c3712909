"""Kill what takes part in indexing by Ray, at random moments, and see that nothing is lost and nothing is left.

A child process indexes by two workers. While it does, one process is killed with SIGKILL by its number: a worker, the
child itself, or one of Ray's own (raylet, gcs_server). A job whose worker was killed has to go on; after the others the
same call has to. After every kill what stands under the index's name must be a whole index or nothing, and finished
shards stay; every finished index must have the bytes of one made by one process without interruption; of a program that
is gone, no process and no folder may be left.

    python tests/kill_engines.py --kills 24 --seed 1
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kill_driver

os.environ.update(kill_driver.SURROUNDINGS)  # before torch is imported: the children and workers have one thread, too

import kill_indexing
from pt_dance import Corpus, DenseIndex, DualEncoder
from pt_dance.engines.reaper import processes_of, status_of
from pt_dance.index.files import SHARDS

TARGETS = ("worker", "worker", "program", "raylet", "gcs_server")
PATIENCE = 900  # seconds; on a busy machine, starting takes minutes


def work(path: str, encoder: str, corpus: str, shard: int, engine: Any) -> None:
    """What the child does, again and again."""
    index = DenseIndex(path, kill_indexing.load(encoder), shard_size=shard, verbose=False)
    index.indexer(engine=engine).index(Corpus(corpus))


def be_the_child() -> None:
    """Index what standard input asks for; say where the cluster is, and how it went."""
    from pt_dance import engines

    engine = engines.Ray(workers=2)
    for line in sys.stdin:
        list(engine.map(_imported, range(4), "the imports"))
        print("begin", engine._cluster.folder, flush=True)
        try:
            work(engine=engine, **json.loads(line))
        except RuntimeError as error:
            print("failed", error, flush=True)
        else:
            print("done", flush=True)


def differences(path: Path, expected: dict[str, bytes]) -> list[str]:
    """Return the names of an index's files that are not as they should be, with the first place in each."""
    found = kill_indexing.content(path)
    names = []
    for name in sorted(found.keys() | expected.keys()):
        one, other = found.get(name, b""), expected.get(name, b"")
        if one != other:
            place = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), -1)
            names.append(f"{name} ({len(one)} and {len(other)} bytes, from {place} on)")
    return names


def _imported() -> Any:
    import pt_dance.index.parts  # noqa: F401 (workers take their time for it)

    return abs


class Child:
    """A program that indexes by Ray."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--child"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.folder = ""

    def begin(self, job: dict[str, Any]) -> None:
        """Let it begin a job, with its workers ready."""
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        said = self.process.stdout.readline().split()
        assert said and said[0] == "begin", "a child could not start"
        self.folder = said[1]

    def pid_of(self, target: str, rng: random.Random) -> int | None:
        """Return the number of a process of the cluster, or the child's own."""
        if target == "program":
            return self.process.pid
        names = {pid: status[0] for pid in processes_of(self.folder) if (status := status_of(pid)) is not None}
        prefix = "ray::Worker" if target == "worker" else target
        found = sorted(pid for pid, name in names.items() if name.startswith(prefix))
        return rng.choice(found) if found else None

    def result(self) -> str:
        """Wait until it has done its job, or failed, or is gone."""
        return self.process.stdout.readline().strip() or "gone"

    def check_nothing_left(self) -> None:
        """Check that no process and no folder is left, soon after the program is gone."""
        self.process.wait(PATIENCE)
        until = time.monotonic() + PATIENCE
        while (os.path.exists(self.folder) or list(processes_of(self.folder))) and time.monotonic() < until:
            time.sleep(0.1)
        assert not os.path.exists(self.folder), f"{self.folder} is left"
        assert not list(processes_of(self.folder)), "processes are left"

    def close(self) -> None:
        """Let it end by itself."""
        self.process.stdin.close()
        self.process.stdout.read()
        if self.folder:
            self.check_nothing_left()


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Kill as the options say and return the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1, help="draws the moments and what is killed")
    parser.add_argument("--documents", type=int, default=30_000)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        be_the_child()
        return {}
    rng, begun = random.Random(options.seed), time.perf_counter()
    kills: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    indexes = resumed = 0
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        documents = kill_indexing.make_documents(options.documents, options.seed)
        corpus = Corpus.build(documents, base / "corpus", fields=["text"], verbose=False)
        encoder: DualEncoder = kill_indexing.make_encoder("static", documents[:5000])
        encoder.save(base / "encoder")
        shard = -(-options.documents // 20)
        common = {"encoder": str(base / "encoder"), "corpus": str(corpus.path), "shard": shard}
        # as deep as the others, since an index notes where its encoder is where that is in a folder beside it
        whole = base / "without" / "whole"
        work(str(whole), engine=None, **common)
        expected = kill_indexing.content(whole)
        child, job, done = Child(), {"path": str(base / "index" / "warm"), **common}, 0
        child.begin(job)
        started = time.perf_counter()
        assert child.result() == "done"
        seconds = time.perf_counter() - started
        while sum(kills.values()) < options.kills:
            path = base / "index" / str(indexes)
            child.begin({"path": str(path), **common})
            target, moment = rng.choice(TARGETS), rng.uniform(0, seconds)
            time.sleep(moment)
            if (pid := child.pid_of(target, rng)) is not None:
                os.kill(pid, 9)
                kills[target] += 1
            result = child.result()
            ends[f"{target}: {result.split(',')[0].split(' (')[0]}"] += 1
            if target == "worker":
                assert result == "done", f"after a worker was killed: {result}"
            elif target == "program":
                assert result in ("gone", "done")
                child.check_nothing_left()
                child = Child()
            else:
                assert result in ("done", "gone") or result.startswith("failed Ray's own processes"), result
                if result == "gone":
                    child.check_nothing_left()
                    child = Child()
            if path.exists():
                different = differences(path, expected)
                assert not different, f"after {target} was killed ({result}): {', '.join(different)}"
                assert sorted(os.listdir(path.parent)) == sorted({path.name} | {"warm"} & {*os.listdir(path.parent)})
                shutil.rmtree(path)
                indexes, done = indexes + 1, 0
            else:
                assert result != "done"
                journal = path.parent / f".{path.name}.building" / SHARDS
                now = journal.read_bytes().count(b"\n") if journal.exists() else 0
                assert now >= done, "finished shards were lost"
                resumed, done = resumed + (now > 1), now
        path = base / "index" / str(indexes)
        child.begin({"path": str(path), **common})
        assert child.result() == "done"
        assert not differences(path, expected)
        child.close()
    return {
        "documents": options.documents,
        "shards": 20,
        "workers": 2,
        "seed": options.seed,
        "kills": dict(sorted(kills.items())),
        "ends": dict(sorted(ends.items())),
        "finished": indexes + 1,
        "resumed": resumed,
        "seconds_uninterrupted": round(seconds, 2),
        "seconds": round(time.perf_counter() - begun, 1),
        "result": "every index came out with the bytes of one process, and no process, folder or file was left over",
    }


if __name__ == "__main__":
    summary = main()
    if summary:
        print(json.dumps(summary, indent=1))
