"""From documents to a dense index: reading, encoding in large shards, and putting the result in its place."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyterrier as pt

from pt_dance.corpus.corpus import Corpus
from pt_dance.corpus.passages import PassageCorpus
from pt_dance.index import joined
from pt_dance.index.files import DOCNOS, SHARDS, OpenIndex, row_bytes
from pt_dance.index.parts import PARTS, write_parts
from pt_dance.index.shards import ShardReader, StreamError, digest_of_shard
from pt_dance.index.writer import IndexWriter, Shard, read_journal, recorded_shards
from pt_dance.storage.engine import Engine
from pt_dance.storage.folders import (
    DiskError,
    building_path,
    human_bytes,
    lock_folder,
    publish_folder,
    read_json,
    remove_folder,
    replace_folder,
    require_space,
)
from pt_dance.storage.meta import META
from pt_dance.storage.progress import progress_bar
from pt_dance.storage.writing import KEPT, in_turn, writing

if TYPE_CHECKING:
    from pt_dance.index.dense_index import DenseIndex

__all__ = ["MODES", "StreamError", "run"]

MODES = ("create", "overwrite", "append")
_BYTES_PER_DOCNO = 50


def run(index: DenseIndex, source: Any, mode: str, engine: Engine | None = None) -> None:
    """Build, replace or extend the index at ``index.index_path``; see :meth:`pt_dance.DenseIndex.indexer`."""
    path = Path(index.index_path)
    if engine is not None and not isinstance(source, Corpus):
        raise TypeError(
            f"an engine's workers read documents from the files of a pt_dance.Corpus, not from a "
            f"{type(source).__name__}: Corpus.build(documents, path) makes one"
        )
    with in_turn(path), writing(path, "the index", KEPT):
        base = _base(index, source) if mode == "append" else None
        documents = ShardReader(
            source.passages if isinstance(source, PassageCorpus) else source,
            index.encoder,
            index.text_field,
            index.shard_size,
            context=index,
        )
        if base is None and path.exists():
            if not _is_dense_index(path):
                raise FileExistsError(
                    f"{path} exists and is no dense index (its {META} does not say so), so it is not replaced: choose "
                    "another path"
                )
            if mode == "create":
                _check_same(index, source, documents)
                return
        _build(index, source, documents, base, engine)


def _base(index: DenseIndex, source: Any) -> OpenIndex:
    """Return the index to append to, if the documents may be."""
    path = Path(index.index_path)
    base = OpenIndex(path)
    known = (base.meta.get("encoder") or {}).get("fingerprint")
    mine = None if index.given_encoder is None else index.given_encoder.fingerprint
    if mine is not None and known != mine:
        raise ValueError(
            f"the index {path} was made with other weights than those of the encoder given: documents can only be "
            "appended with the same ones"
        )
    if base.meta["format"] == joined.FORMAT:
        raise ValueError(f"{path} is joined from shards: index the documents as another shard and call join() again")
    with_passages = isinstance(source, PassageCorpus)
    if base.meta.get("passages", False) != with_passages:
        raise ValueError(
            f"the index {path} has {'whole documents' if with_passages else 'passages'}: append the same kind, a "
            f"{'Corpus' if with_passages else 'PassageCorpus'}"
        )
    return base


def _is_dense_index(path: Path) -> bool:
    """Return whether a folder says that it is a dense index, in whatever state."""
    try:
        return read_json(path / META).get("type") == "dense_index"
    except (OSError, ValueError):
        return False


def _check_same(index: DenseIndex, source: Any, documents: ShardReader) -> None:
    """Raise a ``FileExistsError`` if what is at the index's path is not the index that would be made."""
    there = OpenIndex(Path(index.index_path))
    difference = _other_settings(index, source, documents, there)
    fingerprint = source.fingerprint if isinstance(source, Corpus) else None
    if difference is None and (fingerprint is None or fingerprint != there.meta.get("corpus")):
        difference = _other_documents(index, documents, there)
    if difference is not None:
        raise FileExistsError(
            f"{there.path} holds another index ({difference}): overwrite=True replaces it, .append() adds documents, "
            "or choose another path"
        )


