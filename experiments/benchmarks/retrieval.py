"""Exact retrieval: time, CPU time and memory beside pyterrier_dr's retrievers, and what an index costs by its size.

Every contender runs in a process of its own, so that its peak memory is its own; they take turns, and medians are
reported. Memory is the largest resident set of all turns, above what the process had with its libraries, the queries
and the whole index in memory already; the result frames are part of it, except for more than 6,000 queries, which are
retrieved block by block.

    python experiments/benchmarks/retrieval.py                          # 50,000 x 384: 500, 6,000 and 100,000 queries
    python experiments/benchmarks/retrieval.py --documents 10000 100000 1000000 --queries 500   # the table of costs
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np

DIMENSION = 384
CONTENDERS = ("pt_dance", "np_retriever", "torch_retriever")
# Beyond this, retrievers that do not cut their queries into blocks would need gigabytes.
MOST_FOR_OTHERS = 6_000
# Seconds before every turn: threads of BLAS wait busily for a while after a product, beside the next contender's turn.
PAUSE = 0.5


def unit_vectors(count: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, DIMENSION), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def records(count: int) -> Iterator[dict]:
    for start in range(0, count, 10_000):
        for number, vector in enumerate(unit_vectors(min(10_000, count - start), start), start):
            yield {"docno": f"doc{number}", "doc_vec": vector}


def memory(field: str) -> float:
    """Return a line of this process's memory status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"this system does not report {field}")


class Measure:
    """Wall time, CPU time and peak memory of what runs inside, above a baseline in MiB (what is in memory if None)."""

    def __init__(self, baseline: float | None = None) -> None:
        self.baseline = baseline

    def __enter__(self) -> Measure:
        # Resets the peak to what is in memory now.
        Path("/proc/self/clear_refs").write_text("5")
        self.memory = memory("VmRSS") if self.baseline is None else self.baseline
        self.cpu, self.wall = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.result = {
            "seconds": time.perf_counter() - self.wall,
            "cpu_seconds": time.process_time() - self.cpu,
            "peak_mib": memory("VmHWM") - self.memory,
        }


# --- what a contender's process does ----------------------------------------------------------------------------------


def build(path: str, count: int) -> None:
    from pt_dance import DenseIndex

    with Measure() as measure:
        DenseIndex(path, verbose=False).index(records(count))
    size = sum(f.stat().st_size for f in Path(path).iterdir())
    # Pages of files do not count: the system gives them back when it needs them.
    print(json.dumps({**measure.result, "bytes": size}), flush=True)


def contend(name: str, path: str, queries: int, k: int, device: str | None) -> None:
    """Answer every line on standard input with one measurement."""
    import pandas as pd
    import torch
    from pyterrier_dr import FlexIndex

    from pt_dance import DenseIndex

    frame = pd.DataFrame({"qid": [str(i) for i in range(queries)], "query_vec": list(unit_vectors(queries, 10**9))})
    if name == "pt_dance":
        index = DenseIndex(path, device=device, verbose=False)
        vectors, retriever = index.open().vectors, index.retriever(k)
    else:
        index = FlexIndex(path, verbose=False)
        vectors = index.payload()[1]
        retriever = getattr(index, name)(num_results=k, drop_query_vec=True)
    for start in range(0, len(vectors), 10_000):
        vectors[start : start + 10_000].sum()
    # Before anything is searched: what a search leaves behind in the allocator is its own, too.
    baseline = memory("VmRSS")
    retriever(frame.head(2))
    print(json.dumps({"threads": torch.get_num_threads()}), flush=True)
    for _ in sys.stdin:
        rows = 0
        with Measure(baseline) as measure:
            if queries > MOST_FOR_OTHERS:
                for block in retriever.iter_blocks(frame):
                    rows += len(block)
            else:
                rows = len(retriever(frame))
        print(json.dumps({**measure.result, "rows": rows}), flush=True)


# --- the referee ------------------------------------------------------------------------------------------------------


def child(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen) -> dict:
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args} ended with {process.wait()}")
    return json.loads(line)


def compare(path: str, documents: int, queries: int, k: int, repeats: int, device: str | None) -> list[dict]:
    names = CONTENDERS if queries <= MOST_FOR_OTHERS else CONTENDERS[:1]
    processes = {name: child("contend", name, path, queries, k, device or "") for name in names}
    for process in processes.values():
        answer(process)
    results: dict[str, list[dict]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            time.sleep(PAUSE)
            processes[name].stdin.write("go\n")
            processes[name].stdin.flush()
            results[name].append(answer(processes[name]))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    rows = []
    for name in names:
        row = {"contender": name, "documents": documents, "queries": queries, "k": k, "rows": results[name][0]["rows"]}
        for key in ("seconds", "cpu_seconds"):
            row[key] = statistics.median(r[key] for r in results[name])
        row["peak_mib"] = max(r["peak_mib"] for r in results[name])
        row["times_np_retriever"] = None
        rows.append(row)
    reference = next((r["seconds"] for r in rows if r["contender"] == "np_retriever"), None)
    for row in rows:
        row["times_np_retriever"] = reference and reference / row["seconds"]
    return rows


def table(rows: list[dict]) -> str:
    lines = [
        "| documents | queries | retriever | seconds | CPU seconds | faster than np_retriever | peak MiB above the "
        "index |",
        "|---:|---:|---|---:|---:|---:|---:|",
    ]
    for r in rows:
        faster = f"{r['times_np_retriever']:.1f}×" if r["times_np_retriever"] else "–"
        lines.append(
            f"| {r['documents']:,} | {r['queries']:,} | {r['contender']} | {r['seconds']:.2f} | {r['cpu_seconds']:.2f} "
            f"| {faster} | {r['peak_mib']:.0f} |"
        )
    return "\n".join(lines)


def indexing_table(builds: list[dict]) -> str:
    lines = ["| documents | indexing seconds | CPU seconds | on disk | peak MiB |", "|---:|---:|---:|---:|---:|"]
    for b in builds:
        lines.append(
            f"| {b['documents']:,} | {b['seconds']:.1f} | {b['cpu_seconds']:.1f} | {b['bytes'] / 1e6:,.0f} MB "
            f"| {b['peak_mib']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        what, *rest = sys.argv[2:]
        if what == "build":
            return build(rest[0], int(rest[1]))
        return contend(rest[0], rest[1], int(rest[2]), int(rest[3]), rest[4] or None)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, nargs="+", default=[50_000])
    parser.add_argument("--queries", type=int, nargs="+", default=[500, 6_000, 100_000])
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="where pt_dance searches, e.g. cuda")
    parser.add_argument("--out", type=Path, default=None, help="where the JSON goes; printed if not given")
    options = parser.parse_args()
    rows, builds = [], []
    base = tempfile.mkdtemp(prefix="retrieval-")
    try:
        for documents in options.documents:
            path = os.path.join(base, str(documents))
            process = child("build", path, documents)
            builds.append({"documents": documents, **answer(process)})
            process.wait()
            for queries in options.queries:
                rows += compare(path, documents, queries, options.k, options.repeats, options.device)
            shutil.rmtree(path)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    report = {
        "machine": {"system": platform.platform(), "processor": processor(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("pt_dance", "pyterrier-dr", "torch", "numpy", "pandas")},
        "dimension": DIMENSION,
        "repeats": options.repeats,
        "device": options.device,
        "retrieval": rows,
        "indexing": builds,
    }
    print(table(rows), end="\n\n")
    print(indexing_table(builds))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    else:
        print("\n" + json.dumps(report))


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
