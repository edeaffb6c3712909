"""Open sentence-transformers models safely, and give them the ending that their similarity asks for."""

from __future__ import annotations

import contextlib
import copy
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Router, StaticEmbedding
from torch import nn
from transformers.utils import logging as transformers_logging

from pt_dance.storage import folders

SIMILARITIES = ("cosine", "dot")

# What reading a model could unpickle, and the file that holds the same weights safely.
_PICKLES = {"pytorch_model": "model", "adapter_model": "adapter_model"}
_NOT_NEEDED = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.ot", "*.msgpack", "onnx/*", "openvino/*"]


def open_model(model: str | os.PathLike | SentenceTransformer, device: str | None = None) -> SentenceTransformer:
    """Open a model by folder or hub name; a model in memory is returned as it is.

    Args:
        model: A folder, the name of a model on the Hugging Face hub, or a ``SentenceTransformer``.
        device: Where to put it; sentence-transformers' own choice when ``None``.

    Returns:
        The model. Its weights were read from safetensors, and no code that comes with it was run.

    Raises:
        TypeError: If ``model`` is none of these.
        FileNotFoundError: If there is no such folder and no such model on the hub.
        ValueError: If the folder holds no model, a damaged one, or pickled weights.
    """
    if isinstance(model, SentenceTransformer):
        return model
    if not isinstance(model, (str, os.PathLike)) or not str(model):
        raise TypeError(
            "A model is given as a folder, a name on the Hugging Face hub or a SentenceTransformer, "
            f"not as {type(model).__name__} {model!r}."
        )
    folder = _folder_of(str(model))
    check_folder(folder)
    with no_bars():
        try:
            return SentenceTransformer(str(folder), device=device, model_kwargs={"use_safetensors": True})
        except Exception as error:  # whatever a damaged folder provokes in the libraries below, the user gets one line
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{folder} cannot be read as a sentence-transformers model: {reason}") from error


def check_folder(folder: Path) -> None:
    """Refuse a folder that is no model, or whose weights would have to be unpickled.

    Raises:
        ValueError: Naming the folder or the pickled file.
    """
    if not (folder / "modules.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no sentence-transformers model: it has neither modules.json nor config.json.")
    for pickled, safe in _PICKLES.items():
        for file in folder.rglob(f"{pickled}*.bin"):
            if not any(file.parent.glob(f"{safe}*.safetensors")):
                raise ValueError(
                    f"{file} holds pickled weights, which are never opened here because a pickle can run code; "
                    "save the model as safetensors and give that folder."
                )


def _folder_of(name: str) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{name} is a file; a model is a folder.")
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(f"There is no model folder {name}.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    # A bare name means one of sentence-transformers' own models, as it does in SentenceTransformer(name).
    tries = [name] if "/" in name else [f"sentence-transformers/{name}", name]
    reason = ""
    disable_progress_bars()
    try:
        for repository in tries:
            try:
                return Path(snapshot_download(repository, ignore_patterns=_NOT_NEEDED))
            except Exception as error:  # no network, no such repository, an impossible name: all mean "not to be had"
                reason = reason or (str(error).strip() or type(error).__name__).splitlines()[0]
    finally:
        enable_progress_bars()
    raise FileNotFoundError(
        f"There is no model folder {name!r}, and no such model could be had from the Hugging Face hub: {reason}"
    )


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Keep transformers' progress bars off the terminal inside the block."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def similarity_of(model: SentenceTransformer) -> str:
    """``"cosine"`` or ``"dot"``: what the plain dot product of the model's vectors amounts to, or should.

    A model that normalises its vectors is a cosine model whatever its settings say.

    Raises:
        ValueError: If the model asks for another similarity.
    """
    if _normalises(model[-1]):
        return "cosine"
    if model.similarity_fn_name not in SIMILARITIES:
        raise ValueError(
            f"The model's similarity is {model.similarity_fn_name!r}; only 'cosine' and 'dot' can be searched. "
            "Set its similarity_fn_name to one of them."
        )
    return model.similarity_fn_name


def with_ending(model: SentenceTransformer, similarity: str, device: str | None = None) -> SentenceTransformer:
    """A new ``SentenceTransformer`` over the same modules that ends with a ``Normalize`` iff ``similarity`` is cosine.

    The plain dot product of its outputs is then the score. ``truncate_dim``, which sentence-transformers applies
    behind the last module (and so behind ``Normalize``, and never while training), becomes a ``Dense`` module that
    starts as the truncation, so that what is trained, saved and searched are the same vectors.

    Args:
        model: Any model; it is not changed, but its modules are shared.
        similarity: ``"cosine"`` or ``"dot"``.
        device: Where to move the modules; they stay where they are when ``None``.
    """
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be 'cosine' or 'dot', not {similarity!r}.")
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
        old = [name for name, _ in modules]
        rebuilt.module_kwargs = OrderedDict((str(i), model.module_kwargs.get(name, [])) for i, name in enumerate(old))
    rebuilt.training = model.training
    for module in rebuilt:
        if not any(True for _ in module.parameters()):
            module.train(model.training)
    return rebuilt


def strip_normalize(modules: OrderedDict[str, nn.Module]) -> OrderedDict[str, nn.Module]:
    """The same modules without the ``Normalize`` at their end, also where it ends every route of a ``Router``."""
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
        raise ValueError("The model truncates its vectors but does not say how long they are; drop its truncate_dim.")
    weight = torch.eye(min(kept, held), held, dtype=model.dtype or torch.float32)
    parameter = next(last.parameters(), None)
    return Dense(
        held,
        min(kept, held),
        bias=False,
        activation_function=nn.Identity(),
        init_weight=weight if parameter is None else weight.to(parameter.device),
    )


def set_max_length(model: SentenceTransformer, max_length: int) -> None:
    """Cut every text of every tower after ``max_length`` tokens, special tokens included.

    The tokenizers are copied first, so that another model that shares these modules keeps its own lengths.

    Raises:
        ValueError: If the length is no positive integer, or longer than a tower can read.
    """
    if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 1:
        raise ValueError(f"max_length must be a positive number of tokens, not {max_length!r}.")
    for name, module in list(model.named_children())[:1]:
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
            raise ValueError(f"max_length is {max_length}, but the model reads at most {longest} tokens.")
        module.processor = copy.deepcopy(module.processor)
        module.max_seq_length = max_length
    else:
        raise ValueError(f"max_length cannot be set for a model that begins with {type(module).__name__}.")
    return module


def read_meta(folder: Path, kind: str) -> dict[str, Any]:
    """What :meth:`DualEncoder.save` noted in a folder; empty for a folder that something else wrote.

    Raises:
        ValueError: If the notes are damaged, or those of something else than an encoder.
    """
    file = folder / "pt_meta.json"
    if not file.is_file():
        return {}
    meta = folders.read_json(file)
    if meta.get("type") != kind:
        raise ValueError(f"{folder} holds a {meta.get('type')!r} by its pt_meta.json, not an encoder.")
    if not isinstance(meta.setdefault("settings", {}), dict):
        raise ValueError(f"{file} is damaged: its settings are {meta['settings']!r}.")
    return meta


def name_of(model: str | os.PathLike | SentenceTransformer) -> str:
    """A short name for people: the last part of a folder or hub name."""
    if not isinstance(model, SentenceTransformer):
        return Path(str(model)).name
    base = model.model_card_data.base_model
    return Path(base).name if base else type(model[0]).__name__
