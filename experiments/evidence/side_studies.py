"""The sections of the results page on studies beside the cells: what rates, same_settings and others wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from evidence.inference import MAIN, Cells, difference
from evidence.protocol import Protocol
from evidence.tables import (
    ENCODERS,
    NAMES,
    heading,
    load,
    own_queries,
    rst_table,
    short,
    told_of,
    wide,
)

PICTURE = "efficiency.png"
SETTING = ("learning_rate", "temperature")


def rates_section(results: Path) -> list[str]:
    """DANCE's 2x2 with each learning rate: what rates.py wrote."""
    if not (file := results / "rates.csv").exists():
        return []
    found = pd.read_csv(file)
    tuned, reported = (f"{MAIN}, {part}" for part in ("tune", "reported"))
    before, trained = found[found["seed"].isna()].iloc[0], found[found["seed"].notna()]
    means = trained.groupby(["method", "learning_rate"])[[tuned, reported]].mean()
    rates = sorted(trained["learning_rate"].unique())
    rows = [["method", *(f"{rate:g}" for rate in rates)]]
    for method in trained["method"].unique():
        pairs = (means.loc[(method, rate)] for rate in rates)
        rows.append([NAMES[method], *(f"{short(pair[reported])} ({short(pair[tuned])})" for pair in pairs)])
    return [
        heading("DANCE's 2x2 at every rate"),
        f"{before['collection']} with {ENCODERS[before['encoder']]}, by learning rate: nDCG@10 of the reported queries "
        f"after all steps, and of the tuning queries in brackets, mean over {trained['seed'].nunique()} seeds. "
        f"Untrained, without the head: {short(before[reported])} ({short(before[tuned])}). "
        "``python experiments/evidence/rates.py``; what it says of the tables is below, "
        "\"A rate that is ahead early\".",
        "", rst_table(rows),
    ]  # fmt: skip


def same_settings_section(results: Path) -> list[str]:
    """MNRL at the settings of what it is compared with: what same_settings.py wrote."""
    if not (file := results / "same-settings.parquet").exists():
        return []
    found = pd.read_parquet(file)
    name, encoder, seed = (found[column].iloc[0] for column in ("collection", "encoder", "seed"))
    told, cells = told_of(results, encoder)[name], own_queries(load(results, encoder)[name], name)
    cells = cells.set_index("qid")
    seen = cells.index.isin(told["sizes"]["seen"])
    rows = [["row", "learning rate", "temperature", "all", "documents trained on", "other documents"]]
    for (method, against), retrained in found.groupby(["method", "against"], sort=False):
        own_setting, others_setting = (told["tuning"][row]["chosen"] for row in (method, against))
        given = {key: retrained[key].iloc[0] for key in SETTING}
        if given != {key: others_setting[key] for key in SETTING}:
            raise ValueError(f"{method} was trained at {given}, which tuning did not choose for {against}")
        three = [
            (method, own_setting, cells[f"{method}/{seed}"]),
            (method, others_setting, retrained.set_index("qid")["value"].loc[cells.index]),
            (against, others_setting, cells[f"{against}/{seed}"]),
        ]
        rows += [
            [NAMES[row], *(f"{setting[key]:g}" for key in SETTING),
             *(short(values.mean()) for values in (values, values[seen], values[~seen]))]
            for row, setting, values in three
        ]  # fmt: skip
    precision, device = (found[column].iloc[0] for column in ("precision", "device"))
    return [
        heading("MNRL at the settings of others"),
        f"{name} with {ENCODERS[encoder]}, one seed, nDCG@10 of the reported queries. In each group of three rows the "
        "first and the last are cells of the study (TF32 on a GPU); the middle one is MNRL at the last one's setting, "
        f"in {precision} on a {device.upper()}, so small differences to it mean nothing. "
        "``python experiments/evidence/same_settings.py``; what it says of the tables is below, "
        "\"All-MiniLM on SciFact\".",
        "", rst_table(rows),
    ]  # fmt: skip


