"""Run notebooks and store their outputs, without what tells of this machine.

    python notebooks/execute.py                          # all of them
    python notebooks/execute.py 4_your_own_data          # one

Each runs in an empty folder, whose name is cut from the outputs; so is what libraries write to stderr. How long each
took is printed, in seconds of the processor too: on two free cores a notebook must end within three minutes.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent


def executed(notebook: Path, folder: str) -> nbformat.NotebookNode:
    """Return a notebook with the outputs of a run in a folder."""
    read = nbformat.read(notebook, as_version=4)
    resources = {"metadata": {"path": folder}}
    NotebookClient(read, timeout=None, kernel_name="python3", resources=resources, record_timing=False).execute()
    return nbformat.from_dict(cleaned(read, folder))


def cleaned(read: dict, folder: str) -> dict:
    """Return a notebook without the name of the folder it ran in, and without what went to stderr."""
    text = json.dumps(read, ensure_ascii=False).replace(f"{folder}/", "").replace(folder, ".")
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = _joined([output for output in cell["outputs"] if output.get("name") != "stderr"])
    notebook["metadata"]["language_info"] = {"name": "python"}  # of whatever version
    return notebook


def _joined(outputs: list[dict]) -> list[dict]:
    """Join what was printed in several parts, which are others each time."""
    joined: list[dict] = []
    for output in outputs:
        if output["output_type"] == "stream" and joined and joined[-1]["output_type"] == "stream":
            joined[-1]["text"] += output["text"]
        else:
            joined.append(output)
    return joined


def main() -> None:
    """Run what is named and write it back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser.add_argument("names", nargs="*", default=known, help="notebooks, without .ipynb (default: all)")
    for name in parser.parse_args().names:
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        with tempfile.TemporaryDirectory() as folder:
            done = executed(FOLDER / f"{name}.ipynb", str(Path(folder).resolve()))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        nbformat.write(done, FOLDER / f"{name}.ipynb")
        print(f"{name}: {time.perf_counter() - started:.0f} s, {busy:.0f} s of the processor", flush=True)


if __name__ == "__main__":
    main()
