"""What is measured of an encoder: its own collection in both directions, others zero-shot, and its space."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import faiss
import ir_measures
import numpy as np
import pandas as pd
import pyterrier as pt
import torch
import xxhash
from ir_measures import RR, R, nDCG

from evidence.data import Collection, beginnings, some_of
from evidence.protocol import ZERO_SHOT
from pt_dance import Corpus, DualEncoder, bm25

MEASURES = (nDCG @ 10, RR @ 10, R @ 100)
BACKWARDS = "d→q nDCG@10"
_BLOCK = 2048


class Target:
    """Queries and documents that encoders are measured on; texts are read once, tokens of static towers kept on disk.

    Args:
        name: tells tokens of one target from another's.
        documents: whole documents, which BM25 reads.
        corpus: their beginnings, which encoders read.
        topics: ``qid``, ``query``.
        qrels: judgements, with their grades.
        folder: where tokens are kept.
    """

    def __init__(
        self, name: str, documents: Corpus, corpus: Corpus, topics: pd.DataFrame, qrels: pd.DataFrame, folder: Path
    ) -> None:
        self.name, self.documents, self.corpus, self.folder = name, documents, corpus, folder
        self.topics = topics.drop_duplicates("qid").reset_index(drop=True)
        self.qrels = qrels[qrels["qid"].isin(self.topics["qid"])].reset_index(drop=True)
        self.docnos = np.array(corpus.docno(np.arange(len(corpus))), dtype=object)

    def vectors(self, encoder: DualEncoder) -> tuple[np.ndarray, np.ndarray]:
        """Query vectors and document vectors, float32."""
        queries = self.topics["query"].tolist()
        if not encoder.is_static:
            rows = np.arange(len(self.corpus))
            return encoder.encode_queries(queries), encoder.encode_docs(self.corpus.texts_at(rows))
        return self._static(encoder, "query", queries), self._static(encoder, "document", None)

    def _static(self, encoder: DualEncoder, task: str, texts: list[str] | None) -> np.ndarray:
        ids, start = self._tokens(encoder, task, texts)
        vectors = np.empty((len(start) - 1, encoder.dim), dtype=np.float32)
        with torch.no_grad():
            for first in range(0, len(vectors), _BLOCK):
                last = min(first + _BLOCK, len(vectors))
                features: dict = {
                    "input_ids": torch.from_numpy(ids[start[first] : start[last]].astype(np.int64)),
                    "offsets": torch.from_numpy((start[first:last] - start[first]).astype(np.int64)),
                }
                features = {key: value.to(encoder.device) for key, value in features.items()}
                if encoder.has_two_towers:
                    features["task"] = task
                vectors[first:last] = encoder.model(features)["sentence_embedding"].cpu().numpy()
        return vectors

    def _tokens(self, encoder: DualEncoder, task: str, texts: list[str] | None) -> tuple[np.ndarray, np.ndarray]:
        first = encoder.model[0]
        tower = first.sub_modules[task][0] if encoder.has_two_towers else first
        key = xxhash.xxh3_64_hexdigest(f"{self.name} {task} {len(self.topics)} {tower.tokenizer.to_str()}".encode())
        file = self.folder / f"tokens-{key}.npz"
        if not file.exists():
            if texts is None:
                texts = self.corpus.texts_at(np.arange(len(self.corpus)))
            found = [
                np.array(one.ids, np.int32) for one in tower.tokenizer.encode_batch(texts, add_special_tokens=False)
            ]
            start = np.concatenate([[0], np.cumsum([len(one) for one in found])])
            beside = file.with_suffix(f".{task}.{os.getpid()}.new.npz")
            np.savez(beside, ids=np.concatenate(found), start=start)
            beside.rename(file)
        with np.load(file) as stored:
            return stored["ids"], stored["start"]


def own_target(collection: Collection, part: str) -> Target:
    """The reported or the tuning queries of a training collection."""
    topics, qrels = getattr(collection, part)
    name = f"{collection.name} {part}"
    return Target(name, collection.documents, collection.corpus, topics, qrels, collection.folder)


@lru_cache
def zero_shot_target(name: str, data: Path, folder: Path, most: int, words: int) -> Target:
    """A collection that nothing was trained on, whole, with a fixed part of its queries where there are many."""
    dataset = pt.get_dataset(f"dance:{data / name}")
    folder = folder / "zero-shot" / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "corpus"
    documents = Corpus(path) if path.exists() else Corpus.build(dataset, path, verbose=False)
    corpus = beginnings(documents, folder / "beginnings", words)
    topics, qrels = dataset.get_topics(ZERO_SHOT[name]), dataset.get_qrels(ZERO_SHOT[name])
    judged = qrels.loc[qrels["label"] > 0, "qid"]
    topics = topics[topics["qid"].isin(judged)]
    kept = some_of(pd.Index(topics["qid"]), most)
    return Target(name, documents, corpus, topics[topics["qid"].isin(kept)], qrels, folder)


def ranking(queries: np.ndarray, documents: np.ndarray, qids, docnos: np.ndarray, depth: int) -> pd.DataFrame:
    """The best documents of each query by dot product, in ir_measures' columns."""
    index = faiss.IndexFlatIP(documents.shape[1])
    index.add(np.ascontiguousarray(documents))
    depth = min(depth, len(documents))
    scores, rows = index.search(np.ascontiguousarray(queries), depth)
    return pd.DataFrame(
        {
            "query_id": np.repeat(np.asarray(qids, dtype=object), depth),
            "doc_id": docnos[rows.ravel()],
            "score": scores.ravel(),
        }
    )


