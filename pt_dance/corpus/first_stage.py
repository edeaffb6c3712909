"""A first stage in one line: BM25 over a corpus, by PISA or by Terrier."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyterrier as pt

from pt_dance.corpus.corpus import Corpus
from pt_dance.corpus.quiet import quiet
from pt_dance.storage import options
from pt_dance.storage.folders import read_json, recover_folder, write_json
from pt_dance.storage.writing import in_turn, new_folder

BACKENDS = {"pisa": "pyterrier_pisa", "terrier": "jnius"}
_ABOUT = "bm25.json"
_BLOCK_DOCUMENTS = 10_000


def bm25(
    corpus: Corpus,
    path: str | Path,
    *,
    backend: str = "auto",
    k1: float = 0.9,
    b: float = 0.4,
    num_results: int = 1000,
    threads: int = 1,
    overwrite: bool = False,
    verbose: bool = True,
) -> pt.Transformer:
    """Return a BM25 pipeline over a corpus; its index is made when it is first asked for.

    An index that is at ``path`` already is used where it is of the same documents. Neither engine writes its own log to
    the terminal or the notebook, and an index that lacks documents is refused: PISA goes on without a word when the
    stream of documents breaks off.

    .. code-block:: python

        corpus = Corpus.build(pt.get_dataset("dance:pydocs"), "data/pydocs")
        bm25 = pt_dance.bm25(corpus, "data/pydocs.bm25")
        (bm25 % 100)(topics)

    Args:
        corpus: The documents.
        path: Folder of the index.
        backend: "pisa" (``pip install pt_dance[pisa]``; quick, Linux only, no re-scoring of result frames), "terrier"
            (``pip install pt_dance[terrier]``, and Java), or "auto": that of the index at ``path``, else PISA where it
            is installed, else Terrier.
        k1: How much further occurrences of a word count.
        b: How much a document's length counts.
        num_results: Documents for a query.
        threads: Threads that search.
        overwrite: Whether an index of other documents at ``path`` is replaced, once the new one is whole.
        verbose: Whether to show a progress bar while indexing.

    Returns:
        A pipeline from queries (``qid``, ``query``) to results. Queries are plain text: Terrier's query language is
        switched off, and the user's words stay in ``query``.

    Raises:
        TypeError: If ``corpus`` is no :class:`pt_dance.Corpus`.
        ValueError: If an option makes no sense, or PISA is to index a docno with white space, where it would cut it.
        ImportError: If the engine is not installed.
        FileExistsError: If at ``path`` there is an index of other documents, unless ``overwrite`` says to replace it,
            or something else.
        RuntimeError: If the engine did not index every document.
        OSError: If the disk is full or cannot be written to.
    """
    if not isinstance(corpus, Corpus):
        raise TypeError(
            f"corpus={corpus!r} must be a pt_dance.Corpus: Corpus.build(documents, path) makes one of documents"
        )
    path = options.path_of(path)
    options.choice("backend", backend, ("auto", *BACKENDS))
    search = {
        "k1": options.number("k1", k1, lowest=0),
        "b": options.number("b", b, lowest=0, highest=1),
        "num_results": options.whole("num_results", num_results),
        "threads": options.whole("threads", threads),
    }
    with in_turn(path):
        recover_folder(path)
        there = _there(path)
        if there is not None and not overwrite:
            if there["corpus"] != corpus.fingerprint or backend not in ("auto", there["backend"]):
                raise FileExistsError(
                    f"{path} holds an index by {there['backend']} of {there['documents']:,} "
                    f"{'documents' if there['corpus'] == corpus.fingerprint else 'other documents'}: overwrite=True "
                    "replaces it, or choose another path"
                )
            backend = there["backend"]
            _check_installed(backend)
        else:
            backend = _chosen(backend, corpus)
            with new_folder(path, "the index", replace=overwrite) as building:
                count = _pisa(corpus, building, verbose) if backend == "pisa" else _terrier(corpus, building, verbose)
                if count != len(corpus):
                    raise RuntimeError(
                        f"{backend} indexed {count:,} of {len(corpus):,} documents: nothing is kept of it"
                    )
                about = {"backend": backend, "corpus": corpus.fingerprint, "documents": count}
                write_json(building / _ABOUT, about)
    if backend == "pisa":
        from pt_dance.corpus.pisa import pisa_bm25

        return pisa_bm25(path / "pisa", **search)
    retriever = pt.terrier.TerrierIndex(path / "terrier").bm25(**search)
    return pt.rewrite.tokenise() >> retriever >> pt.rewrite.reset()


def _there(path: Path) -> dict[str, Any] | None:
    """Return what is known of the index at a path, None where there is nothing."""
    if not path.exists():
        return None
    try:
        about = read_json(path / _ABOUT)
    except (OSError, ValueError):
        about = {}
    kinds = {"backend": str, "corpus": str, "documents": int}
    if about.get("backend") not in BACKENDS or not all(isinstance(about.get(key), kind) for key, kind in kinds.items()):
        raise FileExistsError(f"{path} exists and is no index of pt_dance.bm25: choose another path, or remove it")
    return about


def _check_installed(backend: str) -> None:
    # Looked for only: importing jnius would start Java without Terrier's jars.
    if importlib.util.find_spec(BACKENDS[backend]) is None:
        raise ImportError(f"backend={backend!r} is not installed: pip install 'pt_dance[{backend}]'")


def _chosen(backend: str, corpus: Corpus) -> str:
    """Return the engine that is to index a corpus."""
    installed = [name for name, module in BACKENDS.items() if importlib.util.find_spec(module) is not None]
    if backend != "auto":
        _check_installed(backend)
        return backend
    if not installed:
        raise ImportError(
            "BM25 needs PISA (pip install 'pt_dance[pisa]') or Terrier and Java (pip install 'pt_dance[terrier]')"
        )
    cut = installed[0] == "pisa" and len(installed) > 1 and _docno_with_space(corpus) is not None
    return installed[1] if cut else installed[0]


def _docno_with_space(corpus: Corpus) -> str | None:
    return next((docno for docno in _docnos(corpus) if re.search(r"\s", docno)), None)


def _docnos(corpus: Corpus) -> Iterator[str]:
    for start in range(0, len(corpus), _BLOCK_DOCUMENTS):
        yield from corpus.docno(range(start, min(start + _BLOCK_DOCUMENTS, len(corpus))))


def _pisa(corpus: Corpus, folder: Path, verbose: bool) -> int:
    from pyterrier_pisa import PisaIndex

    if (docno := _docno_with_space(corpus)) is not None:
        raise ValueError(f"docno {docno!r} holds white space, where PISA would cut it: use backend='terrier'")
    with quiet():
        index = PisaIndex(str(folder / "pisa"), text_field="text")
        index.index(corpus.get_corpus_iter(verbose=verbose))
        return len(index)


def _terrier(corpus: Corpus, folder: Path, verbose: bool) -> int:
    # Terrier counts in bytes, and cuts a longer docno without a word.
    longest = max(len(docno.encode()) for docno in _docnos(corpus))
    with quiet():
        indexer = pt.IterDictIndexer(str(folder / "terrier"), meta={"docno": longest}, meta_reverse=["docno"])
        indexer.index(corpus.get_corpus_iter(verbose=verbose))
        return len(pt.terrier.TerrierIndex(folder / "terrier"))
