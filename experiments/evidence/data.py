"""The collections of the study: splits by cluster, and the pools of negatives that all methods share."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyterrier as pt
import xxhash
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from common import open_corpus
from evidence.protocol import REPORTED, Budget, Protocol
from pt_dance import Corpus, bm25, mining

# Sentences of SQuAD that lie in a row make a cluster: the collection does not say where an article ends.
_SENTENCES = 50
_TUNE, _CUT = 0.1, 0.15


class Collection:
    """One training collection: who trains, who tunes, who is reported, and BM25's pools.

    Everything is on disk after the first use, below ``folder``.

    Args:
        name: folder of the collection below ``data``.
        data: where the collections are.
        folder: where what is made of them is kept.
        protocol: sizes.
        budget: of the encoder; says how many queries train.
    """

    def __init__(self, name: str, data: Path, folder: Path, protocol: Protocol, budget: Budget) -> None:
        self.name, self.protocol, self.budget = name, protocol, budget
        self.dataset = pt.get_dataset(f"dance:{data / name}")
        self.folder = folder / f"{name}-{budget.queries or 'all'}"
        self.folder.mkdir(parents=True, exist_ok=True)
        train_topics, train_qrels = self.dataset.get_topics("train"), self.dataset.get_qrels("train")
        part = self._parts(train_topics, train_qrels)
        if REPORTED[name] == "cut":
            self.reported = self._of(train_topics, train_qrels, part[part == "cut"].index)
        else:
            self.reported = self.dataset.get_topics(REPORTED[name]), self.dataset.get_qrels(REPORTED[name])
        self.tune = self._of(train_topics, train_qrels, some_of(part[part == "tune"].index, 500))
        self.train = self._of(train_topics, train_qrels, some_of(part[part == "train"].index, budget.queries))

    @staticmethod
    def _of(topics: pd.DataFrame, qrels: pd.DataFrame, qids: pd.Index) -> tuple[pd.DataFrame, pd.DataFrame]:
        return (
            topics[topics["qid"].isin(qids)].reset_index(drop=True),
            qrels[qrels["qid"].isin(qids)].reset_index(drop=True),
        )

    def _parts(self, topics: pd.DataFrame, qrels: pd.DataFrame) -> pd.Series:
        """Part of each qid (train, tune or cut): whole clusters, by a hash of the name of the cluster."""
        cluster = clusters(self.name, topics, qrels)
        share = cluster.map(lambda name: stable_hash(f"part {name}") / 2**64)
        part = pd.Series("train", index=cluster.index)
        part[share < _TUNE] = "tune"
        if REPORTED[self.name] == "cut":
            part[(share >= _TUNE) & (share < _TUNE + _CUT)] = "cut"
        return part

    @cached_property
    def reported_clusters(self) -> pd.Series:
        """The cluster of each reported query."""
        return clusters(self.name, *self.reported)

    @cached_property
    def documents(self) -> Corpus:
        """All documents, or a part that holds every relevant one: what BM25 reads."""
        needed = {docno for _, qrels in (self.train, self.tune, self.reported) for docno in qrels["docno"]}
        return open_corpus(self.dataset, self.folder / "corpus", most=self.protocol.documents, needed=needed)

    @cached_property
    def corpus(self) -> Corpus:
        """The beginning of each of these documents: what encoders read."""
        return beginnings(self.documents, self.folder / f"beginnings-{len(self.documents)}", self.protocol.words)

    @cached_property
    def bm25(self) -> pt.Transformer:
        """The first stage."""
        return bm25(self.documents, self.folder / f"bm25-{len(self.documents)}")

    @cached_property
    def document_pool(self) -> pd.DataFrame:
        """BM25's negatives of each training query as a result frame: the same for all methods."""
        number, depth = self.protocol.pool
        topics, qrels = self.train

        def mine() -> pd.DataFrame:
            return mining.mine_documents(self.bm25, topics, qrels, self.corpus, depth=depth, negatives=number, seed=0)

        return topics[["qid", "query"]].merge(self._stored("documents", mine), on="qid")

    @cached_property
    def query_pool(self) -> pd.DataFrame:
        """BM25's training queries for each relevant document, without those it is relevant to: docno, qid, score."""
        number, depth = self.protocol.pool
        topics, qrels = self.train

        def mine() -> pd.DataFrame:
            texts = topics.drop_duplicates("query").rename(columns={"qid": "docno", "query": "text"})
            path = self.folder / "queries"
            queries = Corpus(path) if path.exists() else Corpus.build(texts, path, fields=["text"], verbose=False)
            search = bm25(queries, self.folder / "bm25-queries")
            return mining.mine_queries(search, topics, qrels, self.corpus, depth=depth, negatives=number, seed=0)

        return self._stored("queries", mine)

    def cluster_of(self, measured: pd.DataFrame) -> pd.Series:
        """The cluster of each measured row of the reported queries, or of documents that search for them."""
        by_query = self.reported_clusters
        relevant = self.reported[1][self.reported[1]["label"] > 0]
        by_document = relevant.drop_duplicates("docno").set_index("docno")["qid"].map(by_query)
        return measured["qid"].map(pd.concat([by_query, by_document[~by_document.index.isin(by_query.index)]]))

    def query_source(self, *, shuffled: bool = False) -> pt.Transformer:
        """The pool of query negatives as a source for a round.

        Args:
            shuffled: give every document another one's queries: a control with the same queries, mined for nothing.
        """
        pool = self.query_pool
        if shuffled:
            documents = pool["docno"].drop_duplicates()
            other = documents.sample(frac=1, random_state=0).to_numpy()
            pool = pool.assign(docno=pool["docno"].map(dict(zip(documents, other, strict=True))))
            pairs = pd.MultiIndex.from_frame(mining.positive_pairs(*self.train)[["qid", "docno"]])
            pool = pool[~pd.MultiIndex.from_frame(pool[["qid", "docno"]]).isin(pairs)]
        return pt.Transformer.from_df(pool.rename(columns={"docno": "qid", "qid": "docno"}))

    def _stored(self, what: str, mine) -> pd.DataFrame:
        file = self.folder / f"pool-of-{what}.parquet"
        if not file.exists():
            mine().to_parquet(file.with_suffix(".new"), index=False)
            file.with_suffix(".new").rename(file)
        return pd.read_parquet(file)

    @property
    def seen(self) -> list[str]:
        """Reported queries with a relevant document that is relevant to a training query, too."""
        train, reported = (qrels[qrels["label"] > 0] for _, qrels in (self.train, self.reported))
        return sorted(reported.loc[reported["docno"].isin(train["docno"]), "qid"].unique())

    def describe(self) -> dict[str, int | list[str]]:
        """Sizes, for the pages, and which reported queries ask for documents that were trained on."""
        sizes = {f"{part}_queries": len(getattr(self, part)[0]) for part in ("train", "tune", "reported")}
        return sizes | {
            "documents": len(self.corpus), "clusters": int(self.reported_clusters.nunique()), "seen": self.seen,
        }  # fmt: skip


