"""Build encoders: static towers from nothing or from a transformer's embeddings, and two-tower models."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    LayerNorm,
    Normalize,
    Router,
    StaticEmbedding,
    Transformer,
)
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerBase

from pt_dance.encoder import models, opening, published
from pt_dance.encoder.reading import prompt_for
from pt_dance.encoder.wordpiece import train_wordpiece
from pt_dance.storage.options import choice, whole


def open_published(
    model: str | os.PathLike | SentenceTransformer, device: str | None, pooling: str | None, similarity: str | None
) -> SentenceTransformer:
    """Open a model as :func:`pt_dance.encoder.opening.open_model` does, or both towers of a published one."""
    known = published.find(model) if isinstance(model, (str, os.PathLike)) else None
    if known is None or known.towers is None or Path(model).exists():
        return opening.open_model(model, device, pooling, similarity)
    queries, documents = (opening.open_model(tower, device, pooling, similarity) for tower in known.towers)
    return two_towers(queries, documents, None, similarity or known.similarity, 0)


def texts_of(source: Any, field: str) -> Iterable[Any]:
    """Return the texts of an iterable of texts or documents, a DataFrame, or whatever has ``get_corpus_iter()``.

    Raises:
        ValueError: If a DataFrame or a document has no such field.
    """
    if hasattr(source, "get_corpus_iter"):
        try:
            source = source.get_corpus_iter(verbose=False)
        except TypeError:
            source = source.get_corpus_iter()
    elif isinstance(source, pd.DataFrame):
        if field not in source.columns:
            raise ValueError(f"the documents have no column {field!r}; name theirs with text_field")
        source = source[field]
    if isinstance(source, (str, bytes)):
        return source  # refused with a sentence where texts are read
    return (_text_of(item, field) if isinstance(item, dict) else item for item in source)


def _text_of(document: dict[str, Any], field: str) -> Any:
    if field not in document:
        raise ValueError(f"document {document.get('docno')!r} has no field {field!r}; name its text with text_field")
    return document[field]


def static(texts: Iterable[str], dim: int, vocab_size: int, seed: int, normalize: bool) -> SentenceTransformer:
    """Build a static tower from nothing; see :meth:`pt_dance.DualEncoder.static`."""
    dim, vocab_size, seed = whole("dim", dim), whole("vocab_size", vocab_size), whole("seed", seed, 0)
    tokenizer, inverse_frequencies = train_wordpiece(texts, vocab_size)
    # A random direction of expected length 1 a token, whatever the dimension, times its inverse document frequency:
    # a random projection of tf-idf, so that the untrained tower ranks about as tf-idf does and training starts there.
    random = torch.Generator().manual_seed(seed)
    weights = torch.randn(tokenizer.get_vocab_size(), dim, generator=random) * dim**-0.5
    weights *= torch.from_numpy(inverse_frequencies)[:, None]
    return _static_model(tokenizer, weights, "cosine" if normalize else "dot")


def _static_model(tokenizer: Tokenizer, weights: torch.Tensor, similarity: str) -> SentenceTransformer:
    modules: list[nn.Module] = [StaticEmbedding(tokenizer, embedding_weights=weights)]
    if similarity == "cosine":
        modules.append(Normalize())
    return SentenceTransformer(modules=modules, similarity_fn_name=similarity)


def static_from(model: str | os.PathLike | SentenceTransformer, dim: int | None) -> SentenceTransformer:
    """Build a static tower from token embeddings; see :meth:`pt_dance.DualEncoder.static_from`."""
    dim = whole("dim", dim, or_none=True)
    opened = opening.open_model(model)
    tower = opened[0]
    if isinstance(tower, StaticEmbedding):
        tokenizer, weights = tower.tokenizer, tower.embedding.weight
    elif isinstance(tower, Transformer) and isinstance(tower.processor, PreTrainedTokenizerBase):
        if not tower.processor.is_fast:
            raise ValueError("the model's tokenizer is no fast tokenizer, which a static tower needs")
        tokenizer, weights = tower.processor.backend_tokenizer, tower.auto_model.get_input_embeddings().weight
    else:
        raise ValueError(f"a static tower cannot be made from a model that begins with {type(tower).__name__}")
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_padding()
    if isinstance(tower, Transformer):
        tokenizer.no_truncation()
    weights = weights.detach().cpu().float().clone()
    # A vocabulary may be larger than the table, or the table padded to a round number; ids beyond it never occur.
    if tokenizer.get_vocab_size() > len(weights):
        raise ValueError("the model's tokenizer has more tokens than the model has embeddings")
    if dim is not None and dim != weights.shape[1]:
        weights = _principal(weights, dim)
    return _static_model(tokenizer, weights, models.similarity_of(opened))


def _principal(weights: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the first ``dim`` principal components (float32), each signed so that its largest loading is positive."""
    if dim > weights.shape[1]:
        raise ValueError(f"dim is {dim}, but the model's token embeddings have only {weights.shape[1]} dimensions")
    centred = weights.double() - weights.double().mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors.flip(1)[:, :dim]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return (centred @ axes).float()


