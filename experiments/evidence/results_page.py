"""The page of all results: what was found, every table, and the claims."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from evidence.cells import Study
from evidence.inference import AFTER, MAIN, ZERO_SHOT, claims, compared, difference
from evidence.methods import BASELINES, METHODS, ROWS
from evidence.protocol import REPORTED, TRAINING, Protocol
from evidence.side_studies import (
    efficiency_section,
    rates_section,
    refresh_section,
    same_settings_section,
    space_section,
)
from evidence.tables import (
    BACKWARDS,
    ENCODERS,
    MADE,
    NAMES,
    by_collection,
    cells_of,
    claim_of,
    decided_of,
    heading,
    load,
    measured,
    rst_table,
    scores,
    short,
    table,
    told_of,
    unlinked,
    verdicts,
    zero_shot,
)


def sizes(results: Path, encoder: str) -> list[list[str]]:
    """A row a training collection: how many queries of which part, documents, and clusters of reported queries."""
    names = ("train_queries", "tune_queries", "reported_queries", "clusters", "documents")
    rows = [["collection", "reported split", *(name.replace("_", " ") for name in names), "with seen documents"]]
    for name, about in told_of(results, encoder).items():
        told = about["sizes"]
        split = "15 % of train, by cluster" if REPORTED[name] == "cut" else REPORTED[name]
        rows.append([name, split, *(f"{told[key]:,}" for key in names), f"{len(told['seen']):,}"])
    return rows


def teachers(results: Path, encoder: str) -> list[str]:
    """The margins of each collection's teacher on queries it did not learn from; nothing where there is none."""
    rows = [["collection", "teacher's margin", "margins above 0", "queries"]]
    for name, about in told_of(results, encoder).items():
        if told := about["sizes"].get("teacher"):
            margin = f"{told['margin_mean']:.2f} ± {told['margin_sd']:.2f}"
            rows.append([name, margin, f"{told['margins_above_0']:.0%}", f"{told['queries']:,}"])
    if len(rows) == 1:
        return []
    return ["The teacher is two cross-encoders, and none scores a query of the half of the clusters that it learnt "
            "from; its margin is a query's mean score of relevant documents less that of BM25's negatives.", "",
            rst_table(rows)]  # fmt: skip


def seeds(found: pd.Series) -> str:
    """How many seeds there are of what, from what :func:`evidence.tables.scores` gives."""
    cells = found.index.to_frame(index=False)
    trained = cells[~cells["method"].isin(BASELINES)]
    by = trained.groupby(["trained_on", "method"])["seed"].nunique()
    told = [f"{name}: {n.min()}" + (f" to {n.max()}" if n.max() > n.min() else "") + " seeds of "
            f"{len(n)} methods" for name, n in by.groupby(level=0)]  # fmt: skip
    return "; ".join(told)


def results_page(protocol: Protocol, results: Path) -> str:
    """What each method is worth: what was found, the tables of every encoder, and the claims."""
    text = [
        heading("What Each Method Is Worth", "="), MADE,
        "Each number is the mean over seeds (± standard deviation over them) of the last round on the reported "
        "queries. All methods of an encoder take the same number of steps and draw from the same pools. Learning rate, "
        "temperature and weight were chosen for each method from three rates, two temperatures and two weights, where "
        "it has them, by successive halving with one seed, on a part of the training queries that is cut off by "
        "cluster; static towers with a new linear layer (a head, a projection) have rates a tenth as large, as the "
        "others break them. ``experiments/evidence`` has the protocol; ``claims.toml`` there has the claims, committed "
        "before the runs; ``experiments/results/evidence`` has the value of every query, seed and method, and every "
        "setting that was tried. ``make evidence`` makes what is missing and prints these tables.", "",
        "*One tower* encodes queries and documents (SDE), *two towers* have weights of their own (ADE), with a *shared "
        "projection* behind both (ADE-SPL). Rows of ANCE's and DANCE's losses end in the *head* of their releases, "
        "Linear and LayerNorm, and start from a *checkpoint*: a unit of steps on BM25's negatives and one on their "
        "own.", "",
        heading("What was found"), words_of(protocol, "found"), rst_table(overview(protocol, results)),
        "\"On other documents\" leaves out the reported queries that ask for a document which a training query asked "
        "for, too: more than half of SciFact's and all of NFCorpus's, whose reported splits are the official ones. A "
        "trained encoder has met these documents, so its figures there say little about new ones. Verdicts follow the "
        "rule of ``claims.toml``; the columns on other documents were added after the runs.", "",
    ]  # fmt: skip
    for encoder, words in ENCODERS.items():
        if not load(results, encoder):
            text += [f"With {words} no cells are committed yet: ``python experiments/evidence/run.py --encoders "
                     f"{encoder}`` makes them.", ""]  # fmt: skip
            continue
        text += encoder_section(protocol, results, encoder, words)
    text += (
        pilot_section(protocol, results)
        + rates_section(results)
        + same_settings_section(results)
        + refresh_section(protocol, results)
        + efficiency_section(results)
        + space_section(results)
    )
    return unlinked("\n".join([*text, words_of(protocol, "notes")]))


