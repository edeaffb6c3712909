"""What grows with the collection: time, memory and disk of every stage from texts to training rows, by size.

Texts are synthetic, as long as MedQuAD's documents are, and read by a static tower of 64 dimensions, so that what is
measured is this package rather than a large model. Every stage runs in a process of its own, whose peak resident set
is told whole, libraries included, and what of it is not pages of files, which the system takes back when it needs
them. One query is mined for and trained on for every 100 documents. Between two sizes the slope is the exponent of
CPU time by size: 1 is as many times the seconds as there are times the documents. CPU time, since the clock also counts
what else the machine does.

What is measured is written to --out after every stage. The same command goes on where an earlier one was interrupted;
what the stages made lies in --folder until a size is done.

    python experiments/benchmarks/scale.py --documents 10000 100000 1000000 --out scale.json
    python experiments/benchmarks/scale.py --documents 10000000 --stages corpus index open ann mining --out scale.json
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from measuring import Child, Usage, answers, finish, machine, memory

DIMENSION = 64
DOCUMENTS_PER_QUERY = 100
EXACT_QUERIES = 1_000
DEPTH, NEGATIVES = 200, 20
# Words of a MedQuAD document: a log-normal distribution with the mean and deviation of the logarithms, and the longest.
LOG_WORDS, LOG_DEVIATION, MOST_WORDS = 4.870, 0.966, 4_281
QUERY_WORDS, QUERY_DEVIATION = 8.35, 2.38
# How many words there are, drawn as Zipf and Mandelbrot say.
VOCABULARY, MANDELBROT = 70_000, 2.7
BLOCK = 1_000
ENCODER_DOCUMENTS = 10_000


def vocabulary() -> np.ndarray:
    """Return words of two to three syllables, the most frequent ones first and shortest."""
    light = [consonant + vowel for consonant in "bcdfghjklmnprstvwxyz" for vowel in "aeiou"]
    closed = [syllable + consonant for syllable, consonant in zip(light, "nrstl" * 20, strict=True)]
    words = [first + last for first in light for last in closed]
    words += [first + middle + last for first in light for middle in light for last in closed]
    return np.array(words[:VOCABULARY], dtype=object)


def texts(count: int) -> Iterator[str]:
    """Yield synthetic documents; a larger collection begins with the smaller one."""
    words = vocabulary()
    shares = np.cumsum(1 / (np.arange(VOCABULARY) + MANDELBROT))
    shares /= shares[-1]
    for block in range(-(-count // BLOCK)):
        rng = np.random.default_rng([1, block])
        lengths = np.exp(rng.normal(LOG_WORDS, LOG_DEVIATION, BLOCK)).astype(int).clip(1, MOST_WORDS)
        drawn = words[np.searchsorted(shares, rng.random(lengths.sum()))]
        ends = np.cumsum(lengths)
        for number in range(min(BLOCK, count - block * BLOCK)):
            yield " ".join(drawn[ends[number] - lengths[number] : ends[number]])


def documents(count: int) -> Iterator[dict[str, str]]:
    for number, text in enumerate(texts(count)):
        yield {"docno": f"doc{number}", "text": text}


def queries(corpus, count: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return topics, each some words of a document, and the qrels that call that document relevant."""
    rows = np.arange(count) * (len(corpus) // count)
    rng = np.random.default_rng(2)
    lengths = rng.normal(QUERY_WORDS, QUERY_DEVIATION, count).round().astype(int).clip(2)
    asked = []
    for text, length in zip(corpus.texts_at(rows), lengths, strict=True):
        distinct = list(dict.fromkeys(text.split()))
        asked.append(" ".join(rng.permutation(distinct)[:length]))
    qids = [f"q{row}" for row in rows]
    qrels = pd.DataFrame({"qid": qids, "docno": corpus.docno(rows), "label": 1})
    return pd.DataFrame({"qid": qids, "query": asked}), qrels


# --- the stages, each in a process of its own: what is prepared, and what is measured ---------------------------------


class _Stage:
    """One measurement: ``prepare`` returns what is measured, which returns a few words and numbers about it.

    Args:
        folder: where the stages of a size read and write.
        count: how many documents.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def encoder(self):
        from pt_dance import DualEncoder

        return DualEncoder.load(self.folder / "encoder", device="cpu")

    def corpus_there(self):
        from pt_dance import Corpus

        return Corpus(self.folder / "corpus")

    def index_there(self):
        from pt_dance import DenseIndex

        return DenseIndex(self.folder / "index", self.encoder(), device="cpu", verbose=False)

    def training(self, count: int | None = None):
        corpus = self.corpus_there()
        return corpus, *queries(corpus, count or max(1, self.count // DOCUMENTS_PER_QUERY))

    def corpus(self) -> Callable[[], dict]:
        from pt_dance import Corpus, DualEncoder

        DualEncoder.static(texts(ENCODER_DOCUMENTS), dim=DIMENSION).save(self.folder / "encoder")

        def build() -> dict:
            Corpus.build(documents(self.count), self.folder / "corpus", fields=["text"], verbose=False)
            return {"units": self.count}

        return build

    def index(self) -> Callable[[], dict]:
        index, corpus = self.index_there(), self.corpus_there()

        def build() -> dict:
            index.index(corpus)
            return {"units": self.count}

        return build

    def open(self) -> Callable[[], dict]:
        index = self.index_there()
        some = [f"doc{row}" for row in range(0, self.count, self.count // EXACT_QUERIES)]

        def use() -> dict:
            assert index.docno(index.known_rows(some)).tolist() == some
            return {"units": self.count}

        return use

    def ann(self) -> Callable[[], dict]:
        index = self.index_there()

        def build() -> dict:
            index.ann_retriever(num_results=DEPTH, method="ivfpq")
            return {"units": self.count}

        return build

    def recall(self) -> Callable[[], dict]:
        retriever = self.index_there().ann_retriever(num_results=DEPTH, method="ivfpq")
        _, topics, _ = self.training(min(EXACT_QUERIES, self.count // 10))

        def compare() -> dict:
            return {"units": self.count, "recall": {k: retriever.recall(topics, k=k) for k in (10, DEPTH)}}

        return compare

    def _mined(self, retriever, training) -> dict:
        from pt_dance.mining import mine_documents

        corpus, topics, qrels = training
        mined = mine_documents(
            retriever, topics, qrels, corpus, depth=DEPTH, negatives=NEGATIVES, reads=retriever.index.encoder
        )
        return {"units": len(topics), "rows": len(mined), "mined": mined}

    def exact(self) -> Callable[[], dict]:
        retriever, training = self.index_there().retriever(DEPTH), self.training(EXACT_QUERIES)

        def mine() -> dict:
            # Every query is compared with every document.
            return {"units": self.count, "rows": self._mined(retriever, training)["rows"]}

        return mine

    def mining(self) -> Callable[[], dict]:
        retriever = self.index_there().ann_retriever(num_results=DEPTH, method="ivfpq")
        training = self.training()

        def mine() -> dict:
            about = self._mined(retriever, training)
            about.pop("mined").to_parquet(self.folder / "negatives.parquet")
            return about

        return mine

    def queries(self) -> Callable[[], dict]:
        from pt_dance.mining import mine_queries

        index, (corpus, topics, qrels) = self.index_there(), self.training()

        def mine() -> dict:
            mined = mine_queries(index.encoder, topics, qrels, corpus, index=index, depth=DEPTH, negatives=NEGATIVES)
            mined.to_parquet(self.folder / "query_negatives.parquet")
            return {"units": len(topics), "rows": len(mined)}

        return mine

    def examples(self, teacher=None) -> Callable[[], dict]:
        from pt_dance.mining import positive_pairs
        from pt_dance.training.examples import build_examples

        encoder, (corpus, topics, qrels) = self.encoder(), self.training()
        pairs = positive_pairs(topics, qrels)
        negatives, query_negatives = (
            pd.read_parquet(self.folder / f"{name}.parquet") for name in ("negatives", "query_negatives")
        )

        def build() -> dict:
            made = build_examples(
                topics, pairs, corpus, negatives=negatives, query_negatives=query_negatives, reads=encoder,
                negatives_per_row=4, query_negatives_per_row=4, epochs=3, teacher=teacher,
            )  # fmt: skip
            assert made.rows.mirrored.relevant(made.rows.positive[:1], made.rows.query[:1]).all()
            return {"units": len(topics), "rows": len(made.rows)}

        return build

    def teacher(self) -> Callable[[], dict]:
        from pt_dance.training.teacher import TeacherScores

        return self.examples(TeacherScores(self.encoder().scorer(), self.folder / "teacher.sqlite"))


# What each stage is called, and which earlier ones it reads from.
STAGES = {
    "corpus": ("Corpus.build", ()),
    "index": ("DenseIndex.index", ("corpus",)),
    "open": ("open an index, look 1,000 docnos up", ("index",)),
    "ann": ('ann_retriever(method="ivfpq")', ("index",)),
    "recall": ("its recall, by exact search for 1,000 queries", ("corpus", "ann")),
    "exact": ("mine_documents, exact, 1,000 queries", ("corpus", "index")),
    "mining": ("mine_documents, ivfpq", ("corpus", "ann")),
    "queries": ("mine_queries", ("corpus", "index")),
    "examples": ("training rows, both directions, 3 epochs", ("corpus", "mining", "queries")),
    "teacher": ("the same with a teacher's scores", ("corpus", "mining", "queries")),
}
MADE = {
    "corpus": "corpus",
    "index": "index/pt_meta.json",
    "ann": "index/ann",
    "mining": "negatives.parquet",
    "queries": "query_negatives.parquet",
    "teacher": "teacher.sqlite",
}


def on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def run_stage(name: str, folder: Path, count: int) -> dict:
    """Measure one stage in this process."""
    if name in MADE:  # What a killed process left half-made would be continued, and its time with it.
        for left in (folder / MADE[name], folder / Path(MADE[name]).parent / f".{Path(MADE[name]).name}.building"):
            shutil.rmtree(left.parent if left.name == "pt_meta.json" else left, ignore_errors=True)
    work = getattr(_Stage(folder, count), name)()
    loaded, before = memory("VmRSS"), on_disk(folder)
    with Usage(baseline=0.0, sampled=True) as usage:
        about = work()
    return {**about, **usage.result, "loaded_mib": loaded, "bytes": on_disk(folder) - before, "machine": machine()}


# --- the referee ------------------------------------------------------------------------------------------------------


def needed(stages: list[str], done: dict[str, dict], folder: Path) -> list[str]:
    """Return the stages to run, in order: those without a measurement, and those whose work they need and is gone."""
    wanted = {name for name in stages if name not in done}
    for name in reversed(STAGES):
        if name in wanted:
            wanted |= {before for before in STAGES[name][1] if not (folder / MADE[before]).exists()}
    return [name for name in STAGES if name in wanted]


def slopes(found: dict[str, dict[str, dict]]) -> dict[str, dict[str, float]]:
    """Return for every size and stage the exponent of its CPU time by what it does, against the size before."""
    result: dict[str, dict[str, float]] = {}
    sizes = sorted(found, key=int)
    for small, large in pairwise(sizes):
        result[large] = {
            name: math.log(found[large][name]["cpu_seconds"] / found[small][name]["cpu_seconds"])
            / math.log(found[large][name]["units"] / found[small][name]["units"])
            for name in STAGES
            if name in found[large] and name in found[small]
        }
    return result


def table(report: dict) -> str:
    lines = [
        "| stage | documents | seconds | CPU seconds | slope | peak MiB | without pages of files | written MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    rising = slopes(report["sizes"])
    for name, (title, _) in STAGES.items():
        for size in sorted(report["sizes"], key=int):
            m = report["sizes"][size].get(name)
            if m is None:
                continue
            slope = rising.get(size, {}).get(name)
            shown = "–" if slope is None else f"{slope:.2f}"
            memory = f"{m['peak_mib']:,.0f} | {m['anonymous_mib']:,.0f} | {m['bytes'] / 1e6:,.0f}"
            lines.append(
                f"| {title} | {int(size):,} | {m['seconds']:.1f} | {m['cpu_seconds']:.1f} | {shown} | {memory} |"
            )
    return "\n".join(lines)


def recalls(report: dict) -> str:
    """Say which share of the exact best documents ivfpq found."""
    parts = []
    for size in sorted(report["sizes"], key=int):
        found = report["sizes"][size].get("recall")
        if found is not None:
            shares = " and ".join(f"{share:.3f} of the best {k}" for k, share in found["recall"].items())
            parts.append(f"{int(size):,} documents: {shares}")
    return "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--folder", type=Path, default=None, help="where the stages work; a temporary one if not given")
    parser.add_argument("--out", type=Path, default=None, help="JSON file of what was measured, read and added to")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, folder, count = options.child
        out = answers()
        print(json.dumps(run_stage(name, Path(folder), int(count))), file=out, flush=True)
        return
    report: dict = {"dimension": DIMENSION, "depth": DEPTH, "sizes": {}}
    if options.out is not None and options.out.exists():
        report = json.loads(options.out.read_text())
    with tempfile.TemporaryDirectory() as temporary:
        base = options.folder or Path(temporary)
        for count in options.documents:
            folder, done = base / str(count), report["sizes"].setdefault(str(count), {})
            folder.mkdir(parents=True, exist_ok=True)
            for name in needed(options.stages, done, folder):
                process = Child(name, folder, count)
                done[name] = process.answer()
                process.close()
                report["machine"] = done[name].pop("machine")
                print(f"{count:,} {name}: {done[name]}", file=sys.stderr)
                finish(report, options.out)
            shutil.rmtree(folder)
    print(f"{report['machine']}\n\n{table(report)}\n\n{recalls(report)}")


if __name__ == "__main__":
    main()
