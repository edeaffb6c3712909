"""What a run keeps of its training for those who look at it later: the positives, and what made it."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from pt_dance.training.negatives import are_new
from pt_dance.training.run_folder import RunFolder

_NAME = "positives"
_PACKAGES = ("pt_dance", "pyterrier", "sentence-transformers", "transformers", "torch", "datasets")


def write_record(run: RunFolder, topics: pd.DataFrame, pairs: pd.DataFrame) -> None:
    """Keep the relevant pairs with their queries' texts, the command and the versions; those of the first call."""
    if (run.round(0) / f"{_NAME}.parquet").exists():
        return
    texts = topics[["qid", "query"]].drop_duplicates("qid")
    about = {
        "queries": int(pairs["qid"].nunique()),
        "pairs": len(pairs),
        "command": "a notebook" if "ipykernel" in sys.modules else shlex.join(sys.argv),
        "versions": {"Python": platform.python_version(), **_versions()},
    }
    run.write_frame(0, _NAME, pairs[["qid", "docno"]].merge(texts, on="qid"), about)


def read_record(run: RunFolder) -> tuple[pd.DataFrame, dict] | None:
    """Return ``qid``, ``docno``, ``query`` of the positives, and what made the run; None where it was not kept."""
    return run.read_frame(0, _NAME)


def read_about(run: RunFolder) -> dict | None:
    """Return what made the run, without the positives; None where it was not kept."""
    path = run.round(0) / f"{_NAME}.parquet"
    if not path.exists():
        return None
    try:
        return json.loads(pq.read_schema(path).metadata[b"about"])
    except Exception:  # whatever is wrong with the file, read_record says so to whoever needs what is in it
        return None


def source_of(run: RunFolder, number: int) -> str:
    """Name where a round's negatives came from, without the digests that tell functions apart."""
    return re.sub(r"#[0-9a-f]{8}\b", "", str((run.settings() or {}).get(f"round {number} negatives", "")))


def read_negatives(run: RunFolder, number: int, corpus: Any = None) -> pd.DataFrame:
    """Return the document negatives that a round mined.

    Args:
        run: The run's folder.
        number: The round's number.
        corpus: Where texts come from; without it the frame has none.

    Returns:
        ``qid``, ``query``, ``docno``, ``text``, ``rank`` (from 0) and ``score`` of the source, ``source``, and
        ``new``: whether the last round before that mined did not have it; all are new in the first.

    Raises:
        ValueError: If the round mined none.
    """
    if (stored := run.read_frame(number, "negatives")) is None:
        raise ValueError(
            f"round {number} of {str(run.path)!r} has no mined negatives; see history for the rounds it has"
        )
    frame, record = stored[0], read_record(run)
    queries = pd.Series(dtype=object) if record is None else record[0].drop_duplicates("qid").set_index("qid")["query"]
    earlier = next((f for n in range(number - 1, 0, -1) if (f := run.read_frame(n, "negatives"))), None)
    new: bool | np.ndarray = True
    if earlier is not None:
        new = are_new(frame, earlier[0])
    frame = frame.assign(query=frame["qid"].map(queries), source=source_of(run, number), new=new)
    frame = frame[["qid", "query", "docno", "rank", "score", "source", "new"]]
    if corpus is not None:
        distinct = frame["docno"].drop_duplicates().tolist()
        frame.insert(3, "text", frame["docno"].map(dict(zip(distinct, corpus.texts(distinct), strict=True))))
    return frame


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # a checkout that was not installed
            found[package] = version(package)
    return found