def words_of(protocol: Protocol, name: str) -> str:
    """What people wrote about the study at full size."""
    return Path(__file__).with_name(f"{name}.rst").read_text() if protocol.name == "full" else ""


def overview(protocol: Protocol, results: Path) -> list[list[str]]:
    """A row a claim: what became of it with each encoder, and on queries for other documents."""
    rows, found = [["claim"]], {}
    for encoder in measured(results):
        rows[0] += [encoder, f"{encoder}, on other documents"]
        for place, decided in enumerate((decided_of(encoder, protocol.resamples, results),
                                         decided_of(encoder, protocol.resamples, results, only_own=True))):  # fmt: skip
            for c in decided.itertuples():
                row = found.setdefault(c.id, {"claim": claim_of(c)})
                row[rows[0][len(rows[0]) - 2 + place]] = f"{c.mean:+.4f} {c.verdict}"
    return rows + [[row.get(column, "") for column in rows[0]] for row in found.values()]


def encoder_section(protocol: Protocol, results: Path, encoder: str, words: str) -> list[str]:
    """The tables of one encoder."""
    found, budget = scores(results, encoder), protocol.budgets[encoder]
    after, given = claims()[1], claims(AFTER)[0]
    decided = decided_of(encoder, protocol.resamples, results)
    text = [
        heading(f"With {words}"),
        f"{budget.steps:,} steps of {budget.batch_size} rows, at most {budget.queries:,} training queries; "
        f"encoders read the first {protocol.words} words of a document"
        + (f", {budget.max_length} tokens at most" if budget.max_length else "")
        + f", BM25 all. DANCE's dual term acts in {4 * budget.unit:,} of the steps. {seeds(found)}. "
        + missing(protocol, results, encoder),
        "", rst_table(sizes(results, encoder)),
        "Clusters are diseases and drugs (MedQuAD), claims that share a cited document (SciFact), fifty questions in a "
        "row, so that an article may go on in the next one (SQuAD), and single queries (NFCorpus, many of which share "
        "relevant documents). \"With seen documents\" are the reported queries with a relevant document that is "
        "relevant to a training query, too.", "", *teachers(results, encoder),
    ]  # fmt: skip
    for measure, title in (
        (MAIN, "nDCG@10 by training collection, reported queries"),
        (BACKWARDS, "nDCG@10 of queries found by documents"),
        (ZERO_SHOT, "nDCG@10 on all other collections, zero-shot, by training collection"),
    ):
        text += [rst_table(table(found, measure), title)]
    cells, number = cells_of(encoder, results), protocol.resamples
    means = {m: difference(cells, m, None, ZERO_SHOT, confidence=after["confidence"], number=number) for m in ROWS}
    macro = {method: (one.mean, one.low, one.high) for method, one in means.items() if one}
    text += [
        rst_table(zero_shot(found, macro), "nDCG@10 zero-shot by collection, mean over training collections"),
        "The last column is the mean over the training collections, each without itself, as in README, with an "
        "interval over seeds and queries. SQuAD's own dev questions and SQuADShifts are near to what was trained on "
        "where that was SQuAD"
        + (", and all-MiniLM-L6-v2 came from training on many public collections of its own." if encoder != "static"
           else "."), "",
        rst_table(costs(results, encoder), "What the methods took"),
        f"Seconds are of {devices(results, encoder)} that had other work beside: they compare roughly.", "",
        rst_table(settings(results, encoder), "Settings that tuning chose: learning rate, temperature, weight"),
        rst_table(verdicts(decided), "The sources' claims"),
        "Differences are means over the training collections that have both rows; intervals of 95 % allow for "
        "other seeds and other clusters of queries (two-way bootstrap), not for other collections or other settings: "
        "where two rows chose different settings, the difference is theirs, too. p-values are normal, from the "
        "bootstrap's standard error, and corrected over the claims of this encoder (Holm); intervals are not. "
        "\"Could have seen\" is the difference that this design finds four times out of five at the level of .05 "
        "without that correction. \"No effect\" is said only where the whole interval of the mean lies within "
        f"±{short(after['equivalence_margin'])}; differences may cancel in it, as the next table shows.", "",
        rst_table(by_collection(decided, decided_of(encoder, protocol.resamples, results, only_own=True)),
                  "The same claims by training collection, and on queries for documents that nothing was trained on"),
        "A star stands where the collection's own interval of 95 % leaves 0 out.", "",
        rst_table(verdicts(compared(cells, given, confidence=after["confidence"], number=number)),
                  "Compared after the runs, without a verdict"),
    ]  # fmt: skip
    return text


