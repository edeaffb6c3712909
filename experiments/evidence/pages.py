"""The pages that are made from the committed cells: results, which recipe to use, and parts of others."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from evidence.inference import MAIN, ZERO_SHOT, decide
from evidence.methods import BASELINES, METHODS, ROWS, SAME
from evidence.protocol import REPORTED, Protocol
from evidence.tables import (
    BACKWARDS,
    ENCODERS,
    NAMES,
    files_of,
    load,
    means,
    scores,
    short,
    table,
    verdicts,
    zero_shot,
)

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "pt_dance" / "pt_docs"
MADE = ".. Made by experiments/evidence/run.py --pages from the committed cells; do not edit.\n"
# What a user calls for each method that has a recipe, and the page that it has.
RECIPES = {
    "mnrl": ("recipes.mnrl()", "mnrl"),
    "mnrl-ance": ('recipes.ance(loss="contrastive")', "ance"),
    "samtone": ("recipes.samtone()", "samtone"),
    "mnrl-dual": ("recipes.mnrl_dual()", "mnrl-dual"),
    "dance-none": ("recipes.ance(published=True)", "ance"),
    "dance-norm-dual": ("recipes.dance(published=True)", "dance"),
    "margin-mse": ("recipes.margin_mse(teacher)", "margin-mse"),
    "margin-mse-dual": ("recipes.margin_mse_dual(teacher)", "margin-mse-dual"),
    "margin-mse-mnrl-dual": ("recipes.margin_mse_mnrl_dual(teacher)", "margin-mse-mnrl-dual"),
    "distill-kl": ("recipes.distill_kl(teacher)", "distill-kl"),
}
# Which claims stand on which method's page.
CLAIMS_OF = {
    "mnrl": ("mnrl-beats-untrained",),
    "ance": ("ance-refreshed", "ance-loss-refreshed", "dense-beats-bm25"),
    "dance": (
        "dance-norm", "dance-dual-with-norm", "dance-dual-without-norm", "dance-beats-ance", "dance-mined-queries",
        "dance-backwards",
    ),
    "samtone": ("samtone-query", "samtone-both", "samtone-ade", "samtone-ade-spl", "spl", "sde-beats-ade"),
    "mnrl-dual": ("mnrl-dual", "mnrl-dual-mined", "mnrl-dual-zero-shot"),
    "margin-mse": ("margin-mse-beats-mnrl",),
    "margin-mse-dual": ("margin-mse-dual", "margin-mse-dual-zero-shot"),
    "margin-mse-mnrl-dual": ("combination", "combination-over-mnrl-dual"),
    "distill-kl": ("kl-beats-margin-mse",),
}  # fmt: skip


def rst_table(rows: list[list[str]], title: str = "") -> str:
    """A list-table of reStructuredText."""
    lines = [f".. list-table:: {title}".rstrip(), "    :header-rows: 1", "    :widths: auto", ""]
    for row in rows:
        # "S. He" would begin a numbered list
        row = [rf"\{value}" if re.match(r"\w\. ", value) else value for value in row]
        lines += [f"    {'* -' if i == 0 else '  -'} {value}".rstrip() for i, value in enumerate(row)]
    return "\n".join(lines) + "\n"


def heading(text: str, line: str = "-") -> str:
    """A title of reStructuredText."""
    return f"{text}\n{line * 55}\n"


def sizes(results: Path, encoder: str) -> list[list[str]]:
    """A row a training collection: how many queries of which part, documents, and clusters of reported queries."""
    names = ("train_queries", "tune_queries", "reported_queries", "clusters", "documents")
    rows = [["collection", "reported split", *(name.replace("_", " ") for name in names)]]
    for name, file in files_of(results, encoder, ".json").items():
        told = json.loads(file.read_text())["sizes"]
        split = "15 % of train, by cluster" if REPORTED[name] == "cut" else REPORTED[name]
        rows.append([name, split, *(f"{told[key]:,}" for key in names)])
    return rows


def teachers(results: Path, encoder: str) -> list[str]:
    """The margins of each collection's teacher on queries it did not learn from; nothing where there is none."""
    rows = [["collection", "teacher's margin", "margins above 0", "queries"]]
    for name, file in files_of(results, encoder, ".json").items():
        if told := json.loads(file.read_text())["sizes"].get("teacher"):
            margin = f"{told['margin_mean']:.2f} ± {told['margin_sd']:.2f}"
            rows.append([name, margin, f"{told['margins_above_0']:.0%}", f"{told['queries']:,}"])
    if len(rows) == 1:
        return []
    return ["The teacher is two cross-encoders, and none scores a query of the half of the clusters that it learnt "
            "from; its margin is a query's mean score of relevant documents less that of BM25's negatives.", "",
            rst_table(rows)]  # fmt: skip


