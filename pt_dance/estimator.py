"""DanceRetriever: the dense retriever that is trained inside a PyTerrier pipeline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyterrier as pt
from ir_measures import nDCG

from pt_dance.corpus.corpus import Corpus
from pt_dance.encoder.dual_encoder import DualEncoder
from pt_dance.index.dense_index import DenseIndex
from pt_dance.mining import mine_documents, mine_queries, needs_dense, positive_pairs, resolve_source, share_of
from pt_dance.recipes import Round, check_recipe
from pt_dance.recipes import dance as dance_recipe
from pt_dance.retriever.dense import DenseRetriever
from pt_dance.storage.folders import remove_folder
from pt_dance.storage.writing import KEPT, writing
from pt_dance.training.examples import build_examples
from pt_dance.training.history import best_round, describe_round
from pt_dance.training.inputs import TrainingInput, check_in_corpus, check_query_texts, check_training_input
from pt_dance.training.options import check_measures, check_one_process, check_options, is_whole
from pt_dance.training.run_files import RunFiles, keep_frozen
from pt_dance.training.run_folder import META, RunFolder, read_meta
from pt_dance.training.settings import fit_settings
from pt_dance.training.teacher import TeacherScores
from pt_dance.training.trainer import train
from pt_dance.training.validation import validate


class DanceRetriever(RunFiles, pt.Estimator, pt.Artifact):
    """A dense retriever that ``fit`` trains: mine negatives, train, refresh the index, validate, round after round.

    As a transformer it is its current :class:`~pt_dance.DenseRetriever`: a query frame is searched, a result frame is
    re-scored from stored vectors. Before ``fit`` that is the encoder as it came.

    .. code-block:: python

        dance = DanceRetriever(DualEncoder("sentence-transformers/all-MiniLM-L6-v2"), corpus, "runs/medquad")
        (bm25 % 200 >> dance).fit(train_topics, train_qrels, dev_topics, dev_qrels)
        pt.Experiment([bm25, dance, bm25 % 100 >> dance], test_topics, test_qrels, [nDCG @ 10])
    """

    ARTIFACT_TYPE = "dense_retriever"
    ARTIFACT_FORMAT = "dance"
    ARTIFACT_PACKAGE_HINT = "pt_dance"
    schematic = {"label": "DanceRetriever", "help_url": None}

    def __init__(
        self,
        encoder: DualEncoder,
        corpus: Corpus | object,
        path: str | Path,
        *,
        recipe: Round | Sequence[Round] | None = None,
        num_results: int = 1000,
        measure=nDCG @ 10,
        seed: int = 42,
        patience: int | None = None,
        keep: str = "all",
        verbose: bool = True,
    ):
        """Prepares a run; nothing is encoded or trained yet.

        Args:
            encoder: where training starts. It is never changed: each round trains a copy.
            corpus: the documents, as a :class:`~pt_dance.Corpus` (for MaxP its ``to_passages``) or anything that
                ``Corpus.build`` takes (then in ``path/corpus``). None only where nothing is to be trained or indexed.
            path: folder of the run: encoders, indexes and history of every round. A folder with a run in it is gone on
                with; any other folder that is not empty is refused.
            recipe: rounds to train, see :mod:`pt_dance.recipes`; :func:`pt_dance.recipes.dance` where None.
            num_results: documents retrieved for a query.
            measure: ir_measures measure, or a list of them, computed on the validation topics after each round. The
                first one says which round is best.
            seed: fixes mining, order of training and dropout: on a CPU two fits with one seed give the same weights.
            patience: stops when this many rounds in a row were not better than the best; None never stops early.
            keep: "all" keeps the index of every round; "best" drops those of rounds that are neither the best nor the
                last, so that disk use does not grow with the rounds. Encoders are always kept.
            verbose: shows progress and a line a round.

        Raises:
            TypeError: if the encoder is no DualEncoder or the recipe no rounds.
            ValueError: if an option makes no sense.
            FileExistsError: if ``path`` is a folder with something else in it.
        """
        if not isinstance(encoder, DualEncoder):
            raise TypeError(
                f"encoder must be a pt_dance.DualEncoder, not {type(encoder).__name__}; DualEncoder(model) makes one"
            )
        check_options(num_results=num_results, seed=seed, patience=patience, keep=keep, path=path)
        self.recipe = check_recipe(dance_recipe() if recipe is None else recipe)
        self.measure = measure
        self.measures = check_measures(measure)
        self._run = RunFolder(path)
        self.path = Path(path)
        self.num_results = int(num_results)
        self.seed = int(seed)
        self.patience = patience
        self.keep = keep
        self.verbose = verbose
        self.corpus = corpus if corpus is None or isinstance(corpus, Corpus) else self._own_corpus(corpus)
        self.initial_encoder = encoder
        self._round = 0
        self._history: list[dict] = []
        self._retriever: DenseRetriever | None = None
        if (self.path / META).exists():
            meta = read_meta(self.path, type(self))
            self._settle(meta["round"], meta["history"])

    # ------------------------------------------------------------------ what it is now

    @property
    def encoder(self) -> DualEncoder:
        """The current encoder: the best round's, or the one given where nothing was trained yet."""
        return self.initial_encoder if self._round == 0 else self._encoder_of(self._round)

    @property
    def index(self) -> DenseIndex:
        """The index of the current encoder over the corpus; made on first use where nothing was trained yet."""
        return self.retriever().index

    @property
    def history(self) -> pd.DataFrame:
        """A row a round: loss, validation measures, seconds to mine, train, refresh and validate, negatives."""
        return pd.DataFrame(self._history)

    def retriever(self, num_results: int | None = None, *, round: int | None = None) -> DenseRetriever:
        """The dense retriever of the current encoder, or of a given round, which no later round changes.

        Args:
            num_results: documents for a query; this retriever's where None.
            round: number of the round, 0 for the encoder as it came; the best where None.
        """
        if round is None and self._retriever is not None:
            dense = self._retriever
        else:
            number = self._round if round is None else round
            if number != self._round and number != 0 and not (self._run.round(number) / "trained.json").exists():
                raise ValueError(
                    f"round={round!r} was not trained in {str(self.path)!r}; it has rounds 0 to {len(self._history)}"
                )
            dense = self._refreshed(number).retriever(num_results=self.num_results)
            if round is None:
                self._retriever = dense
        return dense if num_results in (None, dense.num_results) else dense.index.retriever(num_results=num_results)

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Retrieves for a query frame; re-scores a result frame by docno, keeping all rows and other columns."""
        with pt.validate.any(inp, context=self) as v:
            v.result_frame(["query"])
            v.result_frame(["query_vec"])
            v.query_frame(["query"])
            v.query_frame(["query_vec"])
        if len(inp) == 0:  # inspecting a pipeline must not make an index
            return DenseRetriever(DenseIndex(self._run.round(self._round) / "index"))(inp)
        if self._retriever is None and "query_vec" not in inp.columns:
            check_query_texts(inp, blank=True)  # an index may have to be made first, which bad input must not begin
        return self.retriever()(inp)

    def subtransformers(self) -> dict:
        """None of the attributes is a stage of its own."""
        return {}

    def __mod__(self, right: int) -> pt.Transformer:
        """The best ``right`` results of each query."""
        if not is_whole(right) or right < 1:
            raise ValueError(f"% {right!r} makes no sense: the number of results to keep must be at least 1")
        return super().__mod__(int(right))

    # ------------------------------------------------------------------ training

    def fit(self, topics_or_res_tr, qrels_tr, topics_or_res_va=None, qrels_va=None) -> DanceRetriever:
        """Trains round by round. A fit that was interrupted goes on where it stopped.

        Args:
            topics_or_res_tr: training topics (``qid``, ``query``), or results for them (``docno`` too), which then
                are the first stage's negatives, as in ``(bm25 % 200 >> dance).fit(...)``.
            qrels_tr: ``qid``, ``docno``, ``label``; a label above 0 is relevant.
            topics_or_res_va: validation topics; without them the last round is the current one.
            qrels_va: validation qrels.

        Returns:
            This retriever, now with the best round's encoder and index.

        Raises:
            KeyError, TypeError, ValueError: one sentence on what is wrong with the frames, before any work is done.
            RuntimeError: one of several processes called this.
            OSError: the disk is full or cannot be written to; what was finished is kept.
        """
        check_one_process()
        if self.corpus is None:
            raise ValueError("training needs the documents: give corpus=... when making or loading the DanceRetriever")
        if (topics_or_res_va is None) != (qrels_va is None):
            raise ValueError("validation needs both topics and qrels; give both or neither")
        training = check_training_input(topics_or_res_tr, qrels_tr, corpus=self.corpus, context=self, what="training")
        validation = None
        if topics_or_res_va is not None:
            validation = check_training_input(
                topics_or_res_va, qrels_va, corpus=self.corpus, context=self, what="validation"
            )
        with writing(self.path, "the run", KEPT):
            self._fit(training, validation)
        return self

    def _fit(self, training: TrainingInput, validation: TrainingInput | None) -> None:
        self._run.begin(fit_settings(self, training, validation))
        if not (self._run.round(0) / "encoder").exists():
            self.initial_encoder.save(self._run.round(0) / "encoder")
        pairs = positive_pairs(training.topics, training.qrels)

        measured = [] if validation is None else [str(measure) for measure in self.measures]
        history: list[dict] = []
        for number, round_ in enumerate(self.recipe, start=1):
            row = self._run.finished(number, measured)
            is_new = row is None
            if is_new:
                row = self._fit_round(number, round_, training, validation, pairs)
                self._run.finish(number, row)
                if self.verbose:
                    print(describe_round(row, len(self.recipe), self.measures))
            history.append(row)
            if self.keep == "best" and (is_new or number == len(self.recipe)):
                self._run.drop_indexes(keep={best_round(history, self.measures[0]), number})
            if self.patience is not None and len(history) - best_round(history, self.measures[0]) >= self.patience:
                break
        self._settle(best_round(history, self.measures[0]), history)
        self._write_meta(self.path)

    def _fit_round(
        self, number: int, round_: Round, training: TrainingInput, validation: TrainingInput | None, pairs: pd.DataFrame
    ) -> dict:
        started = time.perf_counter()
        qids = share_of(training.topics["qid"], round_.share_of_queries, turn=number, seed=self.seed)
        negatives, mined = self._mine(number, round_, training, qids, "negatives")
        query_negatives, mined_queries = self._mine(number, round_, training, qids, "query_negatives")
        mining_done = time.perf_counter()
        trained, trained_as = self._train(number, round_, training, pairs, qids, negatives, query_negatives)
        training_done = time.perf_counter()
        dense = self._refreshed(number).retriever(num_results=self.num_results)
        refresh_done = time.perf_counter()
        measured = {} if validation is None else validate(dense, validation, self.measures)
        return {
            "round": number,
            "name": round_.name or round_.loss_name,
            "loss": trained_as,
            "training_loss": trained["loss"],
            "steps": trained["steps"],
            **measured,
            "negatives_per_query": mined.get("per_source", 0.0),
            "new_negatives": mined.get("new"),
            "queries_short_of_negatives": mined.get("short", 0),
            "query_negatives_per_document": mined_queries.get("per_source", 0.0),
            "mine_seconds": mining_done - started,
            "train_seconds": training_done - mining_done,
            "refresh_seconds": refresh_done - training_done,
            "validate_seconds": time.perf_counter() - refresh_done,
        }

    def _mine(
        self, number: int, round_: Round, training: TrainingInput, qids: pd.Series, what: str
    ) -> tuple[pd.DataFrame | None, dict]:
        """Negatives of a round from its source; read back where they were mined before an interruption."""
        source = getattr(round_, what)
        if source is None or (what == "query_negatives" and not round_.is_dual):
            return None, {}
        if (stored := self._run.read_frame(number, what)) is not None:
            return stored
        options = dict(
            depth=round_.depth, negatives=round_.negatives_per_query, sampling=round_.sampling,
            rank_range=round_.rank_range, filters=round_.filters, seed=self.seed + 1000 * number, qids=qids,
            verbose=self.verbose,
        )  # fmt: skip
        if what == "negatives":
            dense = self.retriever(round=number - 1) if needs_dense(source) else None
            sources = resolve_source(source, dense=dense, first_stage=training.first_stage)
            if not sources:
                return None, {}
            frame = mine_documents(sources, training.topics, training.qrels, self.corpus, **options)
        elif source == "dense":
            index = self._refreshed(number - 1)
            frame = mine_queries(index.encoder, training.topics, training.qrels, self.corpus, index=index, **options)
        else:
            frame = mine_queries(source, training.topics, training.qrels, self.corpus, **options)
        check_in_corpus(frame["docno"], self.corpus, f"{what} of round {number}")
        report = frame.attrs["mining"]
        about = {**report, "per_source": report["negatives"] / max(report["sources"], 1)}
        earlier = next((f for n in range(number - 1, 0, -1) if (f := self._run.read_frame(n, what))), None)
        if earlier is not None:
            known = pd.MultiIndex.from_frame(earlier[0][["qid", "docno"]])
            about["new"] = float((~pd.MultiIndex.from_frame(frame[["qid", "docno"]]).isin(known)).mean())
        self._run.write_frame(number, what, frame, about)
        return frame, about

    def _train(self, number, round_, training, pairs, qids, negatives, query_negatives) -> tuple[dict, str]:
        """Trains a copy of the last round's encoder and writes it; read back where that was done before."""
        folder = self._run.round(number) / "encoder"
        if negatives is None and round_.loss == "pairwise":
            # without any mined negative there is nothing to compare in pairs: in-batch negatives warm the model up
            round_ = replace(round_, loss="contrastive", loss_options={"temperature": 0.05, "similarity": "cosine"})
        if (stored := self._run.trained(number)) is not None:
            remove_folder(self._run.checkpoints(number))
            return stored, round_.loss_name
        encoder = self._encoder_of(number - 1).copy()
        keep_frozen(self.initial_encoder, encoder)
        if round_.similarity is not None:
            encoder = encoder.with_similarity(round_.similarity)
        teacher = None
        if round_.teacher is not None:
            teacher = TeacherScores(round_.teacher, self.path / "teacher.sqlite", verbose=self.verbose)
        examples = build_examples(
            training.topics,
            pairs,
            self.corpus,
            negatives=negatives,
            query_negatives=query_negatives,
            negatives_per_row=round_.negatives_per_row,
            query_negatives_per_row=round_.query_negatives_per_row,
            epochs=round_.epochs,
            seed=self.seed + 1000 * number,
            qids=qids,
            teacher=teacher,
        )
        checkpoints = self._run.checkpoints(number)
        trained = train(encoder, examples, round_, checkpoints, seed=self.seed + 1000 * number, verbose=self.verbose)
        if not folder.exists():
            encoder.save(folder)
        self._run.finish_training(number, trained.loss, trained.steps, encoder.fingerprint)
        remove_folder(checkpoints)
        return self._run.trained(number), round_.loss_name

    def _settle(self, number: int, history: list[dict]) -> None:
        self._round, self._history, self._retriever = number, history, None

    def __rrshift__(self, left) -> pt.Compose:
        """Put the retriever behind another stage; type checkers and editors know that such a pipeline has ``fit``."""
        return pt.Compose(left, self)

    def __repr__(self) -> str:
        """Short: it is the row's name in tables."""
        return f"DanceRetriever({str(self.path)!r})"
