r"""What is each training method worth? One table over several seeds, with significance.

For each seed an encoder is warmed up with MNRL on BM25's negatives. Every method then goes on from there with the same
budget: the same rounds, epochs, batch size and learning rate; without normalisation it goes on with dot products, for
which a warm-up with cosines is a poor start (one with dot products was worse).
Methods with negatives of the first stage share one pool of BM25's negatives (drawn once), and likewise one pool of
query negatives (BM25 over the training queries, with the document as the query); ANCE and DANCE mine theirs from the
model before each round. No round is chosen on the split that is reported: the last one counts.

Significance: paired t-tests over the queries, each query's measure averaged over the seeds, Holm-corrected.

    python experiments/train_teacher.py --dataset dance:../shared/data/medquad --out runs/teacher-medquad --bf16
    python experiments/methods.py --dataset dance:../shared/data/medquad --teacher runs/teacher-medquad/model \
        --teacher-bf16 --jobs 2 --out runs/methods-medquad --results experiments/results/methods-medquad-static
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyterrier as pt
from ir_measures import AP, RR, R, nDCG
from scipy.stats import ttest_rel
from statsmodels.stats.multitest import multipletests

from common import make_encoder, open_corpus, split
from pt_dance import Corpus, CrossEncoderScorer, DanceRetriever, DualEncoder, Round, bm25, mining, recipes
from pt_dance.recipes import current_model
from pt_dance.training.examples import build_examples
from pt_dance.training.teacher import TeacherScores

MEASURES = [nDCG @ 10, RR @ 10, AP @ 100, R @ 10]
BASELINE = "MNRL"
# (what is claimed, the system that should win, the one it should beat)
CLAIMS = [
    ("refreshed negatives beat the first stage's (ANCE)", "MNRL, ANCE negatives", "MNRL"),
    ("normalisation helps ANCE (DANCE)", "DANCE +norm -dual", "ANCE = DANCE -norm -dual"),
    ("the dual loss helps with normalisation (DANCE)", "DANCE +norm +dual", "DANCE +norm -dual"),
    ("the dual loss helps without normalisation", "DANCE -norm +dual", "ANCE = DANCE -norm -dual"),
    ("DANCE beats ANCE", "DANCE +norm +dual", "ANCE = DANCE -norm -dual"),
    ("same-tower negatives help (SamToNe)", "SamToNe, query side", "MNRL"),
    ("both sides help more than one", "SamToNe, both sides", "SamToNe, query side"),
    ("the dual loss helps MNRL", "MNRL-Dual", "MNRL"),
    ("a teacher's margins beat MNRL", "Margin-MSE", "MNRL"),
    ("the dual loss helps Margin-MSE", "Margin-MSE-Dual", "Margin-MSE"),
    ("Margin-MSE and MNRL together beat Margin-MSE-Dual", "Margin-MSE + MNRL, dual", "Margin-MSE-Dual"),
    ("Margin-MSE and MNRL together beat MNRL-Dual", "Margin-MSE + MNRL, dual", "MNRL-Dual"),
]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="dance:pydocs", help="pt.get_dataset name (default: %(default)s)")
    parser.add_argument("--encoder", default="static", help="static, static-minilm, all-MiniLM-L6-v2, or a model")
    parser.add_argument("--teacher", type=Path, help="folder of a cross-encoder; without it no Margin-MSE")
    parser.add_argument("--teacher-length", type=int, default=80, help="tokens of a pair for the teacher")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--split", default="dev", help="split that is reported (default: %(default)s)")
    parser.add_argument("--topics", type=int, help="train on a random part of the topics")
    parser.add_argument("--split-topics", type=int, help="report on a random part of the split's topics")
    parser.add_argument("--documents", type=int, help="keep about so many documents, all relevant ones among them")
    parser.add_argument("--warm-up", type=int, default=None, help="epochs of warm-up (default: 3 static, 0 otherwise)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of one epoch after it (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--warm-up-rate", type=float, default=0.03, help="its learning rate (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, help="after the warm-up (default: .003 static, 2e-5 otherwise)")
    parser.add_argument("--temperature", type=float, default=0.03, help="of the cross-entropies (default: %(default)s)")
    parser.add_argument("--margin-temperature", type=float, default=0.05, help="cosine margin for a logit of 1")
    parser.add_argument("--mnrl-weight", type=float, default=10.0, help="of MNRL beside Margin-MSE")
    parser.add_argument("--teacher-bf16", action="store_true", help="let the teacher score with bfloat16 autocast")
    parser.add_argument("--bf16", action="store_true", help="train with bfloat16 autocast")
    parser.add_argument("--methods", nargs="+", help="names of the rows (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at the same time, sharing the cores")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"), help="folder for everything")
    parser.add_argument("--results", type=Path, help="write the tables to this path, once .csv and once .md")
    parser.add_argument("--only-seed", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


# --- the methods ------------------------------------------------------------------------------------------------------


def methods(
    args: argparse.Namespace, queries: pt.Transformer, teacher: pt.Transformer | None
) -> dict[str, Callable[[], list[Round]]]:
    """Return the rows of the table by name, each with what gives its rounds.

    Args:
        args: command-line options.
        queries: source of query negatives.
        teacher: scores (query, text) rows; None leaves Margin-MSE out.
    """
    cosine = {"temperature": args.temperature}
    # a pool holds few candidates, of which every row takes its turn
    base = dict(batch_size=args.batch_size, learning_rate=rate(args), negatives_per_row=2, loss_options=cosine)
    base |= dict(training_arguments={"bf16": True} if args.bf16 else {})
    pairwise = {**base, "negatives_per_row": 1, "loss_options": {}}
    dual = {**base, "query_negatives": queries, "query_negatives_per_row": 2}

    def ablation(normalize: bool, with_dual: bool) -> list[Round]:
        given = dict(warm_up=0, ance_rounds=0, normalize=normalize, dual=with_dual)
        stages = recipes.dance(rounds=1, **given, **pairwise)  # one round of each stage
        return stages[:1] * (args.rounds - 1) + stages[1:]

    rows = {
        "MNRL": lambda: recipes.mnrl(**base),
        "MNRL, ANCE negatives": lambda: recipes.mnrl(negatives=current_model, **base),
        "ANCE = DANCE -norm -dual": lambda: ablation(False, False),
        "DANCE -norm +dual": lambda: ablation(False, True),
        "DANCE +norm -dual": lambda: ablation(True, False),
        "DANCE +norm +dual": lambda: ablation(True, True),
        "SamToNe, query side": lambda: recipes.samtone(**base),
        "SamToNe, both sides": lambda: recipes.samtone(sides="both", **base),
        "MNRL-Dual": lambda: recipes.mnrl_dual(**dual),
    }
    if teacher is not None:
        margin = {"similarity": None, "temperature": args.margin_temperature}
        plain = {**base, "loss_options": {}, **margin}
        both = {**dual, "loss_options": {}, **margin}
        mixed = {"mnrl_weight": args.mnrl_weight, "mnrl_temperature": args.temperature}
        rows |= {
            "Margin-MSE": lambda: recipes.margin_mse(teacher, **plain),
            "Margin-MSE-Dual": lambda: recipes.margin_mse_dual(teacher, **both),
            "Margin-MSE + MNRL, dual": lambda: recipes.margin_mse_mnrl_dual(teacher, **both, **mixed),
        }
    return rows


def rate(args: argparse.Namespace) -> float:
    return args.learning_rate or (0.003 if args.encoder.startswith("static") else 2e-5)


def load_teacher(args: argparse.Namespace) -> CrossEncoderScorer:
    dtype = "bfloat16" if args.teacher_bf16 else "float32"
    return CrossEncoderScorer(str(args.teacher), max_length=args.teacher_length, batch_size=128, dtype=dtype)


def warm_up_epochs(args: argparse.Namespace) -> int:
    return (3 if args.encoder.startswith("static") else 0) if args.warm_up is None else args.warm_up


# --- what all seeds share ---------------------------------------------------------------------------------------------


class Collection:
    """Documents, topics, BM25 and the two pools of negatives, all on disk after the first use."""

    def __init__(self, args: argparse.Namespace):
        dataset = pt.get_dataset(args.dataset)
        self.folder = args.out / f"{Path(args.dataset).name}-{zlib.crc32(args.dataset.encode()):08x}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.topics, self.qrels = split(dataset, "train", most=args.topics)
        self.split = args.split
        self.dev_topics, self.dev_qrels = split(dataset, args.split, most=args.split_topics)
        needed = {docno for qrels in (self.qrels, self.dev_qrels) for docno in qrels["docno"]}
        self.corpus = open_corpus(dataset, self.folder / "corpus", most=args.documents, needed=needed)
        self.name = f"{len(self.topics)}-{len(self.corpus)}"
        if args.split_topics is not None:
            self.name += f"-{len(self.dev_topics)}"
        self.first_stage = bm25(self.corpus, self.folder / f"bm25-{len(self.corpus)}")

    def document_pool(self) -> pd.DataFrame:
        """Return results of the first stage that all methods draw from: 4 of the best 100 of each training query."""
        mined = self._stored(
            "documents",
            lambda: mining.mine_documents(
                self.first_stage, self.topics, self.qrels, depth=100, negatives=4, seed=0, verbose=True
            ),
        )
        return self.topics[["qid", "query"]].merge(mined, on="qid")

    def query_pool(self) -> pt.Transformer:
        """Return what finds 4 training queries for a document: BM25 over them, with the document as the query."""

        def mine() -> pd.DataFrame:
            path = self.folder / f"queries-{self.name}"
            texts = self.topics.drop_duplicates("query").rename(columns={"qid": "docno", "query": "text"})
            queries = Corpus(path) if path.exists() else Corpus.build(texts, path, fields=["text"])
            search = bm25(queries, self.folder / f"bm25-queries-{self.name}")
            return mining.mine_queries(
                search, self.topics, self.qrels, self.corpus, depth=30, negatives=4, seed=0, verbose=True
            )

        mined = self._stored("queries", mine)
        return pt.Transformer.from_df(mined.rename(columns={"docno": "qid", "qid": "docno"}))

    def _stored(self, what: str, mine: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        file = self.folder / f"pool-of-{what}-{self.name}.csv.gz"
        if not file.exists():
            mine().to_csv(file, index=False)
        return pd.read_csv(file, dtype={"qid": str, "docno": str}, keep_default_na=False)

    def teacher_scores(self, teacher: CrossEncoderScorer) -> Path:
        """File with the teacher's score of every positive and of every pair that the pools allow."""
        pairs = mining.positive_pairs(self.topics, self.qrels)
        documents, queries = self.document_pool(), self.query_pool()
        found = queries(pd.DataFrame({"qid": pairs["docno"].drop_duplicates(), "query": ""}))
        found = found.drop(columns="query").rename(columns={"qid": "docno", "docno": "qid"})
        file = self.folder / f"teacher-{teacher.fingerprint[:12]}-{self.name}.sqlite"
        # a row that carries all its candidates asks for all scores at once
        build_examples(
            self.topics, pairs, self.corpus, negatives=documents, query_negatives=found, negatives_per_row=4,
            query_negatives_per_row=4, teacher=TeacherScores(teacher, file, verbose=True),
        )  # fmt: skip
        return file


