"""Peak memory of fitting, mining and a teacher's scores, for queries with 200 candidates each, above the model's own.

A static tower mines over a real collection: the 200 best documents of every query, all of which a teacher scores (the
filter ``mining.TeacherScore``; a query's positives are taken out before, since they are never candidates), then query
negatives for every positive document, and at last the teacher's scores of the training rows (``TeacherScores``) with
all negatives that were mined. Before that a round is fitted twice, with a pipeline as the source of its negatives and
behind the same pipeline, which hands over all candidates in one frame. The teacher is another static tower's scorer: it
reads (query, text) as any cross-encoder would, but takes minutes instead of days on a CPU; what it holds in memory is
its own affair and counts here too.

Everything runs in one process. Memory is its resident set above what it was with the libraries, both models and the
(memory-mapped) index opened: the kernel's high-water mark, reset before each phase, and the largest of 50 samples a
second.

    python experiments/benchmarks/memory.py --dataset ../shared/data/medquad --out memory.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from measuring import Child, Usage, answers, finish, machine, memory, open_dataset

AIM_MIB = 2048


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """Corpus, model, index and teacher on disk; in a process of its own, so that none of its memory counts."""
    from pt_dance import Corpus, DenseIndex, DualEncoder

    corpus = Corpus.build(open_dataset(options.dataset), folder / "corpus", verbose=False)

    def texts():
        return (document["text"] for document in corpus.get_corpus_iter(verbose=False))

    encoder = DualEncoder.static(texts(), dim=options.dim).save(folder / "encoder")
    DualEncoder.static(texts(), dim=64, seed=7, max_length=options.teacher_tokens).save(folder / "teacher")
    DenseIndex(folder / "index", encoder, verbose=False).index(corpus)


def run(options: argparse.Namespace, folder: Path, report) -> None:
    """Mine and score, reporting each phase when it is done."""
    import pyterrier as pt

    from pt_dance import Corpus, DanceRetriever, DenseIndex, DualEncoder, Round
    from pt_dance.mining import TeacherScore, mine_documents, mine_queries, positive_pairs
    from pt_dance.training.examples import build_examples
    from pt_dance.training.teacher import TeacherScores

    class Counting(pt.Transformer):
        """Passes rows on to the teacher and counts them."""

        def __init__(self, teacher: pt.Transformer) -> None:
            self.teacher, self.fingerprint, self.pairs = teacher, "counting", 0

        def transform(self, inp):
            self.pairs += len(inp)
            return self.teacher(inp)

        def __repr__(self) -> str:
            return "a static tower's scorer"

    corpus, encoder = Corpus(folder / "corpus"), DualEncoder.load(folder / "encoder", device="cpu")
    index = DenseIndex(folder / "index", encoder, verbose=False)
    index.open()
    teacher = Counting(DualEncoder.load(folder / "teacher", device="cpu").scorer())
    teacher(corpus_frame(corpus))
    teacher.pairs = 0
    baseline = memory("VmRSS")
    report({"model_mib": baseline, "machine": machine()})

    def phase(name: str, work):
        before = teacher.pairs
        with Usage(baseline, sampled=True) as usage:
            made, about = work()
        report({"phase": name, "pairs": teacher.pairs - before, "about": about, **usage.result})
        return made

    def read():
        collection = open_dataset(options.dataset)
        topics = collection.get_topics("train").head(options.queries)
        qrels = collection.get_qrels("train")
        qrels = qrels[qrels["qid"].isin(topics["qid"])]
        return (topics, qrels), f"{len(topics):,} queries, {len(corpus):,} documents"

    topics, qrels = phase("read topics and qrels", read)
    mining = dict(depth=options.depth, negatives=options.negatives)

    def documents():
        filters = [TeacherScore(teacher, below=options.below)]
        source = index.retriever(num_results=options.depth)
        mined = mine_documents(source, topics, qrels, corpus, filters=filters, **mining)
        about = mined.attrs["mining"]
        return mined, f"{about['candidates']:,} candidates, {len(mined):,} negatives, removed {about['removed']}"

    def queries():
        mined = mine_queries(encoder, topics, qrels, corpus, index=index, **mining)
        about = mined.attrs["mining"]
        return mined, f"{about['candidates']:,} candidates of {about['sources']:,} documents, {len(mined):,} negatives"

    def rows():
        examples = build_examples(
            topics,
            positive_pairs(topics, qrels),
            corpus,
            negatives=negatives,
            query_negatives=query_negatives,
            negatives_per_row=options.negatives,
            query_negatives_per_row=options.negatives,
            teacher=TeacherScores(teacher, folder / "teacher.sqlite"),
        )
        return examples, f"{len(examples.rows):,} rows"

    def fit(name: str, behind: bool):
        """A round of training with BM25's place taken by the index, in front of the retriever or as its source."""
        first = index.retriever(num_results=options.depth)
        source = "first_stage" if behind else first
        few = topics.head(options.fit_queries)
        recipe = Round(negatives=source, negatives_per_query=options.negatives, batch_size=256, name=name)
        dance = DanceRetriever(encoder, corpus, folder / name, recipe=recipe, verbose=False)
        (first >> dance if behind else dance).fit(few, qrels)
        return None, f"{len(few):,} queries, {int(dance.history['steps'].iloc[-1])} steps"

    if options.fit_queries:
        phase("fit, negatives from a pipeline", lambda: fit("source", False))
        phase("fit behind the pipeline (first >> dance)", lambda: fit("behind", True))
    negatives = phase("mine documents, the teacher scores all candidates", documents)
    query_negatives = phase("mine queries", queries)
    phase("make training rows with the teacher's scores", rows)


