"""A teacher's scores for training rows, each (query, text) pair scored once and kept on disk."""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyterrier as pt

from pt_dance.losses.rows import TrainingRows
from pt_dance.mining.sources import describe_source
from pt_dance.storage import options
from pt_dance.storage.digests import texts_digest
from pt_dance.storage.progress import progress_bar

_BLOCK = 4096


class TeacherScores:
    """Score pairs with a teacher, and keep the scores by the texts of the pair and by the teacher's identity.

    Memory is bounded by a block of pairs; what is known lies in an SQLite file, which a killed fit leaves intact.

    Args:
        teacher: any PyTerrier pipeline that scores rows of ``qid``, ``query``, ``docno`` and ``text``.
        path: the SQLite file; made when missing.
        verbose: shows a progress bar.
    """

    def __init__(self, teacher: pt.Transformer, path: str | Path, *, verbose: bool = False):
        self.teacher = teacher
        self.path = options.path_of(path)
        self.verbose = verbose
        self._identity = teacher_identity(teacher).encode()

    def of(self, rows: TrainingRows, query_texts: list[str], corpus) -> TrainingRows:
        """Return the same rows with the teacher's scores of their positives, document negatives and query negatives.

        Args:
            rows: training rows; entries of -1 (no negative) get the score 0, which every loss masks.
            query_texts: text of each query number.
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
                for start in range(0, len(queries), _BLOCK):
                    part = slice(start, start + _BLOCK)
                    frame = pd.DataFrame(
                        {
                            "qid": queries[part].astype(str),
                            "query": [query_texts[q] for q in queries[part]],
                            "docno": corpus.docno(documents[part]),
                            "text": corpus.texts_at(documents[part]),
                        }
                    )
                    scores[part] = self._block(store, frame)
                    bar.update(len(frame))
            except sqlite3.OperationalError:
                raise  # a full disk or another process: nothing is wrong with the file
            except sqlite3.DatabaseError as error:
                raise ValueError(
                    f"{str(self.path)!r} is damaged ({error}); remove it, and the teacher is asked again"
                ) from None
        return scores

    def _block(self, store: sqlite3.Connection, frame: pd.DataFrame) -> np.ndarray:
        keys = [self._key(query, text) for query, text in zip(frame["query"], frame["text"], strict=True)]
        known: dict[bytes, float] = {}
        for start in range(0, len(keys), 500):
            part = keys[start : start + 500]
            marks = ",".join("?" * len(part))
            known.update(store.execute(f"SELECT pair, score FROM scores WHERE pair IN ({marks})", part).fetchall())
        missing = pd.Series([key not in known for key in keys]) & ~pd.Series(keys).duplicated()
        if missing.any():
            new = self._ask(frame[missing.to_numpy()].reset_index(drop=True))
            new_keys = [key for key, is_new in zip(keys, missing, strict=True) if is_new]
            store.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", zip(new_keys, new.tolist(), strict=True))
            store.commit()
            known.update(zip(new_keys, new.tolist(), strict=True))
        return np.array([known[key] for key in keys], dtype=np.float32)

    def _ask(self, frame: pd.DataFrame) -> np.ndarray:
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

    def _key(self, query: str, text: str) -> bytes:
        return texts_digest(query, text, start=self._identity)


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
