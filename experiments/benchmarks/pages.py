"""Write the committed measurements into README.md, pt_dance/pt_docs/benchmarks.rst and scaling.rst.

What stands on these pages between ".. measured: NAME" and ".. end of NAME" (in README between comments of the same
words) is made here, from the JSON files in experiments/results and by the functions that print the tables of the
scripts themselves. A test compares.

    python experiments/benchmarks/pages.py            # after a benchmark has written new results with --out
    python experiments/benchmarks/pages.py --check    # only say whether the pages are what they would be
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import encoding
import engines
import large_batches
import memory
import on_paper
import overhead
import retrieval
import scale
import versions

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments"))

import refresh_beside  # noqa: E402
from evidence.tables import short, unlinked  # noqa: E402

PAGES = ROOT / "pt_dance" / "pt_docs"
RESULTS = ROOT / "experiments" / "results"
MEASURED = re.compile(
    r"^(?P<open>\.\.|<!--) measured: (?P<name>[\w-]+)(?P<close>| -->)\n.*?^(?P=open) end of (?P=name)(?P=close)$",
    re.M | re.S,
)


def load(name: str) -> dict:
    """Read a file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def list_table(markdown: str) -> str:
    """Return a Markdown table as a list-table, which reStructuredText needs for cells of any length."""
    header, _, *body = markdown.splitlines()
    rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in (header, *body)]
    lines = [".. list-table::", "    :header-rows: 1", ""]
    for row in rows:
        lines += [f"    {'* ' if number == 0 else '  '}- {cell}".rstrip() for number, cell in enumerate(row)]
    return "\n".join(lines)


def machine(report: dict) -> str:
    """Return what the numbers belong to, in one line."""
    about = report["machine"] | report.get("versions", {})
    words = [about["processor"]]
    if "cores" in about:
        words.append(f"{about['cores']} cores")
    if about.get("threads", about.get("cores")) != about.get("cores"):
        words.append(f"{about['threads']} thread" + "s" * (about["threads"] != 1))
    names = ("python", "torch", "sentence-transformers", "transformers", "pyterrier-dr", "numpy")
    words += [f"{name.replace('python', 'Python')} {about[name]}" for name in names if name in about]
    return ", ".join(words)


def encoding_medquad() -> str:
    found = load("encoding-medquad")
    turns = len(next(iter(found["turns"].values())))
    return (
        f"{found['documents']:,} documents, {found['tokens']:,} tokens, medians of {turns} turns; {machine(found)}:\n\n"
        + list_table(encoding.table(found["documents"], found["flops"], found["median"]))
    )


def retrieval_of(name: str) -> str:
    found = load(name)
    return (
        f"{found['dimension']} dimensions, medians of {found['repeats']} turns; {machine(found)}:\n\n"
        + list_table(retrieval.table(found["retrieval"]))
    )  # fmt: skip


def overhead_of(name: str) -> str:
    found = load(name)
    (case,) = found["cases"]
    return (
        f"{case['rows']:,} training rows, {case['epochs']} epochs, medians of {found['repeats']} turns; "
        f"{machine(found)}:\n\n" + list_table(overhead.table([case]))
    )


def memory_medquad() -> str:
    found = load("memory-medquad")
    about = f"{found['phases'][0]['about']}, {found['depth']} candidates each"
    return (
        f"{about}; {found['model_mib']:,.0f} MiB with the models loaded; {machine(found)}:\n\n"
        + list_table(memory.table(found["phases"]))
    )  # fmt: skip


def large_batches_medquad() -> str:
    found = load("large-batches-medquad")
    sizes = SimpleNamespace(small=found["small"], large=found["large"])
    return (
        f"Texts of at most {found['max_length']} tokens; {machine(found)}:\n\n"
        + list_table(large_batches.table(sizes, found["results"]))
    )  # fmt: skip


# What was killed, in words, for each file of results that is there.
KILLS: dict[str, Callable[[dict], str]] = {
    "kill-indexing-static": lambda found: f"indexing {found['documents']:,} documents",
    "kill-indexing-minilm": lambda found: f"indexing {found['documents']:,} documents",
    "kill-engines": lambda found: f"indexing {found['documents']:,} documents by {found['workers']} workers of Ray",
    "kill-fit-static": lambda found: f"fits of {found['rounds']} rounds",
    "kill-refresh-static": lambda found: "fits with a refresher beside",
    "kill-torchrun": lambda found: f"fits of {found['processes']} processes",
}