# --- one seed ---------------------------------------------------------------------------------------------------------


def run_seed(args: argparse.Namespace, collection: Collection, seed: int) -> pd.DataFrame:
    """Train every method from this seed's encoder; return the measures of every query and system."""
    folder = collection.folder / f"{args.encoder}-{collection.name}-{seed}".replace("/", "_")
    negatives, queries = collection.document_pool(), collection.query_pool()
    teacher = scores = None
    if args.teacher is not None:
        teacher = load_teacher(args)
        scores = collection.teacher_scores(teacher)
    encoder = make_encoder(args.encoder, collection.corpus, queries=collection.topics["query"], seed=seed)
    common = dict(num_results=100, seed=seed, keep="best", verbose=False)

    def fit(path: Path, start: DualEncoder, rounds: list[Round]) -> DanceRetriever:
        if path.exists() and not (path / "settings.json").exists():
            shutil.rmtree(path)  # killed before anything was trained
        dance = DanceRetriever(start, collection.corpus, path, recipe=rounds, **common)
        if scores is not None and not (path / "teacher.sqlite").exists() and any(r.teacher for r in rounds):
            path.mkdir(parents=True, exist_ok=True)
            shutil.copy(scores, path / "teacher.sqlite")
        return dance.fit(negatives, collection.qrels)

    measured = [evaluate(collection, {"BM25": collection.first_stage}, folder / "bm25.csv")]
    untrained = DanceRetriever(encoder, collection.corpus, folder / "untrained", **common)
    measured.append(evaluate(collection, {"untrained": untrained}, folder / "untrained.csv"))
    if epochs := warm_up_epochs(args):
        rounds = recipes.mnrl(
            epochs, temperature=args.temperature, batch_size=args.batch_size, learning_rate=args.warm_up_rate,
            negatives_per_row=2,
        )  # fmt: skip
        warm = fit(folder / "warm-up", encoder, rounds)
        encoder = warm.encoder
        measured.append(evaluate(collection, {"warm-up only": warm}, folder / "warm-up.csv"))
    for name, recipe in methods(args, queries, teacher).items():
        if args.methods and name not in args.methods:
            continue
        began, rounds = time.perf_counter(), recipe()
        rounds = rounds if len(rounds) == args.rounds else rounds * args.rounds
        path = folder / name.replace(" ", "_").replace(",", "")
        trained = fit(path, encoder, rounds)
        measured.append(evaluate(collection, {name: trained}, path.with_suffix(".csv")))
        mean = measured[-1].query("measure == 'nDCG@10'")["value"].mean()
        print(f"seed {seed}: {name}: nDCG@10 {mean:.4f} ({time.perf_counter() - began:.0f} s)", flush=True)
    return pd.concat(measured, ignore_index=True).assign(seed=seed)


