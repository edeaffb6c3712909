"""What large collections would take, worked out from the rates that scale.py, encoding.py and retrieval.py measured."""

from __future__ import annotations

DIMENSION = 768
COLLECTIONS = {"MS MARCO v1": 8_841_823, "MS MARCO v2": 138_364_198, "a billion": 1_000_000_000}
# Numbers that FAISS keeps of a document: a code of one byte for every four dimensions, and its number.
IVFPQ_BYTES = DIMENSION // 4 + 8
LISTS_PER_ROOT, TRAINED_PER_LIST = 4, 39
WEEK, CORES = 7 * 24, 16
QUERIES = 1_000


def rates(scale: dict, encoding: dict, retrieval: dict) -> dict[str, float]:
    """Return CPU seconds and bytes a document, as the largest collection that was measured had them.

    What multiplies or moves vectors is scaled from that one's dimensions to 768.
    """
    wider = DIMENSION / scale["dimension"]

    def largest(name: str) -> tuple[int, dict]:
        size = max(int(size) for size, stages in scale["sizes"].items() if name in stages)
        return size, scale["sizes"][str(size)][name]

    found = {"encode": encoding["median"]["DualEncoder.encode_docs"]["cpu"] / encoding["documents"]}
    for name, factor in (("corpus", 1.0), ("ann", wider)):
        size, measured = largest(name)
        found[name] = measured["cpu_seconds"] / size * factor
    size, measured = largest("index")
    found["files"] = measured["bytes"] / size - 4 * scale["dimension"]
    searched = max((r for r in retrieval["retrieval"] if r["contender"] == "pt_dance"), key=lambda r: r["documents"])
    for_one = searched["cpu_seconds"] / searched["documents"] / searched["queries"] / retrieval["dimension"]
    found["exact"] = for_one * QUERIES * DIMENSION
    return found


def needs(documents: int, rate: dict[str, float]) -> dict[str, str]:
    """Return what so many documents with vectors of 768 numbers take, in words."""
    lists = int(LISTS_PER_ROOT * documents**0.5)
    hours = {name: documents * rate[name] / 3600 for name in ("encode", "corpus", "ann", "exact")}
    return {
        "vectors, float32": size(documents * DIMENSION * 4),
        "vectors, float16": size(documents * DIMENSION * 2),
        "docnos, their hashes, order and offsets": size(documents * rate["files"]),
        "ivfpq": size(documents * IVFPQ_BYTES + lists * DIMENSION * 4),
        "memory to train ivfpq": size(TRAINED_PER_LIST * lists * DIMENSION * 4),
        "core hours: Corpus.build": f"{hours['corpus']:,.1f}",
        "core hours: MiniLM encodes": f"{hours['encode']:,.0f}",
        f"machines of {CORES} cores that encode in a week": f"{-(-hours['encode'] // (WEEK * CORES)):,.0f}",
        "core hours: ivfpq is built": f"{hours['ann']:,.1f}",
        f"core hours: {QUERIES:,} queries, exactly": f"{hours['exact']:,.2f}",
    }


def size(count: float) -> str:
    """Return a number of bytes in GB or TB."""
    return f"{count / 1e12:,.1f} TB" if count >= 1e12 else f"{count / 1e9:,.1f} GB"


def table(scale: dict, encoding: dict, retrieval: dict) -> str:
    """Return the table in Markdown, a collection a column."""
    rate = rates(scale, encoding, retrieval)
    columns = {name: needs(documents, rate) for name, documents in COLLECTIONS.items()}
    lines = [f"| {DIMENSION} dimensions | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    lines.append(f"| documents | {' | '.join(f'{count:,}' for count in COLLECTIONS.values())} |")
    for row in next(iter(columns.values())):
        lines.append(f"| {row} | {' | '.join(column[row] for column in columns.values())} |")
    return "\n".join(lines)