def kills() -> str:
    lines = ["| what | encoder | kills | runs | interrupted runs that went on | outcome |", "|---|---|---|---|---|---|"]
    for name, words in KILLS.items():
        if not (RESULTS / f"{name}.json").exists():
            continue
        found = load(name)
        count = found["kills"]
        if isinstance(count, dict):
            count = f"{sum(count.values())} ({', '.join(f'{what} {times}' for what, times in count.items())})"
        runs = found.get("finished", found.get("fits"))
        lines.append(
            f"| {words(found)} | {found.get('encoder', 'static')} | {count} | {runs} | {found.get('resumed', '')} "
            f"| {found['result']} |"
        )
    return list_table("\n".join(lines))


def versions_medquad() -> str:
    found = load("versions")
    return (
        f"Commits {found['commits']['before']} and {found['commits']['after']}, medians of {found['turns']} turns "
        f"of {found['processes']} processes; {machine(found)}:\n\n" + list_table(versions.table(found["tasks"]))
    )


def engines_of(name: str) -> str:
    found = load(name)
    cut = f", the first {found['words']} words of each" if found["words"] else ""
    return (
        f"{found['documents']:,} documents of {found['dataset'].rpartition('/')[2]}{cut}; {machine(found)}:\n\n"
        + list_table(engines.table(found))
        + f"\n\nTwo workers are {found['one worker / two workers']:.2f} times as fast as one."
    )  # fmt: skip


def beside_of(name: str) -> str:
    found = load(name)
    seeds = len({run["seed"] for run in found["runs"]})
    low, high = found["its 95 % interval over queries"]
    replayed = found.get("replay has the same weights")
    length = f", texts of at most {found['max_length']} tokens" if found["max_length"] else ""
    gpu = f" and one {found['device']} for both" if found.get("device", "cpu") != "cpu" else ""
    return (
        f"{found['documents']:,} documents, {found['training topics']:,} training topics{length}; {found['steps']:,} "
        f"steps, a refresh after every {found['refresh_every']}, batches of {found['batch_size']}, {seeds} "
        f"seed{'s' * (seeds != 1)}, {found['cores']} cores{gpu}:\n\n"
        + list_table(refresh_beside.table(found))
        + f"\n\nBeside less between: {found['beside - between']:+.4f} nDCG@10, 95 % interval over "
        f"{found['test topics']:,} test queries {low:+.4f} to {high:+.4f}. {found['hidden']:.0%} of the time of the "
        f"refreshes is hidden. The weights of the replayed journal are {'the same' if replayed else 'others'}."
    )


def scale_of(name: str) -> str:
    found = load(name)
    return (
        f"{found['dimension']} dimensions; {machine(found)}:\n\n"
        + list_table(scale.table(found))
        + f"\n\nShare of the exact best documents that ivfpq found, of {found['depth']} candidates: "
        + f"{scale.recalls(found)}."
    )  # fmt: skip


def quickstart_table(name: str) -> str:
    found = load(name)
    measures = ("nDCG@10", "RR@10", "R@100")
    best = {measure: max(row[measure] for row in found["table"]) for measure in measures}
    lines = ["| | " + " | ".join(measures) + " |", "|---|" + "--:|" * len(measures)]
    for row in found["table"]:
        cells = (f"**{short(row[m])}**" if row[m] == best[m] else short(row[m]) for m in measures)
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + (
        "\n\n(`make quickstart`, with settings of its own: "
        f"`{found['dataset']}`, {found['documents']:,} docstrings, a static tower trained from\nnothing on "
        f"{found['training queries']:,} queries, {found['test queries']:,} test queries, seed {found['seed']}. RRF is "
        "reciprocal rank fusion. For real collections see [Results](#results).)"
    )


def quickstart_differences(name: str) -> str:
    """Return each system's difference from BM25 in nDCG@10 and R@100, in one sentence."""
    baseline, *others = load(name)["table"]
    told = [
        f"{row['name']} {_signed(row['nDCG@10'] - baseline['nDCG@10'])} "
        f"(p = {row['nDCG@10 p-value corrected']:.1g}) and {_signed(row['R@100'] - baseline['R@100'])}"
        for row in others
        if row["name"] != "dense, untrained"
    ]
    return (
        "Compared with BM25, in nDCG@10 (p of a paired t-test, Holm-corrected) and R@100: "
        + "; ".join(told).replace("BM25 % 100 >> dense", "`BM25 % 100 >> dense`")
        + "."
    )