def per_query(run: pd.DataFrame, qrels: pd.DataFrame, measures: tuple, collection: str) -> pd.DataFrame:
    """A row a query and measure: collection, measure, qid, value (float32)."""
    judged = qrels.rename(columns={"qid": "query_id", "docno": "doc_id", "label": "relevance"})
    values = [
        (collection, str(one.measure), one.query_id, one.value)
        for one in ir_measures.iter_calc(measures, judged[["query_id", "doc_id", "relevance"]], run)
    ]
    frame = pd.DataFrame(values, columns=["collection", "measure", "qid", "value"])
    return frame.assign(value=frame["value"].astype("float32"))


def measure_own(target: Target, encoder: DualEncoder, *, only_main: bool = False) -> pd.DataFrame:
    """Measures of every query, and with ``BACKWARDS`` of every relevant document that searches the queries."""
    queries, documents = target.vectors(encoder)
    measures = MEASURES[:1] if only_main else MEASURES
    run = ranking(queries, documents, target.topics["qid"], target.docnos, 10 if only_main else 100)
    found = per_query(run, target.qrels, measures, target.name.split()[0])
    if only_main:
        return found
    relevant = target.qrels[(target.qrels["label"] > 0) & target.qrels["docno"].isin(target.docnos)]
    sources = relevant["docno"].drop_duplicates().to_numpy(dtype=object)
    rows = target.corpus.rows(sources.tolist())
    back = ranking(documents[rows], queries, sources, target.topics["qid"].to_numpy(dtype=object), 10)
    reverse = relevant.rename(columns={"qid": "docno", "docno": "qid"})
    backwards = per_query(back, reverse, MEASURES[:1], target.name.split()[0]).assign(measure=BACKWARDS)
    return pd.concat([found, backwards], ignore_index=True)


def score(target: Target, encoder: DualEncoder) -> float:
    """Mean nDCG@10 of a target's queries."""
    return float(measure_own(target, encoder, only_main=True)["value"].mean())


def measure_zero_shot(targets: list[Target], encoder: DualEncoder) -> pd.DataFrame:
    """nDCG@10 of every query of every target."""
    parts = []
    for target in targets:
        run = ranking(*target.vectors(encoder), target.topics["qid"], target.docnos, 10)
        parts.append(per_query(run, target.qrels, MEASURES[:1], target.name))
    return pd.concat(parts, ignore_index=True)


def measure_bm25(target: Target, folder: Path, measures: tuple) -> pd.DataFrame:
    """The same of BM25."""
    found = (bm25(target.documents, folder / f"bm25-{len(target.documents)}") % 100)(target.topics[["qid", "query"]])
    run = found.rename(columns={"qid": "query_id", "docno": "doc_id"})[["query_id", "doc_id", "score"]]
    return per_query(run, target.qrels, measures, target.name.split()[0])
