"""Give sentence-transformers models the ending that their similarity asks for, and maximum lengths; write them."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Router, StaticEmbedding
from torch import nn
from transformers.utils import logging as transformers_logging

from pt_dance.storage.options import choice

SIMILARITIES = ("cosine", "dot")


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Keep progress bars of transformers and the hub, which transformers switches as well, off the terminal inside."""
    shown, hubs = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
        if hubs != shown:
            (enable_progress_bars if hubs else disable_progress_bars)()


def similarity_of(model: SentenceTransformer) -> str:
    """Return ``"cosine"`` or ``"dot"``: what the plain dot product of the model's vectors amounts to, or should.

    A model that normalises its vectors is a cosine model whatever its settings say.

    Raises:
        ValueError: If the model asks for another similarity.
    """
    if _normalises(model[-1]):
        return "cosine"
    if model.similarity_fn_name not in SIMILARITIES:
        raise ValueError(
            f"the model's similarity is {model.similarity_fn_name!r}; only 'cosine' and 'dot' can be searched: set its "
            "similarity_fn_name to one of them"
        )
    return model.similarity_fn_name


def with_ending(model: SentenceTransformer, similarity: str, device: str | None = None) -> SentenceTransformer:
    """Return a new model over the same modules that ends with a ``Normalize`` iff ``similarity`` is cosine.

    The plain dot product of its outputs is then the score. ``truncate_dim``, which sentence-transformers applies
    behind the last module (and so behind ``Normalize``, and never while training), becomes a ``Dense`` module that
    starts as the truncation, so that what is trained, saved and searched are the same vectors. The model itself is not
    changed, but its modules are shared, and moved to ``device`` if there is one.
    """
    choice("similarity", similarity, SIMILARITIES)
    modules = list(strip_normalize(OrderedDict(model.named_children())).items())
    if model.truncate_dim is not None:
        modules.append(("truncate", _truncation(modules[-1][1], model)))
    if similarity == "cosine":
        last = model[-1]
        modules.append(("normalize", last if type(last) is Normalize else Normalize()))
    # Numbered names, as sentence-transformers gives them; settings that hang on a module's name move along.
    named = OrderedDict((str(i), module) for i, (_, module) in enumerate(modules))
    card = copy.copy(model.model_card_data)
    rebuilt = SentenceTransformer(modules=named, device=str(device or model.device), model_card_data=card)
    card.model = rebuilt
    rebuilt.prompts = dict(model.prompts)
    rebuilt.default_prompt_name = model.default_prompt_name
    rebuilt.similarity_fn_name = similarity
    rebuilt.backend = model.backend
    rebuilt._model_card_text = model._model_card_text
    if model.module_kwargs:
        kwargs = ((str(i), model.module_kwargs.get(name, [])) for i, (name, _) in enumerate(modules))
        rebuilt.module_kwargs = OrderedDict(kwargs)
    rebuilt.training = model.training
    for module in rebuilt:
        if not any(True for _ in module.parameters()):
            module.train(model.training)
    return rebuilt


def strip_normalize(modules: OrderedDict[str, nn.Module]) -> OrderedDict[str, nn.Module]:
    """Return the modules without the ``Normalize`` at their end, also where it ends every route of a ``Router``."""
    kept = OrderedDict(modules)
    while kept:
        name, last = next(reversed(kept.items()))
        if type(last) is Normalize and len(kept) > 1:
            del kept[name]
        elif isinstance(last, Router) and _normalises(last):
            routes = {
                route: list(strip_normalize(OrderedDict(part.named_children())).values())
                for route, part in last.sub_modules.items()
            }
            kept[name] = Router(
                routes,
                default_route=last.default_route,
                allow_empty_key=last.allow_empty_key,
                route_mappings=last.route_mappings,
            )
            kept[name].training = last.training
            break
        else:
            break
    return kept


def _normalises(module: nn.Module) -> bool:
    if isinstance(module, Router):
        return all(_normalises(part[-1]) for part in module.sub_modules.values())
    return isinstance(module, Normalize) and module.module_output_name == "sentence_embedding"


def _truncation(last: nn.Module, model: SentenceTransformer) -> Dense:
    kept, held = model.truncate_dim, None
    with model.truncate_embeddings(None):
        held = model.get_embedding_dimension()
    if held is None:
        raise ValueError("the model truncates its vectors but does not say how long they are; drop its truncate_dim")
    weight = torch.eye(min(kept, held), held, dtype=model.dtype or torch.float32)
    parameter = next(last.parameters(), None)
    return Dense(
        held,
        min(kept, held),
        bias=False,
        activation_function=nn.Identity(),
        init_weight=weight if parameter is None else weight.to(parameter.device),
    )


def input_modules(model: SentenceTransformer) -> list[nn.Module]:
    """Return the modules that read texts, one a tower."""
    first = model[0]
    return [part[0] for part in first.sub_modules.values()] if isinstance(first, Router) else [first]


def pooling_of(model: SentenceTransformer) -> str | None:
    """Return the pooling of a model's first module that pools, or ``None``."""
    return next((str(module.pooling_mode) for module in model.modules() if isinstance(module, Pooling)), None)


def set_max_length(model: SentenceTransformer, max_length: int) -> None:
    """Cut every text of every tower after ``max_length`` tokens, special tokens included.

    The tokenizers are copied first, so that another model that shares these modules keeps its own lengths.

    Raises:
        ValueError: If the length is longer than a tower can read.
    """
    name, module = next(model.named_children())
    model._modules[name] = _shortened(module, max_length)


def _shortened(module: Any, max_length: int) -> Any:
    module = copy.copy(module)
    module._modules = dict(module._modules)
    if isinstance(module, Router):
        module.sub_modules = nn.ModuleDict(
            {
                route: nn.Sequential(_shortened(part[0], max_length), *list(part)[1:])
                for route, part in module.sub_modules.items()
            }
        )
    elif isinstance(module, StaticEmbedding):
        module.tokenizer = copy.deepcopy(module.tokenizer)
        module.tokenizer.enable_truncation(max_length)
    elif getattr(module, "max_seq_length", None) is not None and hasattr(module, "processor"):
        config = getattr(module.config, "get_text_config", lambda: module.config)()
        longest = getattr(config, "max_position_embeddings", None)
        if isinstance(longest, int) and 0 < longest < max_length:
            raise ValueError(f"max_length is {max_length}, but the model reads at most {longest} tokens")
        module.processor = copy.deepcopy(module.processor)
        module.max_seq_length = max_length
    else:
        raise ValueError(f"max_length cannot be set for a model that begins with {type(module).__name__}")
    return module


def write(model: SentenceTransformer, folder: Path) -> None:
    """Write a model to an empty folder, as sentence-transformers does, silently, without the base model's card."""
    with no_bars():
        model.save(str(folder), create_model_card=False)
