"""The pages that are made from the committed cells: results, which recipe to use, and parts of others."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd

from evidence.efficiency import picture
from evidence.inference import MAIN, ZERO_SHOT
from evidence.methods import BASELINES, METHODS, ROWS, SAME
from evidence.protocol import REPORTED, Protocol
from evidence.results_page import results_page
from evidence.side_studies import PICTURE
from evidence.tables import (
    BACKWARDS,
    ENCODERS,
    MADE,
    NAMES,
    claim_of,
    decided_of,
    files_of,
    heading,
    means,
    measured,
    own_documents,
    rst_table,
    scores,
    scores_of,
    short,
    unlinked,
)

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "pt_dance" / "pt_docs"
# What a user calls for each method that has a recipe, and the page that it has.
RECIPES = {
    "mnrl": ("recipes.mnrl()", "mnrl"),
    "mnrl-ance": ("recipes.ance()", "ance"),
    "samtone": ("recipes.samtone()", "samtone"),
    "samtone-both": ('recipes.samtone(sides="both")', "samtone"),
    "mnrl-dual": ("recipes.mnrl_dual()", "mnrl-dual"),
    "dance-none": ("recipes.ance(published=True)", "ance"),
    "dance-norm-dual": ("recipes.dance(published=True)", "dance"),
    "margin-mse": ("recipes.margin_mse(teacher)", "margin-mse"),
    "margin-mse-dual": ("recipes.margin_mse_dual(teacher)", "margin-mse-dual"),
    "margin-mse-mnrl-dual": ("recipes.margin_mse_mnrl_dual(teacher)", "margin-mse-mnrl-dual"),
    "distill-kl": ("recipes.distill_kl(teacher)", "distill-kl"),
}
SMALL = 0.005  # a difference that is not worth a word
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


def choosing_page(protocol: Protocol, results: Path) -> str:
    """Which recipe to use, from the cells."""
    text = [heading("Which Recipe Should I Use?", "="), MADE]
    text += [
        "A recipe is a first guess about your collection; measure two or three on a development split of your own. "
        "What follows is what the study (:doc:`results`) saw, mean nDCG@10 over its training collections, with its "
        "steps, pools and settings, tuned for each method, not with the defaults of the recipe that has the method's "
        "loss (``published=True`` has the releases' optimiser and rates besides). \"Other documents\" is nDCG@10 on "
        "its own collections of the queries for documents that no training query asked for.", "",
    ]  # fmt: skip
    for encoder, words in measured(results).items():
        own, away, back = (ranked(scores(results, encoder), measure) for measure in (MAIN, ZERO_SHOT, BACKWARDS))
        own = own[own.index.isin([*RECIPES, *BASELINES])]
        rows = [["recipe", "own collection", "other documents", "other collections", "queries by documents", "seeds"]]
        seeds = seeds_of(results, encoder)
        by_seed = scores_of(own_documents(results, encoder))
        unseen = by_seed.groupby(["method", "trained_on"]).mean().groupby("method").mean()
        for method in own.index:
            name = f":doc:`{RECIPES[method][0]} <{RECIPES[method][1]}>`" if method in RECIPES else NAMES[method]
            values = [short(s[method]) if method in s else "" for s in (own, unseen, away, back)]
            rows.append([name, *values, "" if method in BASELINES else str(seeds[SAME.get(method, method)])])
        text += [heading(f"With {words}"), rst_table(rows)]
        text += [f"- {line}" for line in advice(own, away, unseen)] + [*so_far(results, encoder), ""]
    text += [
        heading("Whatever you choose"),
        "- Start from an encoder that already ranks well; an untrained static tower is the weakest start and the "
        "cheapest to train.",
        "- Compare with BM25 and with the untrained encoder, which is round 0 of ``dance.history``.",
        "- Look at the mined negatives (``dance.negatives(1)``, :doc:`analysis`) before you train for long: unjudged "
        "relevant documents among them may hurt any method.",
        "",
    ]
    return unlinked("\n".join(text))


def advice(own: pd.Series, away: pd.Series, unseen: pd.Series) -> list[str]:
    """What the table says, in sentences.

    Args:
        own: nDCG@10 on the collection that was trained on, by method, the best first.
        away: the same on other collections.
        unseen: nDCG@10 of the queries for documents that no training query asked for.
    """

    def told(method: str, values: pd.Series) -> str:
        return f"``{RECIPES[method][0]}`` ({short(values[method])})"

    def nearly(methods: list[str], values: pd.Series) -> str:
        near = [m for m in methods[1:] if values[methods[0]] - values[m] <= SMALL]
        return f"; within .005 of it: {', '.join(told(m, values) for m in near)}" if near else ""

    taught = [m for m in own.index if m in METHODS and METHODS[m].teacher]
    plain = [m for m in own.index if m in RECIPES and m not in taught]
    lines = []
    if plain:
        line = f"{told(plain[0], own)}{nearly(plain, own)}"
        lines.append(f"Queries and judgements of your own collection, no teacher: {line}.")
        ranked_unseen = unseen[unseen.index.isin(plain)].sort_values(ascending=False)
        if len(ranked_unseen) and ranked_unseen.iloc[0] > unseen[plain[0]] + SMALL:
            line = f"{told(ranked_unseen.index[0], unseen)}{nearly(list(ranked_unseen.index), unseen)}"
            lines.append(
                f"Where most queries will ask for documents that no training query asks for: {line}. "
                f"{told(plain[0], unseen)} is behind there."
            )
        abroad = [m for m in away.index if m in plain]
        if abroad:
            best, start = told(abroad[0], away), away.get("untrained", 0)
            if away[abroad[0]] > start + SMALL:
                line = f"{best}, untrained {short(start)}"
            elif away[abroad[0]] > start - SMALL:
                line = f"training changes little there: {best} is the best of the recipes, untrained {short(start)}"
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
        lines.append(f"BM25 ({short(own['bm25'])}) is better than each of them on the mean of these collections, not "
                     "on every one: try to fuse both, as README's quickstart does.")  # fmt: skip
    return lines


def readme_table(results: Path) -> str:
    """README's table: every method by encoder, on its own collection and on others."""
    columns, rows = [], {}
    for encoder in measured(results):
        trained_on = len(files_of(results, encoder, ".json"))
        for measure, word in ((MAIN, "own"), (ZERO_SHOT, "others")):
            part = "" if trained_on == len(REPORTED) else f" ({trained_on} of {len(REPORTED)} collections)"
            columns.append(f"{encoder}{part}, {word}")
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
    rows = [["encoder", "claim", "difference", "95 % interval", "verdict", "on other documents"]]
    for encoder, words in measured(results).items():
        decided = decided_of(encoder, protocol.resamples, results)
        on_own = decided_of(encoder, protocol.resamples, results, only_own=True)
        others = {claim.id: f"{claim.mean:+.4f} {claim.verdict}" for claim in on_own.itertuples()}
        for claim in decided[decided["id"].isin(CLAIMS_OF[page_name])].itertuples():
            interval = f"{claim.low:+.4f} to {claim.high:+.4f}"
            own = others.get(claim.id, "")
            rows.append([words, claim_of(claim), f"{claim.mean:+.4f}", interval, claim.verdict, own])
    if len(rows) == 1:
        return "The study (:doc:`results`) has no cells of it yet; ``make evidence`` makes them.\n"
    return unlinked(f"In the study (:doc:`results`):\n\n{rst_table(rows)}")


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
    if (told := results / "efficiency.json").exists():
        picture(json.loads(told.read_text())["rows"], DOCS / "figures" / PICTURE)
    print(made[DOCS / "results.rst"])