def _other_settings(index: DenseIndex, source: Any, documents: ShardReader, there: OpenIndex) -> str | None:
    if there.meta.get("passages", False) != isinstance(source, PassageCorpus):
        return f"of {'passages' if there.meta.get('passages') else 'whole documents'}"
    if there.meta["vec_dtype"] != index.vec_dtype:
        return f"of {there.meta['vec_dtype']} vectors"
    was, _ = read_journal(there.path)
    first = documents.read(1)
    documents.push_back(first)
    now = _settings(documents, documents.encoder)
    for key, name in (("content", "made of {}"), ("encoder", "of other weights"), ("text_field", "of the field {!r}")):
        if first and was.get(key) != now[key]:
            return name.format(was.get(key)) if was else f"its {SHARDS} does not say what it was made of"
    # An index of the version before does not say how its texts were encoded.
    if "dtype" in was and was["dtype"] != now.get("dtype"):
        return f"encoded with dtype={was['dtype']!r}"
    return None


def _other_documents(index: DenseIndex, documents: ShardReader, there: OpenIndex) -> str | None:
    count = there.meta["doc_count"]
    with progress_bar(index.verbose, f"{there.path.name} compared", documents.length) as bar:
        done = 0
        for shard in recorded_shards(there, (there.path / DOCNOS).stat().st_size):
            found = documents.read(shard.docs)
            if len(found) < shard.docs:
                return f"of {count:,} documents where {done + len(found):,} were given"
            if digest_of_shard(found) != shard.digest:
                return f"with other documents from number {done:,} to {done + shard.docs - 1:,}"
            done += shard.docs
            bar.update(shard.docs)
    return f"of {count:,} documents where more were given" if documents.read(1) else None


def _build(
    index: DenseIndex, source: Any, documents: ShardReader, base: OpenIndex | None, engine: Engine | None
) -> None:
    path = Path(index.index_path)
    building = building_path(path)
    building.parent.mkdir(parents=True, exist_ok=True)
    building.mkdir(exist_ok=True)
    with lock_folder(building, f"another process is indexing into {path}: wait for it, or choose another path"):
        writer = None
        try:
            first = documents.read(None)
            if not first:
                raise ValueError("there are no documents to index")
            writer = _writer(index, documents, building, base, first)
            documents.push_back(first)
            _write_shards(index, writer, documents, engine)
            remove_folder(building / PARTS)  # of an earlier call, which had an engine
            writer.finish(_meta(index, source, base, documents))
        except OSError as err:
            if err.errno not in (errno.ENOSPC, errno.EDQUOT) or writer is None:
                raise
            raise DiskError(
                err.errno,
                f"the disk is full after {writer.count:,} documents: free some room and call again, it goes on "
                "from there",
                str(building),
            ) from None
        finally:
            if writer is not None:
                writer.close()
            elif not any(building.iterdir()):
                remove_folder(building)
        if path.exists():
            replace_folder(building, path)
        else:
            publish_folder(building, path)