def refresh_section(protocol: Protocol, results: Path) -> list[str]:
    """How often, how deep and how: what refresh.py wrote."""
    file = results / "refresh.csv"
    if not file.exists():
        return []
    runs = pd.read_csv(file)
    value = runs.groupby(["variant", "collection"], sort=False)[MAIN].agg(["mean", "std"]).unstack()
    seconds = runs.groupby("variant", sort=False)[["mine_seconds", "seconds"]].mean()
    against = differences_of(results / "refresh.parquet", load(results, "static"), protocol.resamples)
    collections = list(dict.fromkeys(runs["collection"]))
    rows = [["negatives", *collections, "difference", "95 % interval", "seconds to mine", "seconds in all"]]
    for variant in dict.fromkeys(runs["variant"]):
        cells = [
            f"{short(value.loc[variant, ('mean', name)])} ± {short(value.loc[variant, ('std', name)])}"
            for name in collections
        ]
        rows.append([variant, *cells, *against[variant], *(f"{value:.1f}" for value in seconds.loc[variant])])
    return [
        heading("How often negatives are refreshed"),
        "MNRL with a static tower at equal steps, nDCG@10 of the reported queries, "
        f"{runs['seed'].nunique()} seeds; ``python experiments/evidence/refresh.py``. The first quarter of the steps "
        "learns from BM25's negatives, the rest from the model's own, drawn uniformly from the best 100 where nothing "
        "else is said. Differences are to the reference, mean over the collections, with intervals over seeds and "
        "clusters of queries that are not corrected for their number.", "", rst_table(rows),
    ]  # fmt: skip


def differences_of(file: Path, cells: dict[str, pd.DataFrame], number: int) -> dict[str, list[str]]:
    """The difference of each variant of a file to the reference and its interval, as they are printed.

    Args:
        file: a row a value, as refresh.py writes them.
        cells: of the same queries, by collection; they have the clusters.
        number: bootstrap samples.
    """
    values = pd.read_parquet(file)
    tables = {}
    for name, mine in values.groupby("collection"):
        clusters = own_queries(cells[name], name).set_index("qid")["cluster"]
        tables[name] = wide(mine.rename(columns={"variant": "method"}).assign(cluster=mine["qid"].map(clusters)))
    variants = list(values["variant"].unique())
    reference = next(name for name in variants if name.endswith("(reference)"))
    found = {reference: ["", ""]}
    for variant in variants:
        if variant != reference:
            one = difference(Cells(tables), variant, reference, MAIN, confidence=0.95, number=number)
            found[variant] = [f"{one.mean:+.4f}", f"{one.low:+.4f} to {one.high:+.4f}"]
    return found


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
        "cross-encoder one of the two that are its teacher: the claim is about its seconds; its nDCG@10 is that of a "
        "small model of the study's own.", "", rst_table(rows),
        f".. figure:: figures/{PICTURE}", "   :alt: nDCG@10 against seconds a query, on a logarithmic scale", "",
        "   What a query costs and gives; numbers are the depths k.", "",
    ]  # fmt: skip


def space_section(results: Path) -> list[str]:
    """Which measures of the embedding space go with nDCG@10: what space.py wrote."""
    text = []
    for encoder, words in ENCODERS.items():
        file = results / f"space-{encoder}-correlations.csv"
        if file.exists():
            found = pd.read_csv(file)
            found = found[~found["measure"].str.contains("@")]  # how well it retrieves is what is to be explained
            families = [name for name in ("cross-entropies", "pairs", "teacher") if name in found]
            rows = [["measure", "rank correlation", "95 % interval", *(f"within {name}" for name in families)]]
            rows += [
                [row["measure"], f"{row['correlation']:+.2f}", f"{row['low']:+.2f} to {row['high']:+.2f}",
                 *("" if pd.isna(row[name]) else f"{row[name]:+.2f}" for name in families)]
                for _, row in found.iterrows()
            ]  # fmt: skip
            cells = pd.read_csv(results / f"space-{encoder}.csv")
            cells = cells[cells["method"] != "untrained"]
            text += [
                f"With {words}: {len(cells)} trained encoders, {cells['method'].nunique()} methods and checkpoints, "
                f"{cells['seed'].nunique()} seeds.", "", rst_table(rows),
            ]  # fmt: skip
    if not text:
        return []
    return [
        heading("Does the embedding space explain who wins?"),
        "Spearman's correlation of a measure with nDCG@10 within each training collection, mean over the collections, "
        "intervals from resampling methods (``python experiments/evidence/space.py``). The measures are those of "
        ":doc:`analysis`. The last columns are the same among methods with losses of one family: a measure that goes "
        "with nDCG@10 over all methods and not within a family tells the families apart, and does not say who wins.",
        "", *text,
    ]  # fmt: skip