def two_towers(
    query_model: str | os.PathLike | SentenceTransformer,
    doc_model: str | os.PathLike | SentenceTransformer,
    shared_projection: int | Dense | None,
    similarity: str | None,
    seed: int,
) -> SentenceTransformer:
    """Build a model with one tower for queries and one for documents; see :meth:`pt_dance.DualEncoder.two_towers`."""
    queries, documents = opening.open_model(query_model), opening.open_model(doc_model)
    if similarity is None:
        found = {models.similarity_of(queries), models.similarity_of(documents)}
        if len(found) > 1:
            raise ValueError(
                "one tower compares by cosine and the other by dot product; say similarity='cosine' or 'dot'"
            )
        similarity = found.pop()
    choice("similarity", similarity, models.SIMILARITIES)
    towers = {"query": _tower(queries, "query"), "document": _tower(documents, "document")}
    dims = {task: _dim_of(tower, task) for task, tower in towers.items()}
    if dims["query"] != dims["document"] and shared_projection is None:
        raise ValueError(
            f"the query tower's vectors have {dims['query']} dimensions and the document tower's {dims['document']}; "
            "give shared_projection=..., which also brings them to one length"
        )
    projection = None if shared_projection is None else _projection(shared_projection, max(dims.values()), seed)
    if projection is not None:
        for task, tower in towers.items():
            if dims[task] != projection.in_features:
                # Its own layer keeps its geometry: as many orthonormal columns as it has dimensions.
                tower.append(linear_layer(dims[task], projection.in_features, seed))
    modules: list[nn.Module] = [Router.for_query_document(towers["query"], towers["document"])]
    if projection is not None:
        modules.append(projection)
    if similarity == "cosine":
        modules.append(Normalize())
    prompts = {"query": prompt_for(queries, "query") or "", "document": prompt_for(documents, "document") or ""}
    return SentenceTransformer(
        modules=modules, device=str(queries.device), prompts=prompts, similarity_fn_name=similarity
    )


def _tower(model: SentenceTransformer, task: str) -> list[nn.Module]:
    """Return deep copies of the modules that encode a task, without the normalisation at their end."""
    modules = copy.deepcopy(list(models.strip_normalize(OrderedDict(model.named_children())).values()))
    if isinstance(modules[0], Router):
        if task not in modules[0].sub_modules:
            raise ValueError(f"the model given for the {task} tower has several towers, but none for {task!r}")
        modules[:1] = list(modules[0].sub_modules[task])
    return modules


def _dim_of(modules: list[Any], task: str) -> int:
    for module in reversed(modules):
        if hasattr(module, "get_embedding_dimension"):
            return int(module.get_embedding_dimension())
    raise ValueError(f"the {task} tower does not say how long its vectors are")


def _projection(projection: int | Dense, dim: int, seed: int) -> Dense:
    if isinstance(projection, Dense):
        if projection.in_features != dim:
            raise ValueError(f"the shared projection takes {projection.in_features} dimensions, the towers give {dim}")
        return projection
    return linear_layer(dim, whole("shared_projection", projection), seed)


def linear_layer(width: int, dim: int, seed: int, *, bias: bool = False, normal: bool = False) -> Dense:
    """Return a linear layer of ``width`` to ``dim`` numbers without activation, drawn from a generator of its own.

    Orthogonal rows (or columns) keep the geometry of vectors as well as so many dimensions can; ``normal`` draws from
    N(0, .02²). A bias begins as 0.
    """
    weight, generator = torch.empty(dim, width), torch.Generator().manual_seed(seed)
    if normal:
        nn.init.normal_(weight, std=0.02, generator=generator)
    else:
        nn.init.orthogonal_(weight, generator=generator)
    with torch.random.fork_rng(devices=[]):  # nn.Linear draws a first weight, which is then replaced
        return Dense(width, dim, bias, nn.Identity(), weight, torch.zeros(dim))


def with_head(
    model: SentenceTransformer, head: str, dim: int, shared: bool, init: str, seed: int
) -> SentenceTransformer:
    """Give a model ANCE's head in place of its normalisation; see :meth:`pt_dance.DualEncoder.with_head`."""
    choice("head", head, ("layernorm",))
    choice("init", init, ("orthogonal", "normal"))
    dim, seed = whole("dim", dim), whole("seed", seed, 0)
    made = models.with_ending(model, "dot")

    def new_head(width: int) -> list[nn.Module]:
        layers = [linear_layer(width, dim, seed, bias=True, normal=init == "normal"), LayerNorm(dim)]
        return [layer.to(made.device) for layer in layers]

    router = made[0]
    if isinstance(router, Router) and not shared:
        if len(made) > 1:
            raise ValueError("the towers share a projection; a head behind it is shared, too: with_head(shared=True)")
        for task, part in router.sub_modules.items():
            for module in new_head(_dim_of(list(part), task)):
                part.append(module)
        return made
    width = made.get_embedding_dimension()
    for module in new_head(width):
        made.append(module)
    return made
