"""Write docstrings.jsonl.gz: the docstrings of Python's standard library that make a small collection for the tests.

The file is kept in the repository, so that the tests train on the same texts whatever the Python they run on.

    python tests/data/make_docstrings.py        # run with Python 3.11.7 for the file as it is
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from pt_dance.datasets._docstrings import STANDARD_LIBRARY, module_files, read_docstrings
from pt_dance.datasets.pydocs import make_collection

# Copies of C modules whose docstrings are those of decimal and io, what is gone from later Pythons, and two that would
# make a fifth of the collection.
LEFT_OUT = {"_pydecimal", "_pyio", "distutils", "imp", "nntplib", "tkinter", "turtle"}


def main() -> None:
    docstrings = [
        docstring
        for module, path in module_files(STANDARD_LIBRARY)
        if module.split(".")[0] not in LEFT_OUT
        for docstring in read_docstrings(module, path)
    ]
    kept = {document["_id"] for document in make_collection(docstrings)[0]}
    lines = [json.dumps([name, text], ensure_ascii=False) + "\n" for name, text in docstrings if name in kept]
    Path(__file__).with_name("docstrings.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    print(f"{len(lines)} docstrings")


if __name__ == "__main__":
    main()
