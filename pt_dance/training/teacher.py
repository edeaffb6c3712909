"""A teacher's scores for training rows, each (query, text) pair scored once and kept on disk."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyterrier as pt

from pt_dance.losses.rows import TrainingRows
from pt_dance.mining.sources import describe_source
from pt_dance.storage import options
from pt_dance.storage.digests import texts_digest
from pt_dance.storage.engine import check_engine, run
from pt_dance.storage.progress import progress_bar

_BLOCK = 4096


class TeacherScores:
    """Score pairs with a teacher, and keep the scores by the texts of the pair and by the teacher's identity.

    Memory is bounded by a block of pairs; what is known lies in an SQLite file, which a killed fit leaves intact.

    Args:
        teacher: Any PyTerrier pipeline that scores rows of ``qid``, ``query``, ``docno`` and ``text``.
        path: The SQLite file; made when missing.
        engine: :class:`pt_dance.engines.Ray`, whose workers ask the teacher; one that cannot be sent to them is made
            there by a :class:`pt_dance.engines.LazyPipeline`. None asks in this process.
        verbose: Shows a progress bar.
    """

    def __init__(self, teacher: pt.Transformer, path: str | Path, *, engine: Any = None, verbose: bool = False):
        self.teacher = teacher
        self.engine = check_engine(engine)
        self.path = options.path_of(path)
        self.verbose = verbose
        self._identity = teacher_identity(teacher).encode()

    def of(self, rows: TrainingRows, query_texts: list[str], corpus) -> TrainingRows:
        """Return the same rows with the teacher's scores of their positives, document negatives and query negatives.

        Args:
            rows: Training rows; entries of -1 (no negative) get the score 0, which every loss masks.
            query_texts: Text of each query number.
            corpus: ``Corpus`` with the documents.

        Returns:
            A copy with ``teacher_positive`` float32 (rows,), ``teacher_negatives`` (rows, n) and
            ``teacher_query_negatives`` (rows, m) set.
        """
        columns = [
            (rows.query[:, None], rows.positive[:, None]),
            (np.broadcast_to(rows.query[:, None], rows.negatives.shape), rows.negatives),
            (rows.query_negatives, np.broadcast_to(rows.positive[:, None], rows.query_negatives.shape)),
        ]
        width = np.int64(len(corpus))
        keys = [np.where((q < 0) | (d < 0), -1, q.astype(np.int64) * width + d) for q, d in columns]
        distinct = np.unique(np.concatenate([key.ravel() for key in keys]))
        distinct = distinct[distinct >= 0]
        scores = self._scores(distinct // width, distinct % width, query_texts, corpus)
        found = [
            np.where(key < 0, 0, scores[np.minimum(np.searchsorted(distinct, key), len(distinct) - 1)]) for key in keys
        ]
        return replace(
            rows,
            teacher_positive=found[0][:, 0].astype(np.float32),
            teacher_negatives=found[1].astype(np.float32),
            teacher_query_negatives=found[2].astype(np.float32),
        )

    def _scores(self, queries: np.ndarray, documents: np.ndarray, query_texts: list[str], corpus) -> np.ndarray:
        scores = np.empty(len(queries), dtype=np.float32)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        bar = progress_bar(self.verbose, "teacher", len(queries), unit="pair")
        with bar, contextlib.closing(sqlite3.connect(self.path)) as store:
            try:
                store.execute("CREATE TABLE IF NOT EXISTS scores (pair BLOB PRIMARY KEY, score REAL) WITHOUT ROWID")
                self._ask_missing(store, scores, queries, documents, query_texts, corpus, bar.update)
            except sqlite3.OperationalError:
                raise  # a full disk or another process: nothing is wrong with the file
            except sqlite3.DatabaseError as error:
                raise ValueError(
                    f"{str(self.path)!r} is damaged ({error}); remove it, and the teacher is asked again"
                ) from None
        return scores

    def _ask_missing(
        self, store: sqlite3.Connection, scores: np.ndarray, queries: np.ndarray, documents: np.ndarray,
        query_texts: list[str], corpus, progress: Callable[[int], object],
    ) -> None:  # fmt: skip
        """Fill in the scores of all pairs, asking for those that are not in the store."""
        asked: set[bytes] = set()  # by blocks that are not answered yet
        waiting: deque[tuple[slice, list[bytes], list[bytes]]] = deque()

        def questions() -> Iterator[Question]:
            for start in range(0, len(queries), _BLOCK):
                part = slice(start, start + _BLOCK)
                texts = [query_texts[q] for q in queries[part]]
                keys = [self._key(*pair) for pair in zip(texts, corpus.texts_at(documents[part]), strict=True)]
                known = self._known(store, keys)
                new = {key: place for place, key in reversed(list(enumerate(keys))) if key not in known}
                new = {key: place for key, place in new.items() if key not in asked}
                if not new and all(key in known for key in keys):
                    fill(part, keys, known)
                    continue
                asked.update(new)
                places = sorted(new.values())
                waiting.append((part, keys, [keys[place] for place in places]))
                rows = [start + place for place in places]
                yield Question(queries[rows], [texts[place] for place in places], documents[rows])

        def fill(part: slice, keys: list[bytes], known: dict[bytes, float]) -> None:
            scores[part] = [known[key] for key in keys]
            progress(len(keys))

        what = f"the teacher {self.teacher!r}"
        for answer in run(self.engine, Asking(self.teacher, corpus), questions(), what):
            part, keys, new_keys = waiting.popleft()
            found = zip(new_keys, answer.tolist(), strict=True)
            store.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", found)
            store.commit()
            asked.difference_update(new_keys)
            fill(part, keys, self._known(store, keys))

    @staticmethod
    def _known(store: sqlite3.Connection, keys: list[bytes]) -> dict[bytes, float]:
        known: dict[bytes, float] = {}
        for start in range(0, len(keys), 500):
            part = keys[start : start + 500]
            marks = ",".join("?" * len(part))
            known.update(store.execute(f"SELECT pair, score FROM scores WHERE pair IN ({marks})", part).fetchall())
        return known

    def _key(self, query: str, text: str) -> bytes:
        return texts_digest(query, text, start=self._identity)


@dataclass(frozen=True)
class Question:
    """Pairs to be scored: query numbers, their texts, and rows of the corpus."""

    queries: np.ndarray
    texts: list[str]
    documents: np.ndarray


class Asking:
    """Asks a teacher, in a worker or in this process.

    Args:
        teacher: Scores rows of ``qid``, ``query``, ``docno`` and ``text``.
        corpus: Has the texts.
    """

    def __init__(self, teacher: pt.Transformer, corpus: Any) -> None:
        self.teacher, self.corpus = teacher, corpus

    def __call__(self) -> Callable[[Question], np.ndarray]:
        """Return what gives the scores of a question's pairs, float64 (pairs,)."""
        return self._answer

    def _answer(self, question: Question) -> np.ndarray:
        if not len(question.texts):
            return np.empty(0)
        frame = pd.DataFrame(
            {
                "qid": question.queries.astype(str),
                "query": question.texts,
                "docno": self.corpus.docno(question.documents),
                "text": self.corpus.texts_at(question.documents),
            }
        )
        answer: pd.DataFrame = self.teacher(frame)
        if "score" not in answer.columns or len(answer) != len(frame):
            raise ValueError(
                f"the teacher {self.teacher!r} must give a column 'score' and every row back; it gave {len(answer)} "
                f"rows for {len(frame)}, with columns {list(answer.columns)}"
            )
        asked = pd.MultiIndex.from_frame(frame[["qid", "docno"]])
        scores = answer.set_index(["qid", "docno"])["score"].loc[asked].to_numpy(float)
        if not np.isfinite(scores).all():
            row = frame[~np.isfinite(scores)].iloc[0]
            raise ValueError(
                f"the teacher {self.teacher!r} scored docno {row.docno!r} for {row['query']!r} with no finite number"
            )
        return scores


def teacher_identity(teacher: pt.Transformer) -> str:
    """Return what tells one teacher's scores from another's.

    That is its weights where it has a ``fingerprint``, stage by stage; else its repr and the code of its functions.
    """
    fingerprint = getattr(teacher, "fingerprint", None)
    if fingerprint is not None:
        return f"{type(teacher).__name__}:{fingerprint}"
    if isinstance(teacher, pt.Transformer) and hasattr(teacher, "_transformers"):
        return " >> ".join(teacher_identity(stage) for stage in teacher._transformers)
    return describe_source(teacher)
