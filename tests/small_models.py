"""Real models, but small enough for tests that load and run them many times."""

from __future__ import annotations

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from pt_dance import DualEncoder


def small_bert(texts: list[str], folder: Path, *, hidden: int = 32, seed: int = 0, dropout: float = 0.1) -> str:
    """A BERT of two layers with a vocabulary from ``texts``, mean pooling, cosine, dropout; 64 tokens at most."""
    tokenizer = DualEncoder.static(texts * 2, dim=1, vocab_size=120).model[0].tokenizer
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
    )
    sizes = {"hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(vocab_size=fast.vocab_size, max_position_embeddings=64, initializer_range=0.2, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder / "bert")
    fast.save_pretrained(folder / "bert")
    tower = Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[tower, Pooling(hidden, "mean"), Normalize()]).save(str(folder / "st"))
    return str(folder / "st")
