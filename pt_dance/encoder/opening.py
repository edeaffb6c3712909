"""Open sentence-transformers models and plain transformers checkpoints safely: nothing is unpickled or run."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Pooling
from tokenizers.processors import TemplateProcessing
from torch import nn

from pt_dance.encoder import published
from pt_dance.encoder.models import SIMILARITIES, no_bars
from pt_dance.encoder.published import Published
from pt_dance.storage import folders
from pt_dance.storage.meta import META, entry_of, read_meta
from pt_dance.storage.options import choice, path_of
from pt_dance.storage.texts import first_line

POOLINGS = ("cls", "mean")

# What reading a model could unpickle, and the file that holds the same weights safely.
_PICKLES = {"pytorch_model": "model", "adapter_model": "adapter_model"}
_CONVERT = (
    'python -c "from glob import glob; import torch, safetensors.torch as s; s.save_file({{k: v.contiguous().clone() '
    "for f in glob('{}*.bin') for k, v in torch.load(f, weights_only=True).items()}}, '{}.safetensors', "
    "{{'format': 'pt'}})\""
)
_NOT_NEEDED = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.ot", "*.msgpack", "onnx/*", "openvino/*"]


def open_model(
    model: str | os.PathLike | SentenceTransformer,
    device: str | None = None,
    pooling: str | None = None,
    similarity: str | None = None,
) -> SentenceTransformer:
    """Open a model by folder or hub name, in float32; a model in memory that is in float32 is returned as it is.

    Weights are read from safetensors, and no code that comes with the model is run. Arguments and errors are those of
    :class:`pt_dance.DualEncoder`; where ``similarity`` is ``None``, the folder or :mod:`pt_dance.encoder.published`
    says it.
    """
    choice("pooling", pooling, POOLINGS, or_none=True)
    choice("similarity", similarity, SIMILARITIES, or_none=True)
    if isinstance(model, SentenceTransformer):
        if pooling is not None:
            raise ValueError(f"pooling={pooling!r} is for plain transformers checkpoints; this model pools already")
        return _in_float32(model, copied=True)
    if not isinstance(model, (str, os.PathLike)) or not str(model):
        raise TypeError(
            "a model is given as a folder, a name on the Hugging Face hub or a SentenceTransformer, "
            f"not as {type(model).__name__} {model!r}"
        )
    folder = _folder_of(os.fspath(model))
    check_folder(folder)
    # What DualEncoder.save wrote says all for itself.
    known = None if (folder / META).is_file() else published.find(model)
    plain = not (folder / "modules.json").is_file()
    if pooling is not None and not plain:
        raise ValueError(
            f"pooling={pooling!r} is for plain transformers checkpoints; {folder} says itself how it pools"
        )
    with no_bars():
        try:
            opened = SentenceTransformer(str(folder), device=device, model_kwargs={"use_safetensors": True})
            opened = _in_float32(opened)
            if plain:
                _complete(opened, folder, known, pooling, similarity)
        except Exception as error:  # whatever a damaged folder provokes in the libraries below, the user gets one line
            reason = first_line(error)
            raise ValueError(f"{folder} cannot be read as a sentence-transformers model: {reason}") from error
    if plain and known is None and (pooling is None or similarity is None):
        assumed = [
            f"{name}={value!r}"
            for name, value, given in (("pooling", "mean", pooling), ("similarity", "cosine", similarity))
            if given is None
        ]
        warnings.warn(
            f"{folder} is a plain transformers checkpoint, which does not say how it is to be used: "
            f"{' and '.join(assumed)} {'is' if len(assumed) == 1 else 'are'} assumed; say so, or "
            "pooling='cls', similarity='dot' for models such as TAS-B",
            stacklevel=4,
        )
    if known is not None:
        if similarity is None and not _says_similarity(folder):
            opened.similarity_fn_name = known.similarity
        if not any(opened.prompts.values()):
            opened.prompts |= {"query": known.query, "document": known.document}
    return opened


def _in_float32(model: SentenceTransformer, copied: bool = False) -> SentenceTransformer:
    """Return the model with weights in float32: small steps are lost in half precision, and lengths are not 1."""
    if not any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in model.state_dict().values()):
        return model
    return (copy.deepcopy(model) if copied else model).float()


def _complete(
    model: SentenceTransformer, folder: Path, known: Published | None, pooling: str | None, similarity: str | None
) -> None:
    """Give the model of a plain transformers checkpoint the modules that it was trained with."""
    tower, dim = model[0], model[0].get_embedding_dimension()
    pooling = pooling or (known.pooling if known is not None else None) or "mean"
    tokens = None if known is None else known.query_tokens
    modules: list[nn.Module] = [Pooling(dim, pooling, include_prompt=tokens is None)]
    if known is not None and known.head is not None:
        modules += _head_of(folder, known.head)
    if tokens is not None:
        tokenizer = tower.tokenizer
        cls = (tokenizer.cls_token, tokenizer.cls_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{cls[0]} $A", special_tokens=[cls])
        tower.query_expansion = {"strategy": "fixed", "attend": True, "length": tokens}
    for number, module in enumerate(modules, 1):
        model._modules[str(number)] = module.to(model.device)
    if similarity is not None:
        model.similarity_fn_name = similarity


def _head_of(folder: Path, names: tuple[str, str]) -> list[nn.Module]:
    """Read a linear layer and a LayerNorm that sentence-transformers does not know to be part of a checkpoint."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            found |= {key: weights.get_tensor(key).float() for key in weights.keys() if key.startswith(names)}  # noqa: SIM118
    linear, norm = names
    weight = found[f"{linear}.weight"]
    dense = Dense(weight.shape[1], weight.shape[0], True, nn.Identity(), weight, found[f"{linear}.bias"])
    layer_norm = LayerNorm(weight.shape[0])
    layer_norm.norm.load_state_dict({"weight": found[f"{norm}.weight"], "bias": found[f"{norm}.bias"]})
    return [dense, layer_norm]


