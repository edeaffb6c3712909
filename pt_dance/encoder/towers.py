"""Build encoders: static towers from nothing or from a transformer's embeddings, and two-tower models."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Router, StaticEmbedding, Transformer
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerBase

from pt_dance.encoder import models as _models
from pt_dance.encoder.reading import prompt_for
from pt_dance.encoder.wordpiece import train_wordpiece


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive whole number, not {value!r}.")


def static(texts: Iterable[str], dim: int, vocab_size: int, seed: int, normalize: bool) -> SentenceTransformer:
    """A static tower from nothing; see :meth:`pt_dance.DualEncoder.static`."""
    _positive("dim", dim)
    _positive("vocab_size", vocab_size)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed must be a whole number of at least 0, not {seed!r}.")
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
    """A static tower from token embeddings; see :meth:`pt_dance.DualEncoder.static_from`."""
    if dim is not None:
        _positive("dim", dim)
    opened = _models.open_model(model)
    tower = opened[0]
    if isinstance(tower, StaticEmbedding):
        tokenizer, weights = tower.tokenizer, tower.embedding.weight
    elif isinstance(tower, Transformer) and isinstance(tower.processor, PreTrainedTokenizerBase):
        if not tower.processor.is_fast:
            raise ValueError("The model's tokenizer is no fast tokenizer, which a static tower needs.")
        tokenizer, weights = tower.processor.backend_tokenizer, tower.auto_model.get_input_embeddings().weight
    else:
        raise ValueError(f"A static tower cannot be made from a model that begins with {type(tower).__name__}.")
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_padding()
    if isinstance(tower, Transformer):
        tokenizer.no_truncation()
    weights = weights.detach().cpu().float().clone()
    # A vocabulary may be larger than the table, or the table padded to a round number; ids beyond it never occur.
    if tokenizer.get_vocab_size() > len(weights):
        raise ValueError("The model's tokenizer has more tokens than the model has embeddings.")
    if dim is not None and dim != weights.shape[1]:
        weights = _principal(weights, dim)
    return _static_model(tokenizer, weights, _models.similarity_of(opened))


def _principal(weights: torch.Tensor, dim: int) -> torch.Tensor:
    """The first ``dim`` principal components (float32), each signed so that its largest loading is positive."""
    if dim > weights.shape[1]:
        raise ValueError(f"dim is {dim}, but the model's token embeddings have only {weights.shape[1]} dimensions.")
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
    """A model with one tower for queries and one for documents; see :meth:`pt_dance.DualEncoder.two_towers`."""
    queries, documents = _models.open_model(query_model), _models.open_model(doc_model)
    if similarity is None:
        found = {_models.similarity_of(queries), _models.similarity_of(documents)}
        if len(found) > 1:
            raise ValueError(
                "One tower compares by cosine and the other by dot product; say similarity='cosine' or 'dot'."
            )
        similarity = found.pop()
    elif similarity not in _models.SIMILARITIES:
        raise ValueError(f"similarity must be 'cosine' or 'dot', not {similarity!r}.")
    towers = {"query": _tower(queries, "query"), "document": _tower(documents, "document")}
    dims = {task: _dim_of(tower, task) for task, tower in towers.items()}
    if dims["query"] != dims["document"]:
        raise ValueError(
            f"The query tower's vectors have {dims['query']} dimensions and the document tower's {dims['document']}: "
            "both must have the same, with or without a shared projection."
        )
    modules: list[nn.Module] = [Router.for_query_document(towers["query"], towers["document"])]
    if shared_projection is not None:
        modules.append(_projection(shared_projection, dims["query"], seed))
    if similarity == "cosine":
        modules.append(Normalize())
    prompts = {"query": prompt_for(queries, "query") or "", "document": prompt_for(documents, "document") or ""}
    return SentenceTransformer(
        modules=modules, device=str(queries.device), prompts=prompts, similarity_fn_name=similarity
    )


def _tower(model: SentenceTransformer, task: str) -> list[nn.Module]:
    """Deep copies of the modules that encode a task, without the normalisation at their end."""
    modules = copy.deepcopy(list(_models.strip_normalize(OrderedDict(model.named_children())).values()))
    if isinstance(modules[0], Router):
        if task not in modules[0].sub_modules:
            raise ValueError(f"The model given for the {task} tower has several towers, but none for {task!r}.")
        modules[:1] = list(modules[0].sub_modules[task])
    return modules


def _dim_of(modules: list[Any], task: str) -> int:
    for module in reversed(modules):
        if hasattr(module, "get_embedding_dimension"):
            return int(module.get_embedding_dimension())
    raise ValueError(f"The {task} tower does not say how long its vectors are.")


def _projection(projection: int | Dense, dim: int, seed: int) -> Dense:
    if isinstance(projection, Dense):
        if projection.in_features != dim:
            raise ValueError(f"The shared projection takes {projection.in_features} dimensions, the towers give {dim}.")
        return projection
    _positive("shared_projection", projection)
    # Orthogonal rows keep the towers' geometry as well as so many dimensions can; drawn from a generator of its own.
    weight = nn.init.orthogonal_(torch.empty(projection, dim), generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng(devices=[]):  # nn.Linear draws a first weight, which is then replaced
        return Dense(dim, projection, bias=False, activation_function=nn.Identity(), init_weight=weight)
