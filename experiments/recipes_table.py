"""Does every recipe, called with its defaults, improve every kind of encoder? One table, cell by cell.

A cell is a collection, an encoder, a recipe and a seed. Its row says what the encoder's nDCG@10 was before training,
after the last round and after the best round, each on queries that nothing was trained or chosen on, with the paired
t-test of last against untrained. Collections are samples, always the same ones, so that a cell takes seconds with a
static tower and about a minute with a transformer. Cells that the CSV file has are not computed again.
Beside the defaults it has ANCE's published pairs, ``recipes.ance(loss="pairwise")``. ``--held-out`` is for choosing
defaults: it trains on two thirds of the training queries and measures on the others, so that no query of the table is
looked at.

    python experiments/recipes_table.py --out runs/recipes --results experiments/results/recipes
    python experiments/recipes_table.py --encoders static --collections medquad --recipes ance dance --seeds 1
    python experiments/recipes_table.py --held-out --recipes margin_mse distill_kl --results runs/held-out
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
import zlib
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyterrier as pt
import torch
from ir_measures import nDCG
from scipy.stats import ttest_rel
from sklearn.feature_extraction.text import TfidfVectorizer

from common import default_recipes, minilm_path
from pt_dance import Corpus, DanceRetriever, DualEncoder, bm25, recipes

MEASURE = nDCG @ 10
WORDS = 60


@dataclass(frozen=True)
class Size:
    """How much of a collection is used: training queries, test queries, documents."""

    train: int
    test: int
    documents: int


SIZES = {"static": Size(600, 250, 1200), "transformer": Size(120, 100, 150)}
#: Tokens that a transformer reads of a text.
MAX_LENGTH = 32

# collection -> the split trained on, and the one measured on (None: cut off the training split by hand)
COLLECTIONS = {
    "medquad": ("train", "dev"),
    "nfcorpus-preprocessed": ("train", "dev"),
    "scifact": ("train", "test"),
    "squad-train-nqg-sentences": ("train", None),
    # not tuned on
    "squad-dev": ("dev", None),
    "wikiqa": ("train", "dev"),
    "pydocs": ("train", "dev"),
}

PAIRS = "ance, pairs"
RECIPES = [*default_recipes(pt.Transformer.identity()), PAIRS]


class Teacher(pt.Transformer):
    """Ten times the sum of all-MiniLM-L6-v2's cosine and of the tf-idf cosine, about as large as a cross-encoder's.

    It ranks better than either alone. Vectors are kept on disk, so that each text is encoded once.
    """

    fingerprint = "10 * (all-MiniLM-L6-v2 + tf-idf)"

    def __init__(self, corpus: Corpus, queries: list[str], path: Path):
        documents = list(corpus.get_corpus_iter(verbose=False))
        self.texts, self.path = [document["text"] for document in documents], path
        self.queries = {query: number for number, query in enumerate(queries)}
        self.documents = {document["docno"]: number for number, document in enumerate(documents)}

    @cached_property
    def scores(self) -> np.ndarray:
        """Of every query and document, made when they are first asked for: encoding takes minutes."""
        queries = list(self.queries)
        if not self.path.exists():
            encoder = DualEncoder(minilm_path(), max_length=64)
            np.savez(self.path, documents=encoder.encode_docs(self.texts), queries=encoder.encode_queries(queries))
        vectors = np.load(self.path)
        tfidf = TfidfVectorizer(sublinear_tf=True).fit(self.texts)
        scores = vectors["queries"] @ vectors["documents"].T
        scores += (tfidf.transform(queries) @ tfidf.transform(self.texts).T).toarray()
        return scores

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Score (query, docno) rows."""
        rows, columns = inp["query"].map(self.queries), inp["docno"].map(self.documents)
        return pt.model.add_ranks(inp.assign(score=10 * self.scores[rows, columns].astype(float)))


