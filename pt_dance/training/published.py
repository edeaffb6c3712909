"""What the releases of the methods train with, for the recipes that are called with ``published=True``.

ANCE: github.com/microsoft/ANCE, ``commands/run_train.sh`` (Passage ANCE, FirstP) and the README's warm-up. DANCE:
github.com/thunlp/DANCE, the README's two stages. Both clip gradients at norm 1, decay no weights, and take the
defaults of their scripts otherwise. Margin-MSE: github.com/sebastian-hofstaetter/matchmaker, which the paper's
repository neural-ranking-kd calls its source, ``config/train/defaults.yaml`` and ``matchmaker/train.py``.
"""

from __future__ import annotations

_LAMB = {"optim": "lamb", "adam_epsilon": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0}
_PAIRS = {"loss": "pairwise", "similarity": "dot", "loss_options": {"temperature": 1.0}}

#: BM25's negatives: 32 rows, 2e-4.
ANCE_WARM_UP = {**_PAIRS, "learning_rate": 2e-4, "batch_size": 32, "warmup": 1000, "training_arguments": _LAMB}

#: 4 GPUs x 8 rows x 2 accumulated, 1e-6, 20 of the top 200 of a fifth of the queries, a checkpoint every 10,000 steps.
ANCE = {
    **_PAIRS, "learning_rate": 1e-6, "batch_size": 64, "warmup": 5000, "training_arguments": _LAMB, "steps": 10_000,
    "depth": 200, "negatives_per_query": 20, "share_of_queries": 0.2,
}  # fmt: skip

#: 8 GPUs x 4 rows x 2 accumulated, 5e-6, 20 of the top 200, a checkpoint every 5,000 steps; that a refresh takes a
#: fifth of the queries is the default of ANCE's script, assumed here.
DANCE = {
    "learning_rate": 5e-6, "batch_size": 64, "warmup": 3000, "training_arguments": _LAMB, "steps": 5_000, "depth": 200,
    "negatives_per_query": 20, "share_of_queries": 0.2,
}  # fmt: skip

#: Adam, 7e-6, 32 triples of a query, a positive and a BM25 negative, gradients cut at norm 10,000 only. The rate is
#: constant here: the file has it fall when validation stops to improve, which the newest code no longer does (a cosine
#: over 8,500 steps instead).
MARGIN_MSE = {
    "similarity": "dot", "loss_options": {"temperature": 1.0}, "learning_rate": 7e-6, "batch_size": 32, "warmup": 0.0,
    "scheduler": "constant", "training_arguments": {"weight_decay": 0.0, "max_grad_norm": 10_000.0},
}  # fmt: skip
