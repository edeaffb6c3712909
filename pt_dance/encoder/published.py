"""Published retrieval models and what their folders do not say: pooling, similarity, prompts, head, towers.

What a folder says counts; this table only adds the rest, from the papers and releases. Names are those on the Hugging
Face hub; a folder is known by its last part, with or without the owner's folder above it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Published:
    """How a published model was trained and is to be used.

    Args:
        pooling: ``"cls"`` or ``"mean"``, for plain transformers checkpoints.
        similarity: ``"cosine"`` or ``"dot"``.
        query: Prompt before queries.
        document: Prompt before documents.
        head: Names of the head's linear layer and LayerNorm among the checkpoint's weights.
        towers: The two models of a two-tower model.
        query_tokens: Queries are filled up with [MASK] to so many tokens, and cut there, as ColBERT's are; prompts are
            not pooled, and no [SEP] follows a text.
        source: Where this is from.
    """

    pooling: str | None
    similarity: str
    query: str = ""
    document: str = ""
    head: tuple[str, str] | None = None
    towers: tuple[str, str] | None = None
    query_tokens: int | None = None
    source: str = ""


_BGE = "Represent this sentence for searching relevant passages: "
_BGE_CHINESE = "为这个句子生成表示以用于检索相关文章："

_MODELS: dict[str, Published] = {
    "castorini/ance-msmarco-(passage|doc-firstp|doc-maxp)": Published(
        "cls", "dot", head=("embeddingHead", "norm"), source="Xiong et al., ICLR 2021, arXiv 2007.00808"
    ),
    "sentence-transformers/msmarco-roberta-base-ance-firstp": Published(
        "cls", "dot", source="Xiong et al., ICLR 2021, arXiv 2007.00808; has its head as modules"
    ),
    "sebastian-hofstaetter/distilbert-dot-tas_b-b256-msmarco": Published(
        "cls", "dot", source="Hofstätter et al., SIGIR 2021, arXiv 2104.06967"
    ),
    "sentence-transformers/msmarco-distilbert-base-tas-b": Published(
        "cls", "dot", source="Hofstätter et al., SIGIR 2021, arXiv 2104.06967"
    ),
    "castorini/tct_colbert(-v2)?(-hnp?)?-msmarco": Published(
        "mean", "dot", "[Q] ", "[D] ", query_tokens=36, source="Lin et al., arXiv 2010.11386 and RepL4NLP 2021"
    ),
    "facebook/m?contriever(-msmarco)?": Published("mean", "dot", source="Izacard et al., TMLR 2022, arXiv 2112.09118"),
    "intfloat/(multilingual-)?e5-(small|base|large)(-v2)?(-unsupervised)?": Published(
        "mean", "cosine", "query: ", "passage: ", source="Wang et al., arXiv 2212.03533 and 2402.05672"
    ),
    "sentence-transformers/gtr-t5-(base|large|xl|xxl)": Published(
        "mean", "cosine", source="Ni et al., EMNLP 2022, arXiv 2112.07899; has its projection as a module"
    ),
    "BAAI/bge-(small|base|large)-en(-v1\\.5)?": Published(
        "cls", "cosine", _BGE, source="Xiao et al., SIGIR 2024, arXiv 2309.07597"
    ),
    "BAAI/bge-(small|base|large)-zh(-v1\\.5)?": Published(
        "cls", "cosine", _BGE_CHINESE, source="Xiao et al., SIGIR 2024, arXiv 2309.07597"
    ),
    "BAAI/bge-m3": Published("cls", "cosine", source="Chen et al., Findings of ACL 2024, arXiv 2402.03216"),
    "facebook/dragon-(plus|roberta)-(query|context)-encoder": Published(
        "cls", "dot", source="Lin et al., Findings of EMNLP 2023, arXiv 2302.07452"
    ),
    **{
        f"facebook/{name}": Published(
            "cls",
            "dot",
            towers=(f"facebook/{name}-query-encoder", f"facebook/{name}-context-encoder"),
            source="Lin et al., Findings of EMNLP 2023, arXiv 2302.07452",
        )
        for name in ("dragon-plus", "dragon-roberta")
    },
    "Shitao/RetroMAE_(MSMARCO_finetune|MSMARCO_distill|BEIR)": Published(
        "cls", "dot", source="Xiao et al., EMNLP 2022, arXiv 2205.12035"
    ),
}


def find(model: str | os.PathLike) -> Published | None:
    """Return what is known of a model by its name or folder, or ``None``."""
    parts = Path(model).parts[-2:]
    for pattern, published in _MODELS.items():
        owner, _, name = pattern.partition("/")
        if re.fullmatch(name, parts[-1] if parts else "") and (
            published.towers is None or "/".join(parts) == f"{owner}/{parts[-1]}"
        ):
            return published
    return None