def _says_similarity(folder: Path) -> bool:
    file = folder / "config_sentence_transformers.json"
    return file.is_file() and folders.read_json(file).get("similarity_fn_name") is not None


def check_folder(folder: Path) -> None:
    """Refuse a folder that is no model, or whose weights would have to be unpickled.

    Raises:
        ValueError: Naming the folder or the pickled file.
    """
    if not (folder / "modules.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no sentence-transformers model: it has neither modules.json nor config.json")
    for pickled, safe in _PICKLES.items():
        for file in folder.rglob(f"{pickled}*.bin"):
            if not any(file.parent.glob(f"{safe}*.safetensors")):
                raise ValueError(
                    f"{file} holds pickled weights, which could run code when they are opened; if you trust them, "
                    f"convert them, in that folder: {_CONVERT.format(pickled, safe)}"
                )


def local_folder(name: str) -> Path | None:
    """Return the absolute path of a model's folder; None for what can only be a name on the hub.

    Raises:
        FileNotFoundError: If it is a path, but there is nothing.
        ValueError: If it is no path, or that of a file.
    """
    folder = path_of(name, "model")
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{name} is a file; a model is a folder")
    if os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(f"there is no model folder {name}")
    return None


def _folder_of(name: str) -> Path:
    if (folder := local_folder(name)) is not None:
        return folder
    # A bare name means one of sentence-transformers' own models, as it does in SentenceTransformer(name).
    tries = [name] if "/" in name else [f"sentence-transformers/{name}", name]
    reason = ""
    with no_bars():
        for repository in tries:
            try:
                return Path(snapshot_download(repository, ignore_patterns=_NOT_NEEDED))
            except Exception as error:  # no network, no such repository, an impossible name: it cannot be fetched
                reason = reason or first_line(error)
    raise FileNotFoundError(
        f"there is no model folder {name!r}, and no such model could be fetched from the Hugging Face hub: {reason}"
    )


def read_note(folder: Path, kind: str) -> dict[str, Any]:
    """Return what :meth:`DualEncoder.save` noted in a folder; empty for a folder that something else wrote.

    Raises:
        ValueError: If the note is damaged, or that of something else than an encoder.
    """
    if not (folder / META).is_file():
        return {}
    settings = {"settings": entry_of(dict, "an object", missing=True)}
    return read_meta(folder, "encoder", type=kind, entries=settings, advice="save one with DualEncoder.save()")


def folder_given(model: str | os.PathLike | SentenceTransformer) -> Path | None:
    """Return the absolute path of a model that was given as a folder; a name on the hub is none."""
    is_there = not isinstance(model, SentenceTransformer) and Path(os.path.expanduser(model)).exists()
    return path_of(model) if is_there else None


def model_of(given: Any) -> Any:
    """Return the model of an encoder; a model, a folder or a name is returned as it is."""
    return given if isinstance(given, (str, os.PathLike, SentenceTransformer)) else getattr(given, "model", given)


def name_of(given: Any) -> str:
    """Return a short name for people: an encoder's own, or the last part of a folder or hub name."""
    if isinstance(given, (str, os.PathLike)):
        return Path(given).name
    if not isinstance(given, SentenceTransformer):
        return str(given.name)
    base = given.model_card_data.base_model
    return Path(base).name if base else type(given[0]).__name__