def _signed(difference: float) -> str:
    return ("+" if difference >= 0 else "−") + short(abs(difference))


def quickstart_example(name: str, number: int) -> str:
    query, lines = list(load(name)["examples"].items())[number]
    return "\n".join(["```", query, *lines, "```"])


def quickstart_printed(name: str) -> str:
    """Return the table as experiments/quickstart.py prints it, and what it was of."""
    import pandas as pd

    found = load(name)
    table = pd.DataFrame(found["table"])
    table["p (Holm)"] = table.pop("nDCG@10 p-value corrected").map(lambda p: "" if pd.isna(p) else f"{p:.1g}")
    printed = table[["name", "nDCG@10", "p (Holm)", "RR@10", "R@100"]].to_string(index=False)
    return (
        f"```\n{printed}\n```\n\n({found['documents']:,} documents, {found['training queries']:,} training and "
        f"{found['test queries']:,} {found['split']} queries, seed {found['seed']}.)"
    )


BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README": {
        "quickstart": lambda: quickstart_table("quickstart-pydocs"),
        "quickstart-example": lambda: quickstart_example("quickstart-pydocs", 1),
        "quickstart-differences": lambda: quickstart_differences("quickstart-pydocs"),
        "medquad": lambda: quickstart_printed("quickstart-medquad"),
    },
    "benchmarks": {
        "encoding": encoding_medquad,
        "retrieval": lambda: retrieval_of("retrieval"),
        "retrieval-by-size": lambda: retrieval_of("retrieval-by-size"),
        "indexing-by-size": lambda: list_table(retrieval.indexing_table(load("retrieval-by-size")["indexing"])),
        "overhead-static": lambda: overhead_of("overhead-medquad-static"),
        "overhead-minilm": lambda: overhead_of("overhead-medquad-minilm"),
        "memory": memory_medquad,
        "large-batches": large_batches_medquad,
        "kills": kills,
        "versions": versions_medquad,
    },
    "scaling": {
        "engines-minilm": lambda: engines_of("engines-minilm"),
        "engines-static": lambda: engines_of("engines-static"),
        "beside-static": lambda: beside_of("refresh-beside-medquad-static"),
        "beside-minilm": lambda: beside_of("refresh-beside-medquad-minilm"),
        "beside-minilm-gpu": lambda: beside_of("refresh-beside-medquad-minilm-gpu"),
        "scale": lambda: scale_of("scale"),
        "on-paper": lambda: list_table(on_paper.table(*map(load, ("scale", "encoding-medquad", "retrieval-by-size")))),
    },
}


def render(page: str, name: str = "benchmarks") -> str:
    """Return a page with every measured part made anew.

    Raises:
        ValueError: if a part that can be made is not on the page, or one on the page cannot be made.
    """
    named = [part["name"] for part in MEASURED.finditer(page)]
    if sorted(named) != sorted(BLOCKS[name]):
        raise ValueError(
            f"the page has the measured parts {sorted(named)}, those that can be made are {sorted(BLOCKS[name])}"
        )
    return MEASURED.sub(lambda part: made(part, name), page)


def made(part: re.Match, name: str) -> str:
    """Return a measured part of a page with the lines around it."""
    first, last = (f"{part['open']} {words} {part['name']}{part['close']}" for words in ("measured:", "end of"))
    block = BLOCKS[name][part["name"]]()
    return f"{first}\n\n{unlinked(block) if part['open'] == '..' else block}\n\n{last}"


def file_of(name: str) -> Path:
    """Return where a page is."""
    return ROOT / "README.md" if name == "README" else PAGES / f"{name}.rst"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page would change")
    options = parser.parse_args()
    changed = False
    for name in BLOCKS:
        page = file_of(name)
        before = page.read_text(encoding="utf-8")
        after = render(before, name)
        changed |= before != after
        if not options.check:
            page.write_text(after, encoding="utf-8")
    return int(options.check and changed)


if __name__ == "__main__":
    sys.exit(main())