def beginnings(documents: Corpus, path: Path, words: int) -> Corpus:
    """The first words of each document, on disk after the first use.

    Args:
        documents: whole documents.
        path: folder of the corpus that is made.
        words: how many of each are kept.
    """
    if path.exists():
        return Corpus(path)
    cut = (
        {"docno": document["docno"], "text": " ".join(document["text"].split()[:words])}
        for document in documents.get_corpus_iter(verbose=False)
    )
    return Corpus.build(cut, path, fields=["text"], verbose=False)


def clusters(name: str, topics: pd.DataFrame, qrels: pd.DataFrame) -> pd.Series:
    """What queries that are not independent of each other have in common, by qid.

    MedQuAD: pages about the same disease or drug (a page's sections, and pages that share a question). SQuAD: sentences
    that lie in a row. SciFact: claims that share a cited document. NFCorpus: each query is an article of its own.

    Args:
        name: the collection.
        topics: ``qid``, ``query``.
        qrels: ``qid``, ``docno``, ``label``.
    """
    relevant = qrels[(qrels["label"] > 0) & qrels["qid"].isin(topics["qid"])]
    if name == "squad-train-nqg-sentences":
        # question ids count through the articles
        number = topics["qid"].str.extract(r"(\d+)")[0].astype(int)
        return pd.Series((number // _SENTENCES).astype(str).to_numpy(), index=topics["qid"])
    if name == "medquad":
        units = relevant["docno"].str.replace(r"_Sec\d+$", "", regex=True)
    elif name == "scifact":
        units = relevant["docno"]
    else:
        return pd.Series(topics["qid"].to_numpy(), index=topics["qid"])
    qid, qids = pd.factorize(relevant["qid"])
    unit, _ = pd.factorize(units)
    edges = coo_matrix((np.ones(len(qid)), (qid, unit + len(qids))), shape=(len(qids) + unit.max() + 1,) * 2)
    label = connected_components(edges, directed=False)[1]
    # A cluster is named after its first query, so that a name does not depend on the others.
    first = pd.Series(qids).groupby(label[: len(qids)]).min()
    known = pd.Series(first.loc[label[: len(qids)]].to_numpy(), index=qids)
    return known.reindex(topics["qid"]).fillna(pd.Series(topics["qid"].to_numpy(), index=topics["qid"]))


def stable_hash(text: str) -> int:
    """Return 64 bits that a text decides, in every process alike."""
    return xxhash.xxh3_64_intdigest(text.encode())


def some_of(qids: pd.Index, most: int | None) -> pd.Index:
    """Return at most so many queries, always the same ones."""
    if most is None or len(qids) <= most:
        return qids
    keys = [stable_hash(f"some {qid}") for qid in qids]
    return qids[np.sort(np.argsort(keys)[:most])]