def measured(results: Path) -> dict[str, str]:
    """The encoders that have cells, and what they are called."""
    return {encoder: words for encoder, words in ENCODERS.items() if len(load(results, encoder))}


def seeds(cells: pd.DataFrame) -> str:
    """How many seeds there are of what."""
    trained = cells[~cells["method"].isin(BASELINES)]
    by = trained.groupby(["trained_on", "method"], observed=True)["seed"].nunique()
    told = [f"{name}: {n.min()}" + (f" to {n.max()}" if n.max() > n.min() else "") + " seeds of "
            f"{len(n)} methods" for name, n in by.groupby(level=0)]  # fmt: skip
    return "; ".join(told)


def results_page(protocol: Protocol, results: Path) -> str:
    """What each method is worth: the tables of every encoder, and the claims."""
    text = [
        heading("What Each Method Is Worth", "="), MADE,
        "Each number is the mean over seeds (± standard deviation over them) of the last round on queries that chose "
        "nothing. All methods of an encoder take the same number of steps and draw from the same pools; learning rate, "
        "temperature and weight were chosen for each method from one grid by successive halving on a part of the "
        "training queries that is cut off by cluster (disease, article, cited document). ``experiments/evidence`` has "
        "the protocol; ``claims.toml`` there has the claims, committed before the runs; "
        "``experiments/results/evidence`` has the value of every query, seed and method. ``make evidence`` makes what "
        "is missing and prints these tables.", "",
    ]  # fmt: skip
    for encoder, words in ENCODERS.items():
        cells = load(results, encoder)
        if not len(cells):
            text += [f"With {words} no cells are committed yet: ``python experiments/evidence/run.py --encoders "
                     f"{encoder}`` makes them.", ""]  # fmt: skip
            continue
        budget = protocol.budgets[encoder]
        text += [heading(f"With {words}")]
        text += [
            f"{budget.steps:,} steps of {budget.batch_size} rows, at most {budget.queries:,} training queries; "
            f"encoders read the first {protocol.words} words of a document"
            + (f", {budget.max_length} tokens at most" if budget.max_length else "")
            + f", BM25 all. {seeds(cells)}.", "", rst_table(sizes(results, encoder)),
            *teachers(results, encoder),
        ]  # fmt: skip
        for measure, title in (
            (MAIN, "nDCG@10 by training collection, reported queries"),
            (BACKWARDS, "nDCG@10 of queries found by documents"),
            (ZERO_SHOT, "nDCG@10 on all other collections, zero-shot, by training collection"),
        ):
            text += [rst_table(table(scores(results, encoder), measure), title)]
        text += [rst_table(zero_shot(cells), "nDCG@10 zero-shot by collection, mean over training collections")]
        text += [rst_table(costs(results, encoder), "What the methods took")]
        text += [f"Seconds are of {devices(results, encoder)} that had other work beside: they compare roughly.", ""]
        text += [rst_table(verdicts(decided_of(encoder, protocol.resamples, results)), "The sources' claims")]
        text += [
            "Differences are means over the training collections that have both rows; intervals of 95 % allow for "
            "other seeds and other clusters of queries (two-way bootstrap); p-values are corrected over all claims "
            "(Holm). "
            "\"Could have seen\" is the difference that this design finds four times out of five. \"No effect\" "
            "is said only where the whole interval lies within ±.005.", "",
        ]  # fmt: skip
    text += refresh_section(results) + efficiency_section(results) + space_section(results)
    return "\n".join([*text, Path(__file__).with_name("notes.rst").read_text()])


