r"""What a query costs and what it gives: BM25, dense retrieval, dense and cross-encoder re-ranking, in one run.

ANCE reports that dense retrieval reaches the quality of BM25 and BERT re-ranking "almost 100 times" faster. Here both
are timed on the same machine, one thread, one query at a time, in turns; each system's figure is the median over its
queries.

    python experiments/evidence/efficiency.py --data ../shared/data --collection scifact --queries 20 \
        --out experiments/results/evidence/efficiency.json

``experiments/evidence/run.py --pages`` puts the table and the picture into the documentation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ir_measures
import pandas as pd
import pyterrier as pt
import torch
from ir_measures import nDCG

from evidence.cells import Cell, Study
from evidence.data import some_of
from evidence.protocol import FULL
from evidence.teacher import cross_fitted
from pt_dance import CrossEncoderScorer, DenseIndex

DEPTHS = (10, 30, 100, 300, 1000)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="where the study's cells are")
    parser.add_argument("--collection", default="medquad")
    parser.add_argument("--encoder", default="static")
    parser.add_argument("--method", default="mnrl-ance")
    parser.add_argument("--queries", type=int, default=50, help="reported queries that are timed, drawn once")
    parser.add_argument("--out", type=Path, help="write the figures to this .json")
    return parser.parse_args()


def systems(study: Study, args: argparse.Namespace) -> dict[str, pt.Transformer]:
    """All systems by name."""
    collection = study.collection(args.collection, args.encoder)
    cell = Cell(args.collection, args.encoder, args.method, 1)
    encoder, _ = study.trained(cell)
    folder = study.runs / "efficiency" / f"{args.collection}-{args.encoder}-{args.method}"
    dense = DenseIndex(folder, encoder, verbose=False)
    if not dense.built():
        dense.index(collection.corpus)
    # Either of the two teachers: the reported queries were learnt from by neither.
    teacher = cross_fitted(collection, study.taught_on(args.encoder)).models[0]
    cross = CrossEncoderScorer(teacher.model, max_length=teacher.max_length, batch_size=64)
    bm25 = collection.bm25
    text = pt.text.get_text(collection.documents, "text")
    found = {"BM25": bm25 % 10, "dense": dense.retriever(num_results=10)}
    for depth in DEPTHS:
        found[f"BM25 % {depth} >> dense"] = bm25 % depth >> dense.retriever(num_results=10)
        found[f"BM25 % {depth} >> cross-encoder"] = bm25 % depth >> text >> cross
    return found


def measure(found: dict[str, pt.Transformer], topics: pd.DataFrame, qrels: pd.DataFrame) -> list[dict]:
    """nDCG@10 and the median seconds of a query, every system in turn for each query."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    results: dict[str, list[pd.DataFrame]] = {name: [] for name in found}
    for system in found.values():
        system(topics.head(2))
    for position in range(len(topics)):
        query = topics.iloc[[position]]
        for name, system in found.items():
            began = time.perf_counter()
            answer = system(query)
            seconds[name].append(time.perf_counter() - began)
            results[name].append(answer)
    judged = qrels.rename(columns={"qid": "query_id", "docno": "doc_id", "label": "relevance"})
    rows = []
    for name in found:
        run = pd.concat(results[name]).rename(columns={"qid": "query_id", "docno": "doc_id"})
        value = ir_measures.calc_aggregate([nDCG @ 10], judged, run[["query_id", "doc_id", "score"]])[nDCG @ 10]
        rows.append({"system": name, "nDCG@10": value, "seconds": statistics.median(seconds[name])})
    return rows


def picture(rows: list[dict], path: Path) -> None:
    """nDCG@10 against seconds a query, one line a family of systems, its depths k beside the points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for family, marker in (("BM25", "s"), ("dense", "D"), (">> dense", "o"), (">> cross-encoder", "^")):
        mine = [r for r in rows if r["system"] == family or (family.startswith(">>") and r["system"].endswith(family))]
        label = f"BM25 % k {family}" if family.startswith(">>") else family
        axes.plot([r["seconds"] for r in mine], [r["nDCG@10"] for r in mine], marker=marker, label=label)
        for row in mine if family.startswith(">>") else []:
            depth = row["system"].split()[2]
            axes.annotate(depth, (row["seconds"], row["nDCG@10"]), (6, 3), textcoords="offset points", size="small")
    axes.set(xscale="log", xlabel="seconds a query (median, one thread)", ylabel="nDCG@10", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    args = options()
    torch.set_num_threads(1)
    study = Study(FULL, args.data, args.runs / FULL.name)
    topics, qrels = study.collection(args.collection, args.encoder).reported
    kept = some_of(pd.Index(topics["qid"]), args.queries)
    topics = topics[topics["qid"].isin(kept)].reset_index(drop=True)
    rows = measure(systems(study, args), topics, qrels[qrels["qid"].isin(kept)])
    for row in rows:
        print(f"{row['system']:32} nDCG@10 {row['nDCG@10']:.4f}  {1000 * row['seconds']:9.2f} ms a query")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        about = {name: str(value) for name, value in vars(args).items() if name not in ("data", "runs", "out")}
        args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
