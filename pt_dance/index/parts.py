"""Shards of an index that an engine's workers encode, each into a file of its own beside the index under construction.

A worker reads its documents from the corpus's files. A part gets its name when it is whole: the rows of the corpus it
is of, a digest of the corpus and the settings, and one of the documents as the journal has it. So parts of a call that
was killed are used by the next one, and a worker that outlives its program does no harm: it writes the same bytes, or
finds the folder gone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pt_dance.corpus.corpus import Corpus
from pt_dance.index.files import row_bytes
from pt_dance.index.shards import SHARD_CHARACTERS, ShardReader, digest_of_shard
from pt_dance.index.writer import IndexWriter
from pt_dance.storage.devices import is_on, own_device
from pt_dance.storage.digests import text_id
from pt_dance.storage.engine import Engine, WorkerDiedError
from pt_dance.storage.folders import remove_folder

PARTS = "parts"
_CAREFUL_FROM = 3  # deaths of workers at a part, after which its documents are tried one by one


@dataclass(frozen=True)
class Part:
    """Rows of a corpus that make up a shard."""

    number: int
    first: int
    count: int

    def __str__(self) -> str:
        return f"shard {self.number} (documents {self.first:,} to {self.first + self.count - 1:,})"


def plan(corpus: Corpus, field: str, first: int, size: int, number: int) -> Iterator[Part]:
    """Cut a corpus from a row on into the shards that :meth:`ShardReader.read` would give.

    Args:
        corpus: The documents.
        field: What is encoded of them.
        first: The row to begin with.
        size: Documents in a shard.
        number: Of the first shard, for messages.
    """
    while first < len(corpus):
        rows = range(first, min(first + size, len(corpus)))
        count = len(rows)
        # No text has more characters than bytes.
        if corpus.field_bytes(field, rows) >= SHARD_CHARACTERS:
            lengths = itertools.accumulate(map(len, corpus.field_at(field, rows)))
            count = next((n for n, total in enumerate(lengths, 1) if total >= SHARD_CHARACTERS), count)
        yield Part(number, first, count)
        first, number = first + count, number + 1


class PartWriter:
    """Encode parts and write them, in a worker.

    Args:
        folder: Where parts are written; exists.
        key: Of the corpus and the settings.
        corpus: The documents.
        encoder: Encodes them.
        device: Where; the worker's own GPU, if it has one, where None.
        settings: ``text_field``, ``precision``, ``vec_size`` and ``vec_dtype`` of the index.
    """

    def __init__(
        self, folder: Path, key: str, corpus: Corpus, encoder: Any, device: str | None, settings: dict[str, Any]
    ) -> None:
        self.folder, self.key, self.corpus, self.encoder, self.settings = folder, key, corpus, encoder, settings
        self.device = device

    def __call__(self) -> Any:
        """Get ready, in the worker; return what writes a part."""
        # A copy, since the worker may be the process that has the encoder.
        self.encoder = _on(self.encoder, self.device or own_device())
        return self.write

    def write(self, part: Part) -> str:
        """Write a part; return the name of its file.

        Raises:
            RuntimeError: If a document cannot be encoded; names it.
            ValueError: If it gets no finite vector; names it.
        """
        documents = self.corpus.get_corpus_iter(False, part.first, part.count)
        reader = ShardReader(documents, self.encoder, self.settings["text_field"], part.count, context=None)
        reader.precision = self.settings["precision"]
        shard = reader.read(part.count)
        name = f"{part.first}-{part.count}-{self.key}"
        tries = self.folder / f"{name}.tries"
        with open(tries, "a", encoding="utf-8") as log:
            log.write("try\n")
        if tries.read_text(encoding="utf-8").count("try\n") >= _CAREFUL_FROM:
            self._encode_one_by_one(shard, tries)
        try:
            vectors = reader.vectors(shard, self.settings["vec_size"], self.settings["vec_dtype"])
        except ValueError as error:
            raise ValueError(f"{error} ({part})") from error
        except Exception as error:
            raise RuntimeError(f"{self._culprit(shard)} of {part} cannot be encoded: {error}") from error
        whole = self.folder / f"{name}-{digest_of_shard(shard)}"
        beside = self.folder / f"{uuid.uuid4().hex}.new"
        with open(beside, "wb") as out:
            out.write(vectors.data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(beside, whole)
        tries.unlink(missing_ok=True)
        return whole.name

    def _encode_one_by_one(self, shard: list[tuple[str, Any]], tries: Path) -> None:
        """Note which document is encoded before it is: one that kills the worker is the last one noted."""
        for docno, text in shard:
            with open(tries, "a", encoding="utf-8") as log:
                log.write(f"at {docno}\n")
            self.encoder.encode_docs([text], precision=self.settings["precision"])
        with open(tries, "a", encoding="utf-8") as log:
            log.write("all\n")

    def _culprit(self, shard: list[tuple[str, Any]]) -> str:
        for docno, text in shard:
            try:
                self.encoder.encode_docs([text], precision=self.settings["precision"])
            except Exception:
                return f"document {docno!r}"
        return "a batch"


def write_parts(engine: Engine, writer: IndexWriter, documents: ShardReader, progress: Callable[[int], object]) -> None:
    """Encode what is left of a corpus by an engine and add its shards to an index.

    Args:
        engine: Has the workers.
        writer: Of the index under construction, whose shards before are confirmed.
        documents: A corpus, read up to there.
        progress: Called with the number of documents of every shard.

    Raises:
        WorkerDiedError: If workers died again and again at one shard; names it, and the document where that is known.
    """
    corpus, field = documents.source, documents.text_field
    folder = writer.folder / PARTS
    folder.mkdir(exist_ok=True)
    key = text_id(json.dumps([corpus.fingerprint, writer.settings]))
    there = _whole_parts(folder, key, row_bytes(writer.vec_dtype, writer.vec_size))
    planned = partial(plan, corpus, field, documents.position, documents.shard_size, len(writer.shards))
    settings: dict[str, Any] = {"text_field": field, "precision": documents.precision}
    settings |= {"vec_size": writer.vec_size, "vec_dtype": writer.vec_dtype}
    # It may be sent to where no GPU is.
    work = PartWriter(folder, key, corpus, _on(documents.encoder, "cpu"), engine.device, settings)
    missing = (part for part in planned() if (part.first, part.count) not in there)
    written = engine.map(work, missing, "the encoder")
    try:
        for part in planned():
            name = there.get((part.first, part.count)) or next(written)
            docnos = corpus.docno(range(part.first, part.first + part.count)).tolist()
            writer.check_docnos(docnos)
            vectors = np.fromfile(folder / name, dtype=np.dtype(writer.vec_dtype).newbyteorder("<"))
            writer.add(docnos, vectors.reshape(part.count, -1), name.rpartition("-")[2])
            (folder / name).unlink()
            progress(part.count)
    except WorkerDiedError as error:
        raise WorkerDiedError(_at_what(folder, planned()) or str(error)) from None
    finally:
        written.close()
    remove_folder(folder)


def _whole_parts(folder: Path, key: str, bytes_each: int) -> dict[tuple[int, int], str]:
    """Return the names of whole parts by first row and number of rows; remove everything else."""
    whole: dict[tuple[int, int], str] = {}
    for file in folder.iterdir():
        first, _, rest = file.name.partition("-")
        count, _, rest = rest.partition("-")
        with contextlib.suppress(ValueError):
            if rest.startswith(f"{key}-") and file.stat().st_size == int(count) * bytes_each:
                whole[int(first), int(count)] = file.name
                continue
        file.unlink()
    return whole


def _on(encoder: Any, device: str) -> Any:
    """Return an encoder that is on a device; a copy, unless the given one is."""
    if is_on(str(encoder.device), device):
        return encoder
    copied = encoder.copy()
    copied.model.to(device)
    return copied


def _at_what(folder: Path, parts: Iterable[Part]) -> str | None:
    """Say at what the workers died: the part that was tried most often, and its document where it was noted last."""
    by_rows = {(part.first, part.count): part for part in parts}
    worst: Part | None = None
    lines: list[str] = []
    for file in folder.glob("*.tries"):
        first, count, _ = file.name.split("-")
        found = file.read_text(encoding="utf-8").splitlines()
        if found.count("try") > lines.count("try"):
            worst, lines = by_rows.get((int(first), int(count))), found
    if worst is None:
        return None
    last = lines[-1].removeprefix("at ") if lines[-1].startswith("at ") else None
    what = str(worst) if last is None else f"document {last!r} of {worst}"
    return (
        f"{what} ended every worker that encoded it ({lines.count('try')} of them): look at its text and at the memory "
        "a worker has; what was finished is kept"
    )
