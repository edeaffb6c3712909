"""What the benchmarks of training share: the memory of a process, contenders in processes of their own, the machine."""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import TextIO


def memory(field: str) -> float:
    """Return a line of this process's memory status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"this system does not report {field}")


class Usage:
    """Time, CPU time and peak memory of what runs inside.

    ``result`` has seconds, cpu_seconds, and the peak resident set above the baseline in MiB as the kernel noted it
    (peak_mib) and, where asked, as a thread saw it that looked 50 times a second (sampled_mib). The thread notes, too,
    the peak without the pages of files, which the system takes back when it needs them (anonymous_mib, no baseline).

    Args:
        baseline: resident set in MiB that is not counted; what is in memory when measuring starts if None.
        sampled: whether such a thread is to look, too.
    """

    def __init__(self, baseline: float | None = None, *, sampled: bool = False) -> None:
        self.baseline = baseline
        self.sampled = sampled

    def __enter__(self) -> Usage:
        gc.collect()
        # Resets the peak to what is in memory now.
        Path("/proc/self/clear_refs").write_text("5")
        if self.baseline is None:
            self.baseline = memory("VmRSS")
        self._most, self._anonymous, self._stop = memory("VmRSS"), memory("RssAnon"), threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        if self.sampled:
            self._watcher.start()
        self.cpu, self.wall = time.process_time(), time.perf_counter()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self._most = max(self._most, memory("VmRSS"))
            self._anonymous = max(self._anonymous, memory("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self.result = {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}
        self.result["peak_mib"] = memory("VmHWM") - self.baseline
        if self.sampled:
            self._stop.set()
            self._watcher.join()
            self.result["sampled_mib"] = self._most - self.baseline
            self.result["anonymous_mib"] = self._anonymous


def answers() -> TextIO:
    """Where a child's answers go; whatever libraries print goes to standard error from now on."""
    out, sys.stdout = sys.stdout, sys.stderr
    return out


class Child:
    """This script again, in a process of its own, which is asked with lines and answers with lines of JSON.

    Args:
        *arguments: what follows ``--child`` on its command line.
        **environment: what is set in its environment beside this process's own.
    """

    def __init__(self, *arguments: object, **environment: str) -> None:
        command = [sys.executable, sys.argv[0], "--child", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )

    def answer(self) -> dict:
        """Wait for the next answer."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.process.args)} ended with {self.process.wait()}")
        return json.loads(line)

    def ask(self) -> dict:
        """Ask for another turn."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """Let it end."""
        self.process.stdin.close()
        self.process.wait()


def machine() -> dict[str, object]:
    """Return the machine and the versions that the numbers belong to."""
    import torch

    processor = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("pt_dance", "torch", "sentence-transformers", "transformers", "datasets")},
    }


def open_dataset(name: str):
    """Open a collection by its name: ``dance:...`` or a folder in BEIR's layout."""
    import pyterrier as pt

    return pt.get_dataset(name if name.startswith("dance:") else f"dance:{name}")


def finish(report: dict, out: Path | None) -> None:
    """Write everything that was measured to a JSON file, if one was asked for."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
