"""Documents in Parquet and JSONL files, read in order and, on demand, parsed and checked by several processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pt_dance.corpus.json_lines import BROKEN, broken_file, json_object, open_lines
from pt_dance.corpus.records import block_of, columns_of, row_of
from pt_dance.storage import options
from pt_dance.storage.engine import in_order
from pt_dance.storage.progress import progress_bar

_PARQUET, _JSON_LINES = (".parquet",), (".jsonl", ".jsonl.gz")
_CHUNK_BYTES = 1 << 20
_CHUNK_ROWS = 1000
# Chunks that are read ahead, for each worker: one that it parses, one that waits.
_AHEAD = 2


@dataclass
class Chunk:
    """Some documents of a file as they are stored there.

    Args:
        path: The file.
        first: The number of the first line, from 1, or row, from 0.
        content: Whole lines, or an Arrow batch.
    """

    path: Path
    first: int
    content: Any

    def documents(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield where each document stands, and its fields."""
        if not isinstance(self.content, bytes):
            names = self.content.schema.names
            columns = (column.to_pylist() for column in self.content.columns)
            for number, values in enumerate(zip(*columns, strict=True), self.first):
                yield f"row {number}", dict(zip(names, values, strict=True))
            return
        for number, line in enumerate(self.content.split(b"\n"), self.first):
            if line and not line.isspace():
                yield f"line {number}", json_object(line, self.path, number)


class DocumentFiles:
    """Parquet and JSONL files whose documents, in the files' order, make a corpus.

    A document has a ``docno``, or else an ``_id`` as in BEIR's files; whole numbers are taken as strings.

    Args:
        paths: The files, ``.parquet``, ``.jsonl`` or ``.jsonl.gz``.

    Raises:
        FileNotFoundError: If one is not there.
        ValueError: If one has another suffix, or is named twice.
    """

    def __init__(self, paths: Sequence[Any]) -> None:
        self.paths = [options.path_of(path, "documents") for path in paths]
        self._starts: list[int] = []  # the row of each file's first document, of those read so far
        for number, path in enumerate(self.paths):
            if not path.name.endswith((*_PARQUET, *_JSON_LINES)):
                raise ValueError(f"{path} is no file of documents: its name must end in .parquet, .jsonl or .jsonl.gz")
            if not path.is_file():
                raise FileNotFoundError(f"{path} is not there, or is no file")
            if path in self.paths[:number]:
                raise ValueError(f"{path} is given twice: name each file once")

    @classmethod
    def of(cls, source: Any) -> DocumentFiles | None:
        """Return the files where the source is a list of paths, None where it is something else.

        Raises:
            TypeError: If it is one path of such a file, or of a folder with such files.
        """
        if isinstance(source, (list, tuple)) and source and all(isinstance(p, (str, os.PathLike)) for p in source):
            return cls(source)
        if isinstance(source, (str, os.PathLike)) and _has_files(options.path_of(source, "documents")):
            raise TypeError(
                "files of documents come as a list of paths, e.g. sorted(pathlib.Path(folder).glob('*.parquet')), not "
                f"as a {type(source).__name__}"
            )
        return None

    def blocks(
        self, fields: Sequence[str], separator: str, *, workers: int = 1, verbose: bool = False, desc: str = "documents"
    ) -> Iterator[Any]:
        """Yield the rows of all documents as Arrow batches, as :func:`pt_dance.corpus.records.block_of` makes them.

        This process reads (and decompresses) the files, a chunk at a time, so that memory holds a few chunks for each
        worker. With one worker it parses and checks them, too.

        Args:
            fields: Fields of a document.
            separator: What stands between two of them.
            workers: How many processes parse and check.
            verbose: Whether to show a progress bar.
            desc: What the bar says.

        Raises:
            TypeError: If a docno or field is no string.
            ValueError: If a file is broken or a document invalid; names the file, and its line or row.
            RuntimeError: If a worker was killed or could not start.
        """
        self._starts = []
        count, others = 0, iter(self.paths)
        parse = partial(_parsed, fields=fields, separator=separator)
        chunks = (chunk for path in self.paths for chunk in _chunks(path, fields))
        parsed = _in_processes(parse, chunks, workers) if workers > 1 else (parse(chunk) for chunk in chunks)
        with contextlib.closing(parsed), progress_bar(verbose, desc, None) as bar:
            at = None
            for path, block in parsed:
                while at != path:  # a file without documents has no chunk
                    at = next(others)
                    self._starts.append(count)
                count += len(block)
                yield block
                bar.update(len(block))

    def file_of(self, row: int) -> Path:
        """Return the file of a row of the blocks that were yielded."""
        return self.paths[bisect_right(self._starts, row) - 1]


def _has_files(path: Path) -> bool:
    suffixes = (*_PARQUET, *_JSON_LINES)
    if path.is_dir():
        return any(file.name.endswith(suffixes) for file in path.iterdir())
    return path.name.endswith(suffixes)


def _chunks(path: Path, fields: Sequence[str]) -> Iterator[Chunk]:
    return _batches(path, fields) if path.name.endswith(_PARQUET) else _lines(path)


def _lines(path: Path) -> Iterator[Chunk]:
    number = 1
    with open_lines(path) as file:
        try:
            if path.suffix == ".gz" and not path.stat().st_size:
                raise EOFError("it is empty, which no compressed file is")
            while content := file.read(_CHUNK_BYTES) + file.readline():
                yield Chunk(path, number, content)
                number += content.count(b"\n")
        except BROKEN as error:
            raise broken_file(path, number - 1, error) from error


def _batches(path: Path, fields: Sequence[str]) -> Iterator[Chunk]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path, buffer_size=_CHUNK_BYTES, pre_buffer=False) as file:
            names = file.schema_arrow.names
            docno = next((name for name in ("docno", "_id") if name in names), None)
            if docno is None or fields[-1] not in names:
                lacks = "'docno' (or '_id')" if docno is None else repr(fields[-1])
                raise ValueError(f"{path} has only the columns {names} and no {lacks}: choose other fields or files")
            wanted = [docno, *(field for field in fields if field in names)]
            for batch in file.iter_batches(_CHUNK_ROWS, columns=wanted, use_threads=False):
                yield Chunk(path, row, batch)
                row += len(batch)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        said = str(error).splitlines()[0]
        raise ValueError(f"{path}: no Parquet file, or broken after {row} rows ({said}); fetch it again") from error


def _parsed(chunk: Chunk, fields: Sequence[str], separator: str) -> tuple[Path, Any]:
    rows = []
    for place, document in chunk.documents():
        docno = document.get("docno", document.get("_id"))
        if isinstance(docno, int) and not isinstance(docno, bool):
            docno = str(docno)
        try:
            rows.append(row_of(document | {"docno": docno}, None, fields, separator))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{chunk.path}, {place}: {error}") from None
    return chunk.path, block_of(rows, columns_of(fields))


def _in_processes(function: Any, chunks: Iterable[Chunk], workers: int) -> Generator[tuple[Path, Any], None, None]:
    """Apply a function to chunks in other processes and yield the results in order."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent)
    try:
        yield from in_order(pool, function, chunks, _AHEAD * workers)
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker that reads documents was killed, or could not start: the memory may have been too little, or the "
            "script lacks if __name__ == '__main__': around what it does, which workers=1 does not need"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Let this process end as soon as the one that started it does; Ctrl-C is that one's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="pt_dance-parent", daemon=True).start()