def evaluate(collection: Collection, systems: dict[str, pt.Transformer], file: Path) -> pd.DataFrame:
    """Return the measures of every query, read back where they were computed before."""
    file = file.with_name(f"{file.stem}.{collection.split}.csv")
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        pt.Experiment(
            list(systems.values()), collection.dev_topics, collection.dev_qrels, MEASURES, names=list(systems),
            perquery=True,
        ).to_csv(file, index=False)  # fmt: skip
    return pd.read_csv(file, dtype={"qid": str}, keep_default_na=False)


# --- the tables -------------------------------------------------------------------------------------------------------


def compare(values: pd.DataFrame, better: str, than: str) -> tuple[float, float]:
    """Difference of two systems' means and the p-value of a paired t-test, from (query × system) values."""
    if (values[better] == values[than]).all():
        return 0.0, 1.0  # where the test has no variance to divide by
    return values[better].mean() - values[than].mean(), float(ttest_rel(values[better], values[than]).pvalue)


def tables(measured: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the table of the methods and that of the claims."""
    names = list(dict.fromkeys(measured["name"]))
    rows = pd.DataFrame({"method": names})
    by_seed = measured.groupby(["measure", "name", "seed"])["value"].mean()
    for measure in map(str, MEASURES):
        rows[measure] = [by_seed[measure, name].mean() for name in names]
        rows[f"{measure} sd"] = [by_seed[measure, name].std(ddof=1) for name in names]
    for measure in map(str, MEASURES):
        values = measured[measured["measure"] == measure].pivot_table(index="qid", columns="name", values="value")
        others = [name for name in names if name != BASELINE]
        if BASELINE in names and others:
            p = multipletests([compare(values, name, BASELINE)[1] for name in others], method="holm")[1]
            rows[f"{measure} p"] = rows["method"].map(dict(zip(others, p, strict=True)))
    values = measured[measured["measure"] == str(MEASURES[0])].pivot_table(index="qid", columns="name", values="value")
    claims = pd.DataFrame(
        [(claim, a, b, *compare(values, a, b)) for claim, a, b in CLAIMS if {a, b} <= set(names)],
        columns=["claim", "system", "against", "difference", "p"],
    )
    if len(claims):
        claims["p"] = multipletests(claims["p"], method="holm")[1]
        claims["holds"] = [
            "no difference seen" if p >= 0.05 else "yes" if difference > 0 else "no, the opposite"
            for difference, p in zip(claims["difference"], claims["p"], strict=True)
        ]
    return rows, claims


def markdown(rows: pd.DataFrame, claims: pd.DataFrame, args: argparse.Namespace, collection: Collection) -> str:
    """Both tables for people."""
    lines = [
        f"{args.dataset.split('/')[-1].removeprefix('dance:')}, {args.split} split ({len(collection.dev_topics):,} "
        f"queries), {args.encoder} encoder, {len(collection.topics):,} training queries, {len(collection.corpus):,} "
        f"documents, seeds {', '.join(map(str, args.seeds))}; mean ± standard deviation over the seeds; "
        f"* p < .05, ** p < .001 against {BASELINE} (paired t-test over queries, Holm)",
        "",
        "| method | " + " | ".join(map(str, MEASURES)) + " |",
        "|---|" + "--:|" * len(MEASURES),
    ]
    for _, row in rows.iterrows():
        cells = []
        for measure in map(str, MEASURES):
            p = row.get(f"{measure} p", float("nan"))
            star = "**" if p < 0.001 else "*" if p < 0.05 else ""
            spread = "" if pd.isna(row[f"{measure} sd"]) else f" ± {row[f'{measure} sd']:.4f}"
            cells.append(f"{row[measure]:.4f}{spread}{star.replace('*', chr(92) + '*')}")
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    if len(claims):
        lines += ["", "| claim | nDCG@10, difference | p (Holm) | holds here |", "|---|--:|--:|---|"]
        lines += [f"| {c.claim}: {c.system} against {c.against} | {c.difference:+.4f} | {c.p:.2g} | {c.holds} |"
                  for c in claims.itertuples()]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    args = options()
    if args.rounds < 2:
        raise SystemExit("--rounds must be at least 2: DANCE's dual loss begins in the second")
    started = time.perf_counter()
    collection = Collection(args)
    if args.only_seed is not None:
        run_seed(args, collection, args.only_seed)
        return
    if args.jobs > 1 and len(args.seeds) > 1:
        run_beside(args, collection)
    measured = pd.concat([run_seed(args, collection, seed) for seed in args.seeds], ignore_index=True)
    rows, claims = tables(measured)
    text = markdown(rows, claims, args, collection)
    print(text)
    if args.results is not None:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        rows.round(5).to_csv(args.results.with_suffix(".csv"), index=False)
        claims.to_csv(args.results.with_name(args.results.stem + "-claims.csv"), index=False)
        args.results.with_suffix(".md").write_text(text + "\n")
    print(f"{time.perf_counter() - started:.0f} seconds")


def run_beside(args: argparse.Namespace, collection: Collection) -> None:
    """Train the seeds in processes of their own, some at a time; what they did is read back afterwards."""
    collection.document_pool()
    collection.query_pool()
    if args.teacher is not None:
        collection.teacher_scores(load_teacher(args))
    threads = max((os.cpu_count() or 1) // args.jobs, 1)
    given = sys.argv[1:]
    waiting, running = list(args.seeds), []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            command = [sys.executable, __file__, *given, "--only-seed", str(waiting.pop(0))]
            running.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}))
        for process in running:
            if process.poll() not in (None, 0):
                for other in running:
                    other.terminate()
                raise SystemExit(f"{' '.join(process.args)} failed")
        running = [process for process in running if process.poll() is None]
        time.sleep(1)


if __name__ == "__main__":
    main()