class Sample:
    """A collection's sample: documents, training and test queries, BM25's results, a teacher; made once on disk."""

    def __init__(self, name: str, size: Size, folder: Path, *, held_out: bool = False):
        folder = folder / f"{name}-{size.train}-{size.test}-{size.documents}"
        folder.mkdir(parents=True, exist_ok=True)
        dataset = pt.get_dataset("dance:pydocs" if name == "pydocs" else f"dance:../shared/data/{name}")
        train, test = COLLECTIONS[name]
        topics = dataset.get_topics(train).sample(frac=1, random_state=0).reset_index(drop=True)
        qrels = dataset.get_qrels(train)
        if test is None:
            self.test, self.test_qrels = topics.tail(size.test).reset_index(drop=True), qrels
            topics = topics.iloc[: -size.test]
        else:
            self.test = dataset.get_topics(test).sample(frac=1, random_state=0).head(size.test).reset_index(drop=True)
            self.test_qrels = dataset.get_qrels(test)
        self.train = topics.head(size.train).reset_index(drop=True)
        self.qrels = qrels[qrels["qid"].isin(self.train["qid"])].reset_index(drop=True)
        if len(self.qrels) > 3 * size.train:  # NFCorpus has 43 relevant documents a query
            self.qrels = self.qrels.groupby("qid").head(3).reset_index(drop=True)
        self.test_qrels = self.test_qrels[self.test_qrels["qid"].isin(self.test["qid"])].reset_index(drop=True)
        needed = {docno for frame in (self.qrels, self.test_qrels) for docno in frame["docno"]}
        if not (folder / "corpus").exists():
            self._build(dataset, folder / "corpus", size.documents, needed)
        self.corpus = Corpus(folder / "corpus")
        self.folder = folder
        found = folder / "bm25.parquet"
        if not found.exists():
            (bm25(self.corpus, folder / "index") % 100)(self.train)[
                ["qid", "query", "docno", "score", "rank"]
            ].to_parquet(found)
        self.first_stage = pd.read_parquet(found)
        self.texts = self.train["query"].drop_duplicates().tolist()
        if held_out:
            rest = self.train.iloc[2 * len(self.train) // 3 :]
            self.test, self.test_qrels = rest, self.qrels[self.qrels["qid"].isin(rest["qid"])]
            self.train = self.train.drop(rest.index)
            self.qrels, self.first_stage = (
                frame[~frame["qid"].isin(rest["qid"])].reset_index(drop=True)
                for frame in (self.qrels, self.first_stage)
            )

    @staticmethod
    def _build(dataset, path: Path, most: int, needed: set[str]) -> None:
        """All needed documents and a fixed random part of the others, each cut after so many words."""
        share = most / sum(1 for _ in dataset.get_corpus_iter(verbose=False))
        documents = (
            {"docno": document["docno"], "text": " ".join(document["text"].split()[:WORDS])}
            for document in dataset.get_corpus_iter(verbose=False)
            if document["docno"] in needed or zlib.crc32(document["docno"].encode()) < share * 2**32
        )
        Corpus.build(documents, path, verbose=False)

    @cached_property
    def teacher(self) -> pt.Transformer:
        """Scores a (query, text) row better than any of the encoders does."""
        return Teacher(self.corpus, self.texts, self.folder / "teacher.npz")

    def per_query(self, system: pt.Transformer) -> pd.Series:
        """nDCG@10 of every test query."""
        found = pt.Evaluate((system % 10)(self.test), self.test_qrels, metrics=[MEASURE], perquery=True)
        return pd.Series({qid: values[str(MEASURE)] for qid, values in found.items()}).sort_index()


def cls_dot() -> DualEncoder:
    """MiniLM read by its first token, compared with dot products."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    model = SentenceTransformer(str(minilm_path()), device="cpu")
    pooled = SentenceTransformer(modules=[model[0], Pooling(model[0].get_embedding_dimension(), "cls")], device="cpu")
    pooled.similarity_fn_name = "dot"
    return DualEncoder(pooled, max_length=MAX_LENGTH)


def texts_of(sample: Sample):
    yield from (document["text"] for document in sample.corpus.get_corpus_iter(verbose=False))
    yield from sample.texts


ENCODERS = {
    "static": lambda sample, seed: DualEncoder.static(texts_of(sample), dim=256, seed=seed),
    "static_from": lambda sample, seed: DualEncoder.static_from(minilm_path()),
    "two towers": lambda sample, seed: DualEncoder.two_towers(*[ENCODERS["static"](sample, seed)] * 2),
    "minilm": lambda sample, seed: DualEncoder(minilm_path(), max_length=MAX_LENGTH),
    "cls dot": lambda sample, seed: cls_dot(),
}
SMALL = ("minilm", "cls dot")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collections", nargs="+", default=list(COLLECTIONS)[:4], choices=list(COLLECTIONS))
    parser.add_argument("--encoders", nargs="+", default=list(ENCODERS), choices=list(ENCODERS))
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--held-out", action="store_true", help="measure on held-out training queries")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"), help="folder for everything")
    parser.add_argument("--results", type=Path, help="write .csv and .md here (default: in --out)")
    return parser.parse_args()


def cell(sample: Sample, encoder: DualEncoder, recipe: list, folder: Path, seed: int) -> dict:
    """One row of the table."""
    started = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    dance = DanceRetriever(encoder, sample.corpus, folder, recipe=recipe, seed=seed, num_results=100, verbose=False)
    dance.fit(sample.first_stage, sample.qrels)
    rounds = [sample.per_query(dance.retriever(round=number)) for number in range(len(recipe) + 1)]
    means = [float(values.mean()) for values in rounds]
    row = {
        "untrained": means[0],
        "last": means[-1],
        "best": max(means[1:]),
        "best round": int(np.argmax(means[1:])) + 1,
        "p": float(ttest_rel(rounds[-1], rounds[0]).pvalue),
        "rounds": " ".join(f"{mean:.3f}" for mean in means),
        "seconds": time.perf_counter() - started,
    }
    shutil.rmtree(folder)
    return row


def write(rows: list[dict], results: Path) -> None:
    """Write the rows as .csv, and for people as .md."""
    table = pd.DataFrame(rows).round(4)
    table.to_csv(results.with_suffix(".csv"), index=False)
    shown = table.assign(change=table["last"] - table["untrained"])
    shown = shown[["collection", "encoder", "recipe", "seed", "untrained", "last", "best", "best round", "change", "p"]]
    lines = [" | ".join(shown.columns), " | ".join("---" for _ in shown.columns)]
    for row in shown.itertuples(index=False):
        lines.append(" | ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row))
    worse = shown[(shown["change"] < 0) & (shown["p"] < 0.05)]
    lines = [f"| {line} |" for line in lines]
    verdict = (
        f"{len(shown)} cells: last round above untrained in {(shown['change'] > 0).sum()}, below in "
        f"{(shown['change'] < 0).sum()}, below by more than noise "
        f"(paired t-test over the queries, p < .05) in {len(worse)}."
    )
    results.with_suffix(".md").write_text("\n".join([verdict, "", *lines, ""]))
    print(verdict)


def main() -> None:
    args = options()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.results or args.out / "recipes"
    path = results.with_suffix(".csv")
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    sample_of = cache(lambda name, size: Sample(name, size, args.out, held_out=args.held_out))
    encoder_of = cache(lambda collection, size, name, seed: ENCODERS[name](sample_of(collection, size), seed))
    done = {(row["collection"], row["encoder"], row["recipe"], row["seed"]) for row in rows}
    for collection in args.collections:
        for name in args.encoders:
            size = SIZES["transformer" if name in SMALL else "static"]
            for seed in args.seeds:
                for recipe in args.recipes:
                    if (collection, name, recipe, seed) in done:
                        continue
                    sample, encoder = sample_of(collection, size), encoder_of(collection, size, name, seed)
                    rounds = {**default_recipes(sample.teacher), PAIRS: recipes.ance(loss="pairwise")}[recipe]
                    row = cell(sample, encoder, rounds, args.out / f"run-{os.getpid()}", seed)
                    rows.append(dict(collection=collection, encoder=name, recipe=recipe, seed=seed) | row)
                    write(rows, results)
                    print(collection, name, recipe, seed, row["rounds"], f"{row['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
