"""What the study holds fixed: collections, encoders, budgets, seeds and the grid.

``FULL`` is what is reported; ``SMALL`` is the same study at toy size, to see that every part runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TRAINING = ("scifact", "nfcorpus-preprocessed", "squad-train-nqg-sentences", "medquad")
ENCODERS = ("static", "static-minilm", "minilm")
# The split that is reported of each training collection; "cut" means by cluster, from its only split.
REPORTED = {"medquad": "dev", "squad-train-nqg-sentences": "cut", "nfcorpus-preprocessed": "test", "scifact": "test"}
# All others are zero-shot, with the split that is measured.
ZERO_SHOT = {
    "cacm": "test", "cranfield": "test", "medquad": "test", "msmarco-dl19-pool": "test",
    "nfcorpus-preprocessed": "test", "nq-gold": "test", "scifact": "test", "squad-dev": "dev",
    "squadshifts-newwiki": "all", "squadshifts-reddit": "all", "vaswani": "test", "wikiqa": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """What every method of an encoder spends; all methods of one encoder spend the same.

    Attributes:
        unit: optimiser steps of one round; the schedule of every method is eight units.
        batch_size: pairs in a batch.
        queries: training queries at most, drawn once; None takes all.
        max_length: tokens of a text; None leaves the encoder's.
        seeds: seeds of a cell.
        learning_rates: the grid's learning rates.
        layer_rates: the grid's learning rates of encoders with a new linear layer (a projection, a head), which the
            rates that suit token embeddings break.
    """

    unit: int
    batch_size: int
    queries: int | None
    max_length: int | None
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    layer_rates: tuple[float, ...]

    @property
    def steps(self) -> int:
        """Steps of a method in all."""
        return 8 * self.unit


@dataclass(frozen=True)
class Protocol:
    """The study at one size.

    Attributes:
        training: collections that encoders are trained on.
        encoders: their names.
        budgets: by encoder.
        temperatures: the grid's temperatures of cross-entropies.
        weights: the grid's weights of dual directions.
        halving: shares of the steps after which the better third of a method's settings goes on.
        pool: negatives of a query (and of a document) that are drawn, and from how deep.
        dim: dimensions of a static tower from nothing.
        vocab_size: its tokens.
        zero_shot: collections that no encoder of a cell was trained on.
        zero_shot_queries: queries measured of each of them at most, drawn once.
        teacher_queries: training queries of each collection the teacher learns from at most.
        documents: documents kept of a training collection at most; None keeps all.
        words: words of a document that encoders read; BM25 reads all.
        resamples: bootstrap samples.
    """

    name: str = "full"
    training: tuple[str, ...] = TRAINING
    encoders: tuple[str, ...] = ENCODERS
    budgets: dict[str, Budget] = field(
        default_factory=lambda: {
            "static": Budget(250, 32, 4000, None, (1, 2, 3, 4, 5), (0.003, 0.01, 0.03), (0.0003, 0.001, 0.003)),
            "static-minilm": Budget(250, 32, 4000, None, (1, 2, 3, 4, 5), (0.001, 0.003, 0.01), (0.0003, 0.001, 0.003)),
            "minilm": Budget(50, 64, 4000, 64, (1, 2, 3), (1e-5, 3e-5, 1e-4), (1e-5, 3e-5, 1e-4)),
        }
    )
    temperatures: tuple[float, ...] = (0.02, 0.05)
    weights: tuple[float, ...] = (0.1, 1.0)
    halving: tuple[float, ...] = (0.1, 0.3)
    pool: tuple[int, int] = (8, 100)
    dim: int = 96
    vocab_size: int = 12000
    zero_shot: tuple[str, ...] = tuple(ZERO_SHOT)
    zero_shot_queries: int = 1000
    teacher_queries: int = 2000
    documents: int | None = None
    words: int = 100
    resamples: int = 2000

    @property
    def taught_on(self) -> tuple[str, ...]:
        """Collections that the teacher learns from, whichever of them are studied."""
        return TRAINING if self.name == "full" else self.training


FULL = Protocol()
SMALL = Protocol(
    name="small",
    training=("scifact",),
    encoders=("static",),
    budgets={"static": Budget(5, 16, 200, 64, (1, 2, 3), (0.003, 0.01), (0.001, 0.003))},
    temperatures=(0.05,),
    weights=(0.1,),
    halving=(0.25, 0.5),
    pool=(4, 30),
    dim=32,
    vocab_size=4000,
    zero_shot=("cacm", "cranfield"),
    zero_shot_queries=50,
    teacher_queries=50,
    documents=800,
    resamples=200,
)
