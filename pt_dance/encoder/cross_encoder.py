"""A cross-encoder as a PyTerrier transformer: the teacher of the Margin-MSE recipes, and a re-ranker."""

from __future__ import annotations

import json
import os

import numpy as np
import pandas as pd
import pyterrier as pt
import torch
from sentence_transformers import CrossEncoder

from pt_dance.encoder.fingerprint import weights_digest
from pt_dance.encoder.opening import local_folder
from pt_dance.storage import options
from pt_dance.storage.attributes import Fixed, Live


class CrossEncoderScorer(pt.Transformer):
    """Score (query, text) rows with a sentence-transformers ``CrossEncoder``.

    The score is the model's raw logit, not its sigmoid: that is what Margin-MSE wants of a teacher
    (Hofstätter et al., arXiv 2010.02666).

    Args:
        model: A folder, a name on the Hugging Face hub, or a ``CrossEncoder`` with one label.
        batch_size: Pairs in a forward pass.
        text_field: Column with the documents' text.
        max_length: Pairs are cut after so many tokens; the model's own limit where None.
        device: Where the model runs; sentence-transformers' choice where None.
        dtype: "float32", or "bfloat16" for autocast: two to three digits, and faster where the processor has it.
        verbose: Shows a progress bar.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the model has more than one label, or there is no such dtype.
    """

    schematic = {"label": "CrossEncoder", "help_url": None}
    max_length, device, batch_size, text_field = Fixed(), Fixed(), Live(options.whole), Live(options.column)
    dtype = Live(lambda name, value: options.choice(name, value, ("float32", "bfloat16")))

    def __init__(
        self,
        model: str | os.PathLike | CrossEncoder,
        *,
        batch_size: int = 32,
        text_field: str = "text",
        max_length: int | None = None,
        device: str | None = None,
        dtype: str = "float32",
        verbose: bool = False,
    ):
        super().__init__()
        self.batch_size, self.text_field = batch_size, text_field
        self.max_length = options.whole("max_length", max_length, or_none=True)
        self.dtype = dtype
        if not isinstance(model, CrossEncoder):
            name = os.fspath(model)
            model = CrossEncoder(
                str(local_folder(name) or name), max_length=self.max_length, device=device, trust_remote_code=False
            )
        if model.num_labels != 1:
            raise ValueError(f"the cross-encoder has {model.num_labels} labels; scoring needs a model with one")
        self.model = model
        self.device = device
        self.verbose = verbose

    @property
    def fingerprint(self) -> str:
        """Identifies weights, tokenizer and maximum length; 32 hexadecimal digits (xxh3, 128 bits)."""
        digest = weights_digest(self.model)
        tokenizer = json.loads(self.model.tokenizer.backend_tokenizer.to_str())
        # how the last batch was padded and cut is no part of the model
        digest.update(json.dumps(tokenizer | {"padding": None, "truncation": None}, sort_keys=True).encode())
        digest.update(f"{self.model.max_seq_length} {self.dtype}".encode())
        return digest.hexdigest()

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Score each row; identical (query, text) pairs are scored once.

        Args:
            inp: ``qid``, ``query``, ``docno`` and the text column.

        Returns:
            The same rows and columns with ``score`` (the raw logit) and ``rank``.
        """
        pt.validate.result_frame(inp, ["query", self.text_field], context=self)
        kept = inp.drop(columns=["score", "rank"], errors="ignore")
        if len(inp) == 0:
            return kept.assign(score=pd.Series(dtype="float64"), rank=pd.Series(dtype="int64"))
        for column in ("query", self.text_field):
            wrong = ~inp[column].map(lambda text: isinstance(text, str))
            if wrong.any():
                row = inp[wrong].iloc[0]
                raise TypeError(
                    f"column {column!r} of qid {row['qid']!r}, docno {row['docno']!r} is {row[column]!r}, not a text"
                )
        pairs = pd.MultiIndex.from_frame(inp[["query", self.text_field]])
        number, distinct = pd.factorize(pairs)
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            scores = self.model.predict(
                [tuple(pair) for pair in distinct],
                batch_size=self.batch_size,
                show_progress_bar=self.verbose,
                activation_fn=torch.nn.Identity(),
                convert_to_numpy=True,
            )
        return pt.model.add_ranks(kept.assign(score=np.asarray(scores, dtype=np.float64).reshape(-1)[number]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CrossEncoderScorer) and (
            self is other or (self.fingerprint, self.text_field) == (other.fingerprint, other.text_field)
        )

    def __hash__(self) -> int:
        return hash((CrossEncoderScorer, self.fingerprint, self.text_field))

    def __repr__(self) -> str:
        name = os.path.basename(str(self.model.config._name_or_path or "")) or "model"
        return f"CrossEncoderScorer({name!r})"
