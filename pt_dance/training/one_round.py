"""The two halves of a round, each read back from the run's folder where it was done before: mining, and training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from pt_dance.encoder.dual_encoder import DualEncoder
from pt_dance.training import negatives
from pt_dance.training.defaults import settle
from pt_dance.training.examples import build_examples
from pt_dance.training.inputs import check_in_corpus
from pt_dance.training.job import Job
from pt_dance.training.refresh.refresher import Work, draws
from pt_dance.training.run_folder import TEACHER
from pt_dance.training.teacher import TeacherScores
from pt_dance.training.trainer import keep_frozen, train


def mine_round(job: Job, number: int, what: str, retriever: Callable) -> tuple[pd.DataFrame | None, dict]:
    """Return the negatives of a round and the report on them; read back where they were mined before.

    Args:
        job: The call of ``fit``.
        number: Of the round.
        what: "negatives" or "query_negatives".
        retriever: Makes the ``DenseRetriever`` of the weights that the round starts from, with so many results.
    """
    run = job.run
    if (stored := run.read_frame(number, what)) is not None:
        return stored
    frame = negatives.mine(
        what, job.recipe[number - 1], job.training, job.corpus, retriever, qids=job.qids(number),
        seed=job.seed_of(number), engine=job.engine, verbose=job.verbose,
    )  # fmt: skip
    if frame is None:
        return None, {}
    check_in_corpus(frame["docno"], job.corpus, f"{what} of round {number}")
    earlier = (run.read_frame(before, what) for before in range(number - 1, 0, -1))
    about = negatives.report(frame, (stored[0] for stored in earlier if stored is not None))
    run.write_frame(number, what, frame, about)
    return frame, about


def train_round(
    job: Job, number: int, round_: Any, before: DualEncoder, started: DualEncoder | None, found: pd.DataFrame | None,
    query_negatives: pd.DataFrame | None, loggers: Sequence,
) -> dict:  # fmt: skip
    """Train a copy of an encoder and write it; return what :meth:`RunFolder.trained` will.

    Args:
        job: The call of ``fit``.
        number: Of the round.
        round_: The ``Round``, as it is to be trained.
        before: The encoder that it goes on from.
        started: The encoder that the run began with, whose frozen weights stay so.
        found: Document negatives, or None.
        query_negatives: Query negatives, or None.
        loggers: Callbacks of the trainer.
    """
    run, training, span, qids = job.run, job.training, job.spans[number - 1], job.qids(number)
    refreshes = job.refreshes(number)
    teacher = None
    if round_.teacher is not None:
        teacher = TeacherScores(round_.teacher, run.path / TEACHER, engine=job.engine, verbose=job.verbose)
    with contextlib.nullcontext() if teacher is None else job.processes.first_alone():
        examples = build_examples(
            training.topics, training.pairs, job.corpus, negatives=found, query_negatives=query_negatives,
            qids=qids, teacher=teacher, reads=training.readings, **draws(round_, span),
        )  # fmt: skip
    if refreshes is not None:
        examples.rows.later = refreshes.read
    encoder = before.copy()
    keep_frozen(started, encoder)
    if round_.similarity is not None:
        encoder = encoder.with_similarity(round_.similarity)
    settled = settle(round_, encoder, examples, started, refines=span.refines)
    if refreshes is not None:
        encoder.model.float()  # the weights that are handed over are
        refreshes.work = Work(
            refreshes.exchange.folder, refreshes.replays, encoder.copy(), round_, span, training, job.corpus, qids,
            job.seed_of(number), run.path / TEACHER, float(settled.report.get("teacher_scale", 1.0)), refreshes.measure,
        )  # fmt: skip
    with job.processes.together():
        loss = train(
            encoder, settled.examples, settled.round, span, run.checkpoints(number), name=f"round {number}",
            carried=run.checkpoints(number - 1), loggers=loggers, refreshes=refreshes, verbose=job.verbose,
        )  # fmt: skip

    def write() -> dict:
        folder = run.round(number) / "encoder"
        if not folder.exists():
            encoder.save(folder)
        refreshed = {} if refreshes is None else refreshes.report()
        return run.finish_training(number, loss, span.steps, encoder.fingerprint, settled.report, refreshed)

    return job.processes.from_first(write)