def refresh_section(results: Path) -> list[str]:
    """How often, how deep and how: what refresh.py wrote."""
    file = results / "refresh.csv"
    if not file.exists():
        return []
    runs = pd.read_csv(file)
    value = runs.groupby(["variant", "collection"], sort=False)[MAIN].agg(["mean", "std"]).unstack()
    seconds = runs.groupby("variant", sort=False)[["mine_seconds", "seconds"]].mean()
    collections = list(dict.fromkeys(runs["collection"]))
    rows = [["negatives", *collections, "seconds to mine", "seconds in all"]]
    for variant in dict.fromkeys(runs["variant"]):
        cells = [
            f"{short(value.loc[variant, ('mean', name)])} ± {short(value.loc[variant, ('std', name)])}"
            for name in collections
        ]
        rows.append([variant, *cells, *(f"{value:.1f}" for value in seconds.loc[variant])])
    return [
        heading("How often negatives are refreshed"),
        "MNRL with a static tower at equal steps, nDCG@10 of the reported queries, "
        f"{runs['seed'].nunique()} seeds; ``python experiments/evidence/refresh.py``. The first quarter of the steps "
        "learns from BM25's negatives, the rest from the model's own, drawn uniformly from the best 100 where nothing "
        "else is said.", "", rst_table(rows),
    ]  # fmt: skip


def efficiency_section(results: Path) -> list[str]:
    """Quality against seconds a query: what efficiency.py wrote."""
    file = results / "efficiency.json"
    if not file.exists():
        return []
    told = json.loads(file.read_text())
    rows = [["system", MAIN, "milliseconds a query", "times the dense retriever's"]]
    dense = next(row["seconds"] for row in told["rows"] if row["system"] == "dense")
    rows += [
        [row["system"], short(row[MAIN]), f"{1000 * row['seconds']:.2f}", f"{row['seconds'] / dense:.1f}"]
        for row in told["rows"]
    ]
    return [
        heading("What a query costs"),
        f"ANCE's paper calls dense retrieval almost 100 times faster than BM25 with BERT re-ranking. {told['queries']} "
        f"queries of {told['collection']}, one thread, one query at a time, all systems in turns; "
        "``python experiments/evidence/efficiency.py``. The dense retriever is the study's static tower, the "
        "cross-encoder one of the two that are its teacher.", "", rst_table(rows),
    ]  # fmt: skip


def space_section(results: Path) -> list[str]:
    """Which measures of the embedding space go with nDCG@10: what space.py wrote."""
    text = []
    for encoder, words in ENCODERS.items():
        file = results / f"space-{encoder}-correlations.csv"
        if file.exists():
            found = pd.read_csv(file)
            rows = [["measure", "rank correlation", "95 % interval"]]
            rows += [
                [row.measure, f"{row.correlation:+.2f}", f"{row.low:+.2f} to {row.high:+.2f}"]
                for row in found.itertuples()
            ]
            text += [
                f"With {words}, over {found['cells'].iloc[0]} trained encoders:", "",
                rst_table(rows),
            ]  # fmt: skip
    if not text:
        return []
    return [
        heading("Does the embedding space explain who wins?"),
        "Spearman's correlation of a measure with nDCG@10 within each training collection, mean over the collections, "
        "intervals from resampling methods (``python experiments/evidence/space.py``). The measures are those of "
        ":doc:`analysis`. Retrieval measures (R@100) are there for comparison: they are what they explain.", "", *text,
    ]  # fmt: skip


def ranked(found: pd.Series, measure: str) -> pd.Series:
    """Mean of each method over the training collections, where it has all of them, best first.

    Args:
        found: what :func:`evidence.tables.scores` gives.
        measure: as there.
    """
    names = found.index.unique("trained_on")
    by_method = {method: [means(found, method, name, measure) for name in names] for method in ROWS}
    whole = {m: float(np.mean([one[0] for one in values])) for m, values in by_method.items() if all(values)}
    return pd.Series(whole).sort_values(ascending=False)


def devices(results: Path, encoder: str) -> str:
    """What an encoder's cells were trained on."""
    told = [json.loads(file.read_text())["cells"] for file in files_of(results, encoder, ".json").values()]
    names = sorted({cell.get("device", "cpu") for cells in told for cell in cells if "seconds" in cell})
    return " and ".join("one core" if name == "cpu" else f"one {name} (products in TF32)" for name in names)


