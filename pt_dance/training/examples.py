"""Training rows from topics, qrels and mined negatives.

A row is one (query, positive document) pair with negatives drawn for it. The data set holds row numbers only; texts are
read from the corpus when a batch is made, so memory grows with the number of rows, not with their texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from datasets import Dataset
from scipy.sparse import csr_matrix

from pt_dance.losses.rows import TrainingRows
from pt_dance.mining.readings import Readings


@dataclass
class Examples:
    """What the trainer needs.

    Attributes:
        dataset: One row a training row of every epoch, columns query, positive, negative_1.., negative_query_1..
            (str) and label (int), texts read on access. A list of labels gives their rows, see
            :class:`~pt_dance.losses.TrainingRows`; -1 fills batches up, with the texts of the first row.
        rows: What the loss knows of each row.
        pairs: How many (query, positive) pairs an epoch has.
    """

    dataset: Dataset
    rows: TrainingRows
    pairs: int


class _Texts(Dataset):
    """A data set of row numbers whose other columns are read when a batch is made.

    Labels say more than a row's number where negatives are refreshed, so that they may be larger than the data set;
    sentence-transformers' trainer asks for them as its sampler gives them.
    """

    read: Callable[[np.ndarray], dict[str, list]]

    def __getitem__(self, key):
        """Return the columns of a list of labels; of anything else what the class above would return."""
        return self.read(np.asarray(key)) if isinstance(key, list) else super().__getitem__(key)


def build_examples(
    topics: pd.DataFrame,
    pairs: pd.DataFrame,
    corpus,
    *,
    negatives: pd.DataFrame | None = None,
    query_negatives: pd.DataFrame | None = None,
    negatives_per_row: int = 1,
    query_negatives_per_row: int = 1,
    epochs: int = 1,
    first_epoch: int = 0,
    seed: int = 42,
    qids: pd.Series | None = None,
    teacher=None,
    reads=None,
) -> Examples:
    """Make the training rows of one round.

    Args:
        topics: ``qid``, ``query``; all training topics.
        pairs: Known-relevant pairs of these topics as :func:`pt_dance.mining.positive_pairs` gives them; each is a
            row of every epoch.
        corpus: ``Corpus`` with the documents.
        negatives: Mined documents, ``qid`` and ``docno``; None trains with in-batch negatives only.
        query_negatives: Mined queries, ``docno`` and ``qid``; None where the loss has no dual direction.
        negatives_per_row: Mined documents in a row; rows of queries with fewer are padded, and the padding is masked.
        query_negatives_per_row: Mined queries in a row.
        epochs: Epochs to draw for; each pair meets other negatives in each epoch as long as its pool lasts.
        first_epoch: Which epoch the first one is: the draws go on from those before it.
        seed: Fixes the draw.
        qids: Train on the pairs of these topics only (the masks still know all pairs); None trains on all.
        teacher: ``TeacherScores`` for losses that learn from a teacher.
        reads: ``DualEncoder`` or :class:`pt_dance.mining.Readings`: queries that it reads the same are one query, and
            documents one document, whatever their ids. None compares texts letter by letter.

    Returns:
        The examples.
    """
    readings = Readings.of(reads, corpus)
    texts, query_of_qid = _queries(topics, readings)
    mined = [frame["docno"] for frame in (negatives, query_negatives) if frame is not None]
    document_of = _Documents(corpus, readings, pairs["docno"], mined)
    pair_query = query_of_qid.loc[pairs["qid"]].to_numpy()
    pair_document = document_of(pairs["docno"])
    relevance = csr_matrix(
        (np.ones(len(pairs), dtype=bool), (pair_query, pair_document)), shape=(len(texts), len(corpus))
    )
    if qids is not None:
        chosen = pairs["qid"].isin(qids).to_numpy()
        pair_query, pair_document = pair_query[chosen], pair_document[chosen]
    # topics that read the same, and copies of a document, give the same pair twice
    unique = np.unique(pair_query.astype(np.int64) * len(corpus) + pair_document)
    pair_query, pair_document = unique // len(corpus), unique % len(corpus)
    number = len(unique)
    epoch = np.repeat(np.arange(first_epoch, first_epoch + epochs), number)
    query, positive = np.tile(pair_query, epochs), np.tile(pair_document, epochs)

    def numbers(mined: pd.DataFrame | None) -> tuple[np.ndarray, ...]:
        """Return the queries and the documents of what was mined, nothing where nothing was."""
        return () if mined is None else (query_of_qid.loc[mined["qid"]].to_numpy(), document_of(mined["docno"]))

    rows = TrainingRows(
        query=query.astype(np.int32),
        positive=positive.astype(np.int32),
        negatives=_drawn(numbers(negatives), pair_query, query, epoch, negatives_per_row, seed),
        query_negatives=_drawn(
            numbers(query_negatives)[::-1], pair_document, positive, epoch, query_negatives_per_row, seed + 1
        ),
        relevance=relevance,
        passages=getattr(corpus, "passage_counts", None),
    )
    if teacher is not None:
        rows = teacher.of(rows, texts, corpus)
    return Examples(_lazy_dataset(rows, texts, corpus), rows, number)


def _queries(topics: pd.DataFrame, readings: Readings) -> tuple[list[str], pd.Series]:
    """Return the texts of queries that do not read the same, and which of them each qid has."""
    read = pd.Series(readings.queries(topics["query"]), index=topics.index)
    texts = topics["query"][~read.duplicated()].tolist()
    return texts, pd.Series(pd.factorize(read)[0], index=topics["qid"])


class _Documents:
    """Numbers of documents: of those among the training rows that read the same, the first row in the corpus.

    Where one of these is a positive, it is the first positive, so that the numbers of positives do not depend on what
    was mined.
    """

    def __init__(self, corpus, readings: Readings, positives: pd.Series, mined: list[pd.Series]):
        self._corpus = corpus
        distinct = pd.concat([positives, *mined]).drop_duplicates().tolist()
        self._rows = np.unique(corpus.known_rows(distinct))
        is_mined = ~np.isin(self._rows, corpus.known_rows(positives.drop_duplicates().tolist()))
        order = np.argsort(is_mined, kind="stable")
        _, first, group = np.unique(readings.rows(self._rows)[order], return_index=True, return_inverse=True)
        self._number = np.empty_like(self._rows)
        self._number[order] = self._rows[order[first[group]]]

    def __call__(self, docnos: pd.Series) -> np.ndarray:
        """Return the number of each docno, int64."""
        return self._number[np.searchsorted(self._rows, self._corpus.rows(docnos.tolist()))]


def _drawn(
    mined: tuple[np.ndarray, ...], pair_source: np.ndarray, row_source: np.ndarray, epoch: np.ndarray,
    per_row: int, seed: int,
) -> np.ndarray:  # fmt: skip
    """Return the negatives of every row, int32 (rows, per_row), -1 where the pool has no more; (rows, 0) if none.

    What was mined for a source is its pool, in an order shuffled by the seed. The rows of the source go round it: each
    takes distinct candidates, beginning where the row before ended, in this epoch or the last.
    """
    if not mined or per_row == 0:
        return np.empty((len(row_source), 0), dtype=np.int32)
    source, value = mined
    if not len(value):
        return np.full((len(row_source), per_row), -1, dtype=np.int32)
    # Numbered among themselves: no array is as long as the collection.
    distinct = np.unique(np.concatenate([pair_source, source]))
    pair_source, row_source, source = (np.searchsorted(distinct, part) for part in (pair_source, row_source, source))
    # topics that read the same share a pool, in which a document counts once
    keep = np.unique(source.astype(np.int64) * (int(value.max()) + 1) + value, return_index=True)[1]
    keep = np.sort(keep)[np.random.default_rng(seed).permutation(len(keep))]
    order = keep[np.argsort(source[keep], kind="stable")]
    pools, sizes = value[order], np.bincount(source[order], minlength=len(distinct))
    pairs_of_source = np.bincount(pair_source, minlength=len(distinct))
    before = pd.Series(pair_source).groupby(pair_source).cumcount().to_numpy()
    turn = epoch * pairs_of_source[row_source] + np.tile(before, len(epoch) // len(pair_source))
    size = sizes[row_source][:, None]
    place = turn[:, None] * per_row + np.arange(per_row)
    inside = np.arange(per_row) < size
    at = (np.cumsum(sizes) - sizes)[row_source][:, None] + np.where(inside, place % np.maximum(size, 1), 0)
    return np.where(inside, pools[np.minimum(at, len(pools) - 1)], -1).astype(np.int32)


def _lazy_dataset(rows: TrainingRows, texts: list[str], corpus) -> Dataset:
    """Return a data set of row numbers whose text columns are looked up when a batch is read."""
    query_texts = np.array(texts, dtype=object)

    def of_documents(numbers: np.ndarray) -> list[str]:
        found = np.full(len(numbers), "", dtype=object)
        real = numbers >= 0
        if real.any():
            found[real] = corpus.texts_at(numbers[real])
        return found.tolist()

    def of_passages(name: str, numbers: np.ndarray) -> dict[str, list[str]]:
        """Return a column for each passage of the documents; empty texts where there are fewer."""
        most = rows.passages_per_document
        if most == 1 and rows.passages is None:
            return {name: of_documents(numbers)}
        own = corpus.passage_rows(numbers)
        texts = np.full((len(numbers), most), "", dtype=object)
        at = np.nonzero(own >= 0)
        texts[at] = corpus.passages.texts_at(own[at])
        return {passage_column(name, place): texts[:, place].tolist() for place in range(most)}

    def of_queries(numbers: np.ndarray) -> list[str]:
        return np.where(numbers >= 0, query_texts[np.maximum(numbers, 0)], "").tolist()

    def read(labels: np.ndarray) -> dict[str, list]:
        table, number = rows.of(labels)
        number = np.maximum(number, 0)
        columns: dict[str, list] = {
            "query": of_queries(table.query[number]),
            **of_passages("positive", table.positive[number]),
        }
        for i in range(table.negatives.shape[1]):
            columns |= of_passages(f"negative_{i + 1}", table.negatives[number, i])
        for i in range(table.query_negatives.shape[1]):
            columns[f"negative_query_{i + 1}"] = of_queries(table.query_negatives[number, i])
        columns["label"] = labels.tolist()
        return columns

    dataset = _Texts.from_dict({"label": np.arange(len(rows))})
    dataset = dataset.with_transform(lambda batch: read(np.asarray(batch["label"])))
    dataset.read = read
    return dataset


def columns_of(rows: TrainingRows) -> dict[str, str]:
    """Return the text columns of a training row and what each holds, "query" or "document", as losses read them."""
    documents = ["positive", *(f"negative_{i + 1}" for i in range(rows.negatives.shape[1]))]
    columns = {"query": "query"}
    columns |= {
        passage_column(name, place): "document" for name in documents for place in range(rows.passages_per_document)
    }
    columns |= {f"negative_query_{i + 1}": "query" for i in range(rows.query_negatives.shape[1])}
    return columns


def passage_column(name: str, place: int) -> str:
    """Return the column of a passage; sentence-transformers takes a column for all that begin with its name."""
    return name if place == 0 else f"passage_{place + 1}_of_{name}"