def pilot_section(protocol: Protocol, results: Path) -> list[str]:
    """Every method once, with one seed on the first collection and encoder: what the long runs began with."""
    name, encoder = TRAINING[0], next(iter(ENCODERS))
    about = told_of(results, encoder).get(name)
    if about is None or protocol.name != "full":
        return []
    tuning, found = about["tuning"], scores(results, encoder)
    rows = [["method", "setting", "tuning queries", "reported queries"]]
    for method in ROWS:
        if (value := found.get((method, name, name, MAIN, 1))) is not None:
            told = tuning.get(method, {"chosen": {}, "tried": []})
            chosen = ", ".join(f"{one:g}" for one in told["chosen"].values() if one is not None)
            tuned = short(told["tried"][-1]["nDCG@10"]) if told["tried"] else ""
            rows.append([NAMES[method], chosen, tuned, short(value)])
    untrained = ""
    if (alone := results / "pairs-alone.csv").exists():
        before = pd.read_csv(alone).set_index(["collection", "loss"]).loc[(name, "untrained"), MAIN]
        untrained = f" The untrained tower with a head has {short(before)} on the tuning queries."
    return [
        heading("The pilot"),
        f"{name} with {ENCODERS[encoder]}, seed 1: nDCG@10 of the tuning queries with the last setting of the "
        f"halving, and of the reported queries.{untrained} No method reaches that: with some seven hundred queries to "
        "learn from, training gains nothing on queries for documents of their own, the settings that are chosen are "
        "those that harm least, and what is gained on the reported queries is gained on documents that were trained "
        "on.", "",
        rst_table(rows),
    ]  # fmt: skip


def missing(protocol: Protocol, results: Path, encoder: str) -> str:
    """How many cells are not there yet, and the command that makes them; nothing where all are."""
    every = [cell for cell in Study(protocol, results, results).cells() if cell.encoder == encoder]
    there = sum(len(about["cells"]) for about in told_of(results, encoder).values())
    if there >= len(every):
        return ""
    return (f"{there} of {len(every)} cells are there; ``python experiments/evidence/run.py --encoders {encoder}`` "
            "makes the others.")  # fmt: skip


def settings(results: Path, encoder: str) -> list[list[str]]:
    """What tuning chose, a row a method, a column a collection."""
    tuned = {name: about["tuning"] for name, about in told_of(results, encoder).items()}
    rows = [["method", *tuned]]
    for method in METHODS:
        if any(method in found for found in tuned.values()):
            values = [found.get(method, {"chosen": {}})["chosen"].values() for found in tuned.values()]
            told = [", ".join(f"{value:g}" for value in chosen if value is not None) for chosen in values]
            rows.append([NAMES.get(method, method), *told])
    return rows


def trained_cells(results: Path, encoder: str) -> list[dict]:
    """What is told of an encoder's cells that were trained."""
    return [cell for about in told_of(results, encoder).values() for cell in about["cells"] if "seconds" in cell]


def timed(results: Path, encoder: str) -> list[dict]:
    """An encoder's trained cells, of the kind of machine (CPU or GPU) that made most of them: seconds of one kind."""
    of_kind: dict[bool, list[dict]] = {True: [], False: []}
    for cell in trained_cells(results, encoder):
        of_kind[cell.get("device", "cpu") == "cpu"].append(cell)
    return max(of_kind.values(), key=len)


def devices(results: Path, encoder: str) -> str:
    """What an encoder's cells were trained on."""
    names = sorted({cell.get("device", "cpu") for cell in timed(results, encoder)})
    return " and ".join("one core" if name == "cpu" else f"one {name} (products in TF32)" for name in names)


def costs(results: Path, encoder: str) -> list[list[str]]:
    """What each method took, mean over collections and seeds."""
    names = ["steps", "texts_for_mining", "mine_seconds", "seconds"]
    frame = pd.DataFrame(timed(results, encoder))
    if not len(frame):
        return []
    by = frame.groupby("method")[names].mean()
    rows = [["method", "steps", "texts encoded to mine", "seconds to mine", "seconds in all"]]
    rows += [
        [NAMES[method], *(f"{by.loc[method, name]:,.0f}" for name in names)] for method in METHODS if method in by.index
    ]
    return rows