def so_far(results: Path, encoder: str) -> list[str]:
    """What to know of an encoder that was not trained on all collections yet; nothing of one that was."""
    trained_on = files_of(results, encoder, ".json")
    if len(trained_on) == len(REPORTED):
        return []
    few = seeds_of(results, encoder).drop(list(BASELINES), errors="ignore")
    told = f"{few.min()}" + (f" to {few.max()}" if few.max() > few.min() else "")
    return ["", f"({ENCODERS[encoder]}: trained on {' and '.join(trained_on)} so far, with {told} seeds of a method.)"]


def seeds_of(results: Path, encoder: str) -> pd.Series:
    """How many seeds of each method there are on every collection."""
    seeds = scores(results, encoder).index.to_frame(index=False)
    return seeds.groupby(["method", "trained_on"])["seed"].nunique().groupby("method").min()


def costs(results: Path, encoder: str) -> list[list[str]]:
    """What each method took, mean over collections and seeds."""
    names = ["steps", "texts_for_mining", "mine_seconds", "seconds"]
    frame = pd.DataFrame(
        cell for file in files_of(results, encoder, ".json").values()
        for cell in json.loads(file.read_text())["cells"] if "seconds" in cell
    )  # fmt: skip
    if not len(frame):
        return []
    by = frame.groupby("method")[names].mean()
    rows = [["method", "steps", "texts encoded to mine", "seconds to mine", "seconds in all"]]
    rows += [
        [NAMES[method], *(f"{by.loc[method, name]:,.0f}" for name in names)] for method in METHODS if method in by.index
    ]
    return rows


def choosing_page(protocol: Protocol, results: Path) -> str:
    """Which recipe to use, from the cells."""
    text = [heading("Which Recipe Should I Use?", "="), MADE]
    text += [
        "A recipe is a first guess about your collection; measure two or three on a development split of your own. "
        "What follows is what the study (:doc:`results`) saw, mean nDCG@10 over its training collections.", "",
    ]  # fmt: skip
    for encoder, words in measured(results).items():
        own, away, back = (ranked(scores(results, encoder), measure) for measure in (MAIN, ZERO_SHOT, BACKWARDS))
        own = own[own.index.isin([*RECIPES, *BASELINES])]
        rows = [["recipe", "own collection", "other collections", "queries by documents", "seeds"]]
        seeds = seeds_of(results, encoder)
        for method in own.index:
            name = f":doc:`{RECIPES[method][0]} <{RECIPES[method][1]}>`" if method in RECIPES else NAMES[method]
            values = [short(s[method]) if method in s else "" for s in (own, away, back)]
            rows.append([name, *values, "" if method in BASELINES else str(seeds[SAME.get(method, method)])])
        text += [heading(f"With {words}"), rst_table(rows)]
        text += [f"- {line}" for line in advice(own, away)] + [*so_far(results, encoder), ""]
    text += [
        heading("Whatever you choose"),
        "- Start from an encoder that already ranks well; an untrained static tower is the weakest start and the "
        "cheapest to train.",
        "- Compare with BM25 and with the untrained encoder, which is round 0 of ``dance.history``.",
        "- Look at the mined negatives (``dance.negatives(1)``, :doc:`analysis`) before you train for long: unjudged "
        "relevant documents among them may hurt any method.",
        "",
    ]
    return "\n".join(text)


def advice(own: pd.Series, away: pd.Series) -> list[str]:
    """What the table says, in sentences."""

    def told(method: str, values: pd.Series) -> str:
        return f"``{RECIPES[method][0]}`` ({short(values[method])})"

    taught = [m for m in own.index if m in METHODS and METHODS[m].teacher]
    plain = [m for m in own.index if m in RECIPES and m not in taught]
    lines = []
    if plain:
        near = [m for m in plain[1:] if own[plain[0]] - own[m] <= 0.005]
        more = f"; within .005 of it: {', '.join(told(m, own) for m in near)}" if near else ""
        lines.append(f"Queries and judgements of your own collection, no teacher: {told(plain[0], own)}{more}.")
        abroad = [m for m in away.index if m in plain]
        if abroad:
            best, start = told(abroad[0], away), away.get("untrained", 0)
            if away[abroad[0]] > start:
                line = f"{best}, untrained {short(start)}"
            else:
                line = f"leave the encoder as it is ({short(start)}); the best of the recipes is {best}"
            line = f"To search collections that it was not trained on: {line}."
            lines.append(f"{line} BM25 has {short(away['bm25'])} there.")
    if taught:
        best = taught[0]
        better = own[best] > own[plain[0]] if plain else True
        lines.append(
            f"With a teacher: {told(best, own)}" + (", more than without one." if better else
            ", less than without one here: look at the teacher's margins first.")
        )  # fmt: skip
    if "bm25" in own.index and plain and own["bm25"] > own[plain[0]]:
        lines.append(f"BM25 ({short(own['bm25'])}) is better than each of them on the mean of these collections: "
                     "re-rank its results by the dense scores, or fuse both.")  # fmt: skip
    return lines


