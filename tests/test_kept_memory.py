"""Memory kept while training: no page is asked for twice, and all are given back at the end."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

from pt_dance.training import kept_memory

SCRIPT = """
import ctypes, json, resource
import torch
from pt_dance.training.kept_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.zeros(16 << 20).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

torch.set_num_threads(1)
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, of which few are needed
plainly, before = faults(), resident()
with keep_freed_memory():
    faults()
    kept, inside = faults(), resident()
print(json.dumps({"plainly": plainly, "kept": kept, "again": faults(),
                  "inside_kib": inside - before, "after_kib": resident() - before}))
"""


def measured(**environment):
    # The machine's own settings of malloc are none of this test's business.
    ours = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment = {**ours, "GLIBC_TUNABLES": "", "LD_PRELOAD": "", **environment}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=True, timeout=300
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told to keep memory")
def test_freed_memory_is_kept_and_given_back():
    # A busy machine moves pages of its own accord, which costs faults too, but not every time.
    tries = []
    for _ in range(3):
        tries.append(found := measured())
        kept = found["kept"] * 4 < found["plainly"] and found["inside_kib"] > 50_000
        given_back = found["after_kib"] * 2 < found["inside_kib"] and found["again"] * 2 > found["plainly"]
        if kept and given_back:
            return
    pytest.fail(str(tries))


def test_what_the_environment_says_is_left_alone(monkeypatch):
    for name, value in (("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert kept_memory._glibc() is None
            with kept_memory.keep_freed_memory():
                pass
