"""What identifies an encoder: everything that changes its vectors, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import torch
import xxhash
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router
from tokenizers import Tokenizer
from torch import nn

from pt_dance.storage.digests import new_digest

# Of a transformer's configuration: where it came from and how it is run, which change from one save to the next.
_VOLATILE = {
    "_name_or_path", "architectures", "auto_map", "chunk_size_feed_forward", "dtype", "id2label", "label2id",
    "output_attentions", "output_hidden_states", "problem_type", "return_dict", "torch_dtype", "transformers_version",
    "use_cache",
}  # fmt: skip


def fingerprint(model: SentenceTransformer) -> str:
    """Return the digest (xxh3, 32 hexadecimal digits) of all that determines the model's vectors.

    That is: names, types, shapes and bytes of all weights; the modules in order with their settings; tokenizers and
    maximum lengths; prompts. Saving and loading keep it; any training step changes it.
    """
    digest = weights_digest(model)
    for name, module in model.named_children():
        _add_module(digest, name, module)
    settings = {
        "prompts": {name: text for name, text in model.prompts.items() if text},
        # An empty prompt keeps the default prompt away, so which names exist matters beside what they say.
        "prompt_names": sorted(model.prompts) if model.default_prompt_name else [],
        "default_prompt_name": model.default_prompt_name,
        "truncate_dim": model.truncate_dim,
    }
    digest.update(_canonical(settings))
    return digest.hexdigest()


def weights_digest(model: nn.Module) -> xxhash.xxh3_128:
    """Return a digest fed with the names, types, shapes and bytes of all weights of a model."""
    digest = new_digest()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy())
    return digest


def _add_module(digest: xxhash.xxh3_128, name: str, module: Any) -> None:
    digest.update(f"\0module {name} {type(module).__name__}\0".encode())
    if isinstance(module, Router):
        digest.update(_canonical({"default": module.default_route, "mappings": str(module.route_mappings)}))
        for route, part in module.sub_modules.items():
            for position, inner in part.named_children():
                _add_module(digest, f"{name}.{route}.{position}", inner)
        return
    if hasattr(module, "get_config_dict"):
        digest.update(_canonical(module.get_config_dict()))
    digest.update(_canonical({"max_length": getattr(module, "max_seq_length", None)}))
    config: Any = getattr(module, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        digest.update(_canonical(_without_volatile(config.to_dict())))
    if getattr(module, "tokenizer", None) is not None:
        _add_tokenizer(digest, module.tokenizer)


def _add_tokenizer(digest: xxhash.xxh3_128, tokenizer: Any) -> None:
    rust = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if rust is None:
        digest.update(_canonical({"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}))
        return
    # Truncation and padding stand before the added tokens. transformers sets both anew at every call, so they are
    # state, not identity; a bare tokenizer's truncation is its maximum length.
    text = rust.to_str()
    digest.update(text[max(text.find('"added_tokens"'), 0) :].encode())
    if rust is tokenizer:
        digest.update(_canonical({"truncation": rust.truncation}))
    else:
        digest.update(_canonical({"padding_side": tokenizer.padding_side, "truncation": tokenizer.truncation_side}))


def _without_volatile(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_volatile(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _VOLATILE and not key.startswith("_")
    }


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str, ensure_ascii=False).encode()