def _writer(
    index: DenseIndex, documents: ShardReader, building: Path, base: OpenIndex | None, first: list[tuple[str, Any]]
) -> IndexWriter:
    encoder = documents.encoder
    vec_dtype = index.vec_dtype if base is None else base.meta["vec_dtype"]
    vec_size = len(first[0][1]) if documents.with_vectors else encoder.dim
    if base is not None and base.meta["vec_size"] != vec_size:
        raise ValueError(
            f"document {first[0][0]!r} would get a vector of {vec_size} numbers where the index has "
            f"{base.meta['vec_size']}"
        )
    if documents.length is not None:
        size = row_bytes(vec_dtype, vec_size) + _BYTES_PER_DOCNO
        total = (documents.length + (base.meta["doc_count"] if base else 0)) * size
        done = sum(f.stat().st_size for f in building.iterdir() if f.is_file())
        require_space(building, max(0, total - done), f"an index of {documents.length:,} documents")
        _say(index, f"{documents.length:,} documents, {human_bytes(total)} on disk")
    settings = _settings(documents, encoder)
    if encoder is not None and not documents.with_vectors:
        # How texts are encoded is measured anew by every process: what was begun goes on as it was begun.
        begun, _ = read_journal(building)
        documents.precision = ((base.meta.get("encoder") or {}) if base is not None else begun).get("precision")
        if documents.precision is None or (base is None and begun.get("dtype") != encoder.dtype):
            documents.precision = encoder.precision
        settings["precision"] = documents.precision
    writer = IndexWriter(building, settings, vec_size, vec_dtype, base)
    if writer.fresh:
        _say(index, "what was left of an earlier call had other settings, or no whole journal: starting afresh")
    elif writer.recorded:
        _say(index, f"{sum(s.docs for s in writer.recorded):,} documents are indexed already: going on")
    return writer


def _settings(documents: ShardReader, encoder: Any) -> dict[str, Any]:
    """Return what decides, with the documents, which vectors they get."""
    texts = not documents.with_vectors
    return {
        "encoder": None if encoder is None else encoder.fingerprint,
        "text_field": documents.text_field if texts else None,
        "content": "texts" if texts else "vectors",
        **({"dtype": encoder.dtype} if encoder is not None and texts else {}),
    }


def _write_shards(index: DenseIndex, writer: IndexWriter, documents: ShardReader, engine: Engine | None) -> None:
    with progress_bar(index.verbose, f"{Path(index.index_path).name} vectors", documents.length) as bar:
        while True:
            recorded: Shard | None = writer.recorded[0] if writer.recorded else None
            if recorded is None and engine is not None:
                write_parts(engine, writer, documents, bar.update)
                return
            shard = documents.read(recorded.docs if recorded else None)
            if recorded:
                if len(shard) == recorded.docs and digest_of_shard(shard) == recorded.digest:
                    writer.keep([docno for docno, _ in shard])
                    bar.update(len(shard))
                    continue
                same = f"the documents differ from those of the earlier call after the first {writer.count:,}"
                _say(index, f"{same}: starting afresh from there")
                writer.recorded.clear()
                documents.push_back(shard)
                continue
            if not shard:
                return
            docnos = [docno for docno, _ in shard]
            writer.check_docnos(docnos)
            writer.add(docnos, documents.vectors(shard, writer.vec_size, writer.vec_dtype), digest_of_shard(shard))
            bar.update(len(shard))


def _meta(index: DenseIndex, source: Any, base: OpenIndex | None, documents: ShardReader) -> dict[str, Any]:
    encoder = documents.encoder
    known: Any = None if base is None else base.meta.get("encoder")
    if encoder is not None:
        name = getattr(encoder, "name", None)
        known = {
            "fingerprint": encoder.fingerprint,
            "name": name if isinstance(name, str) else None,
            "path": _path_beside(encoder, Path(index.index_path)),
            "similarity": encoder.similarity,
            "precision": documents.precision,
        }
    return {
        "sim_fn": "dot" if known is None else known.get("similarity") or "dot",
        "text_field": index.text_field,
        "corpus": source.fingerprint if isinstance(source, Corpus) and base is None else None,
        "encoder": known,
        **({"passages": True} if isinstance(source, PassageCorpus) else {}),
    }


def _path_beside(encoder: Any, index_path: Path) -> str | None:
    """Return where the encoder is, as seen from the index, if both lie in one folder and can be moved together."""
    path = getattr(encoder, "path", None)
    if not isinstance(path, (str, Path)) or not Path(path).is_dir():
        return None
    path, folder = Path(path).resolve(), index_path.resolve().parent
    if path == folder or not path.is_relative_to(folder):
        return None
    return (Path("..") / path.relative_to(folder)).as_posix()


def _say(index: DenseIndex, message: str) -> None:
    if index.verbose:
        pt.tqdm.write(f"{index.index_path}: {message}", file=sys.stderr)