def corpus_frame(corpus):
    """Return a few rows that let a scorer load what it loads on first use."""
    import pandas as pd

    docnos = corpus.docno(range(2)).tolist()
    return pd.DataFrame({"qid": "1", "query": "a question", "docno": docnos, "text": corpus.texts(docnos)})


def table(phases: list[dict]) -> str:
    lines = [
        "| phase | pairs the teacher scored | seconds | CPU seconds | peak MiB above the models | sampled |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for p in phases:
        lines.append(
            f"| {p['phase']} | {p['pairs']:,} | {p['seconds']:.1f} | {p['cpu_seconds']:.1f} | {p['peak_mib']:.0f} "
            f"| {p['sampled_mib']:.0f} |"
        )
    seconds, cpu, pairs = (sum(p[key] for p in phases) for key in ("seconds", "cpu_seconds", "pairs"))
    peak, sampled = (max(p[key] for p in phases) for key in ("peak_mib", "sampled_mib"))
    name = f"all (aim: below {AIM_MIB:,} MiB)"
    lines.append(f"| {name} | {pairs:,} | {seconds:.1f} | {cpu:.1f} | {peak:.0f} | {sampled:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="dance:pydocs", help="dance:pydocs or a folder in BEIR's layout")
    parser.add_argument("--queries", type=int, default=12_000, help="training queries at most")
    parser.add_argument("--depth", type=int, default=200, help="candidates of a query")
    parser.add_argument("--negatives", type=int, default=20, help="kept of them, and carried by a training row")
    parser.add_argument("--fit-queries", type=int, default=6_000, help="queries that are fitted on; 0 leaves that out")
    parser.add_argument("--dim", type=int, default=384, help="dimensions of the static tower that mines")
    parser.add_argument("--teacher-tokens", type=int, default=64, help="tokens of a text that the teacher reads")
    parser.add_argument("--below", type=float, default=0.9, help="candidates the teacher scores higher are removed")
    parser.add_argument("--out", type=Path, default=None, help="write all measurements to this JSON file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, folder = options.child
        out = answers()
        if what == "prepare":
            prepare(options, Path(folder))
        else:
            run(options, Path(folder), lambda part: print(json.dumps(part), file=out, flush=True))
        print(json.dumps({"done": what}), file=out, flush=True)
        return
    names = ("dataset", "queries", "depth", "negatives", "fit_queries", "dim", "teacher_tokens", "below")
    arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    with tempfile.TemporaryDirectory() as folder:
        process = Child("prepare", folder, *arguments)
        process.answer()
        process.close()
        process = Child("run", folder, *arguments)
        about = process.answer()
        phases = []
        while "done" not in (part := process.answer()):
            phases.append(part)
            print(f"{part['phase']}: {part['seconds']:.0f} s; {part['about']}", file=sys.stderr)
        process.close()
        on_disk = sum(os.path.getsize(file) for file in Path(folder).rglob("*") if file.is_file())
    print(f"{options.dataset}, {phases[0]['about']}, {options.depth} candidates each; {about['machine']}")
    print(f"resident set with the models loaded: {about['model_mib']:.0f} MiB; on disk: {on_disk / 2**20:.0f} MiB\n")
    print(table(phases))
    report = {name: getattr(options, name) for name in names} | about | {"phases": phases}
    finish(report, options.out)


if __name__ == "__main__":
    main()