def readme_table(results: Path) -> str:
    """README's table: every method by encoder, on its own collection and on others."""
    columns, rows = [], {}
    for encoder in measured(results):
        for measure, word in ((MAIN, "own"), (ZERO_SHOT, "others")):
            columns.append(f"{encoder}, {word}")
            for method, value in ranked(scores(results, encoder), measure).items():
                rows.setdefault(method, {})[columns[-1]] = short(value)
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
    order = [method for method in ROWS if method in rows]
    lines += [f"| {NAMES[m]} | " + " | ".join(rows[m].get(column, "") for column in columns) + " |" for m in order]
    for encoder in measured(results):
        lines += so_far(results, encoder)
    return "\n".join(lines)


def found_of(page_name: str, protocol: Protocol, results: Path) -> str:
    """What the study found about one method's claims: a table of all encoders that were measured."""
    rows = [["encoder", "claim", "difference", "95 % interval", "verdict"]]
    for encoder, words in measured(results).items():
        decided = decided_of(encoder, protocol.resamples, results)
        for claim in decided[decided["id"].isin(CLAIMS_OF[page_name])].itertuples():
            rows.append(
                [words, f"{claim.text} ({NAMES[SAME.get(claim.better, claim.better)]} against "
                 f"{NAMES[SAME.get(claim.than, claim.than)]}, {claim.measure})",
                 f"{claim.mean:+.4f}", f"{claim.low:+.4f} to {claim.high:+.4f}", claim.verdict]
            )  # fmt: skip
    if len(rows) == 1:
        return "The study (:doc:`results`) has no cells of it yet; ``make evidence`` makes them.\n"
    return f"In the study (:doc:`results`):\n\n{rst_table(rows)}"


@lru_cache
def decided_of(encoder: str, resamples: int, results: Path) -> pd.DataFrame:
    """The claims of an encoder, decided once."""
    return decide(load(results, encoder), number=resamples)


def pages(protocol: Protocol, results: Path) -> dict[Path, str]:
    """Every page that is made from the cells, with its whole text."""
    made = {
        DOCS / "results.rst": results_page(protocol, results),
        DOCS / "choosing.rst": choosing_page(protocol, results),
    }
    for name in CLAIMS_OF:
        file = DOCS / f"{name}.rst"
        made[file] = _between(
            file.read_text(), f".. study: {name}\n\n", f"\n.. end of {name}", found_of(name, protocol, results)
        )
    readme = ROOT / "README.md"
    made[readme] = _between(
        readme.read_text(), "<!-- study -->\n\n", "\n\n<!-- end of study -->", readme_table(results)
    )
    return made


def _between(text: str, first: str, last: str, new: str) -> str:
    found = re.compile(re.escape(first) + ".*?" + re.escape(last), re.S)
    if len(found.findall(text)) != 1:
        raise SystemExit(f"there is not one place between {first.strip()!r} and {last.strip()!r}")
    return found.sub(lambda _: first + new + last, text)


def write_pages(protocol: Protocol, results: Path, *, committed: bool) -> None:
    """Print the tables; write every page where the cells are those that are committed.

    Args:
        protocol: of the cells.
        results: where the cells are.
        committed: whether they are; else only the tables are printed.
    """
    if not committed:
        print(results_page(protocol, results))
        return
    made = pages(protocol, results)
    for file, text in made.items():
        file.write_text(text)
    print(made[DOCS / "results.rst"])
