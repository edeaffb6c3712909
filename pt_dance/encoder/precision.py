"""Which batches, and which precision, encode fastest on this machine: measured once for each kind of model.

What was measured is kept in PyTerrier's home, by the shapes of the weights, the device and the torch version. This is
not only to save time: the last bits of a vector depend on the batch it was computed in, so that a call only gives the
same result every time, and an interrupted indexing run only ends with the same bytes, if the batches are cut the same.
"""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyterrier as pt
import torch
import xxhash
from sentence_transformers import SentenceTransformer

from pt_dance.encoder import batches as _encoding
from pt_dance.encoder import packed as _packed
from pt_dance.encoder.fingerprint import fingerprint
from pt_dance.encoder.reading import Reader, TransformerReader, reader_for
from pt_dance.storage import folders

LARGE = 100_000
"""Tokens from which on an encode is worth a probe; smaller ones use the default batches and float32."""

MIN_COSINE = 0.9999
_MIN_SPEEDUP = 1.1  # bfloat16 that gains less is not worth its rounding, and may be noise
_MIN_GAIN = 1.03  # another batch size must gain this much over the default
_DEFAULT = {"cpu": 1024, "cuda": 65536}
_RANGE = {"cpu": (256, 8192), "cuda": (8192, 524288)}
_ROUNDS = 2

# What the vectors of both precisions are compared on: always the same texts, so that the same weights always get the
# same answer, of lengths from a query's to a passage's.
_SENTENCES = (
    "what is a dense retriever",
    "Symptoms and causes of iron deficiency in adults",
    "The committee published its report in 1987, two years after the inquiry had been opened.",
    "def read(path): return [line.strip() for line in open(path)]",
    "Water boils at 100 °C at sea level; at 3,000 m it boils at about 90 °C.",
    "A retriever finds documents, a re-ranker puts them in order, and a reader answers the question.",
    "Das Museum ist montags geschlossen. Le musée est fermé le lundi.",
    "Patients were assigned at random to treatment or placebo and followed for twelve months (n = 412, p < .05).",
)
_COMPARED = [*_SENTENCES, " ".join(_SENTENCES[:4]), " ".join(_SENTENCES[4:]), " ".join(_SENTENCES * 2)]

_settled: dict[str, dict[str, Any]] = {}
_cosines: dict[str, float] = {}


class Plan(NamedTuple):
    """How to encode: tokens in a batch, precision, whether with oneDNN, and what was measured (``None``: nothing)."""

    budget: int
    bfloat16: bool
    packed: bool = False
    measured: dict[str, Any] | None = None


def plan(model: SentenceTransformer, texts: list[str], task: str, dtype: str, dim: int) -> Plan:
    """Decide how to encode texts.

    Args:
        model: The model.
        texts: All texts of this call; some of them are used for measuring.
        task: "query" or "document".
        dtype: "float32", "bfloat16" or "auto".
        dim: Length of the model's vectors.

    Returns:
        The plan. The same model, texts and machine always get the same one.
    """
    device = model.device.type
    default = Plan(_DEFAULT.get(device, _DEFAULT["cuda"]), dtype == "bfloat16")
    if device not in _DEFAULT or sum(map(len, texts)) // 4 < LARGE:
        return default
    reader = reader_for(model, task)
    if not isinstance(reader, TransformerReader):
        return default
    key = _key(model)
    pack = False
    measured: dict[str, Any] = {"device": _device(model)}
    if device == "cpu" and model.dtype == torch.float32 and _packed.available():
        found = _settle(f"{key}-onednn", lambda: _measure_packed(model, reader, texts, task), _is_speedup)
        measured["onednn_speedup"] = found["speedup"]
        pack = found["speedup"] >= _MIN_SPEEDUP
    key += "-onednn" if pack else ""
    with _packed.packed(model, pack):
        speeds = _settle(f"{key}-batch", lambda: _measure_budgets(model, reader, texts, task), _is_batch)
        measured |= speeds
        if dtype != "auto" or model.dtype != torch.float32:
            return Plan(speeds["budget"], default.bfloat16, pack, measured)
        gained = _settle(
            f"{key}-bfloat16",
            lambda: {"speedup": _measure_bfloat16(model, reader, texts, task, speeds["budget"])},
            _is_speedup,
        )
    measured["bfloat16_speedup"] = gained["speedup"]
    bfloat16 = gained["speedup"] >= _MIN_SPEEDUP
    if bfloat16:
        measured["bfloat16_cosine"] = _cosine(model, task, dim, pack)
        bfloat16 = measured["bfloat16_cosine"] >= MIN_COSINE
    return Plan(speeds["budget"], bfloat16, pack, measured | {"dtype": "bfloat16" if bfloat16 else "float32"})


def _is_batch(found: dict[str, Any]) -> bool:
    low, high = min(low for low, _ in _RANGE.values()), max(high for _, high in _RANGE.values())
    return isinstance(found.get("budget"), int) and low <= found["budget"] <= high


def _is_speedup(found: dict[str, Any]) -> bool:
    return isinstance(found.get("speedup"), float)


def _device(model: SentenceTransformer) -> str:
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text("utf-8", "replace").splitlines()
        named = {key: value for key, _, value in (line.partition(":") for line in lines[:40])}
        name = " ".join(v.strip() for k, v in named.items() if k.strip() in ("model name", "cpu family", "model"))
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"


def _key(model: SentenceTransformer) -> str:
    digest = xxhash.xxh3_64(f"{torch.__version__} {_device(model)}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
    return digest.hexdigest()


def _settle(
    name: str, measure: Callable[[], dict[str, Any]], valid: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """What was measured the first time, by whichever process was first."""
    if name in _settled:
        return _settled[name]
    file = Path(pt.io.pyterrier_home()) / "pt_dance" / "encoding" / f"{name}.json"
    found = _read(file, valid)
    if found is None:
        found = measure()
        # Where the home cannot be written to, what was measured holds for this process.
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=file.parent) as folder:
                written = Path(folder) / file.name
                folders.write_json(written, found)
                try:
                    os.link(written, file)
                except FileExistsError:
                    found = _read(file, valid) or found
    _settled[name] = found
    return found


def _read(file: Path, valid: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    try:
        found = folders.read_json(file)
    except OSError:
        return None
    except ValueError:
        found = {}
    if valid(found):
        return found
    # A damaged file would keep what is measured now from being written.
    with contextlib.suppress(OSError):
        file.unlink(missing_ok=True)
    return None


def _measure_budgets(model: SentenceTransformer, reader: Reader, texts: list[str], task: str) -> dict[str, Any]:
    """Tokens a second for batches around the default size, and on in the direction in which it gets faster."""
    start = _DEFAULT[model.device.type]
    smallest, largest = _RANGE[model.device.type]
    speeds: dict[int, float] = {}
    wanted = [start, start // 2, start * 2]
    while wanted:
        tried = [budget for budget in wanted if smallest <= budget <= largest and budget not in speeds]
        sample = _sample(reader, texts, max(2 * start, *tried)) if tried else []
        # In turn, so that whatever else the machine does meanwhile hits all of them alike.
        for _ in range(_ROUNDS):
            for budget in tried:
                speeds[budget] = max(speeds.get(budget, 0.0), _speed(model, reader, sample, task, budget, False))
        best = max(speeds, key=speeds.__getitem__)
        wanted = []
        if best in tried and best == max(speeds) and best < largest and speeds[best] >= _MIN_GAIN * speeds[best // 2]:
            wanted = [best * 2]
        elif best in tried and best == min(speeds) and best > smallest and speeds[best] >= _MIN_GAIN * speeds[best * 2]:
            wanted = [best // 2]
    budget = best if speeds[best] >= _MIN_GAIN * speeds[start] else start
    return {"budget": budget, "tokens_per_second": {str(b): round(speeds[b]) for b in sorted(speeds)}}


def _measure_bfloat16(model: SentenceTransformer, reader: Reader, texts: list[str], task: str, budget: int) -> float:
    sample = _sample(reader, texts, 2 * budget)
    speeds = {True: 0.0, False: 0.0}
    for _ in range(_ROUNDS):
        for bfloat16 in speeds:
            speeds[bfloat16] = max(speeds[bfloat16], _speed(model, reader, sample, task, budget, bfloat16))
    return round(speeds[True] / speeds[False], 3)


def _measure_packed(model: SentenceTransformer, reader: Reader, texts: list[str], task: str) -> dict[str, Any]:
    budget = _DEFAULT["cpu"]
    sample = _sample(reader, texts, 2 * budget)
    speeds = {True: 0.0, False: 0.0}
    for _ in range(_ROUNDS):
        for pack in speeds:
            with _packed.packed(model, pack):
                speeds[pack] = max(speeds[pack], _speed(model, reader, sample, task, budget, False))
    return {"speedup": round(speeds[True] / speeds[False], 3)}


def _sample(reader: Reader, texts: list[str], tokens: int) -> list[str]:
    """Texts of all lengths, evenly from the shortest to the longest, with about so many tokens together."""
    by_length = sorted(texts, key=len)
    first = reader.read([by_length[i] for i in np.linspace(0, len(texts) - 1, min(32, len(texts))).astype(int)])
    n = max(2, round(tokens / max(1.0, float(first.lengths.mean()))))
    return [by_length[i] for i in np.linspace(0, len(texts) - 1, n).astype(int)]


def _speed(
    model: SentenceTransformer, reader: Reader, texts: list[str], task: str, budget: int, bfloat16: bool
) -> float:
    """Tokens a second, tokenisation apart: of one core's own time on a CPU, of the clock's on a GPU."""
    cut = list(_encoding.batches(reader, texts, budget, _encoding.READ_AT_ONCE))
    tokens = sum(int(features["attention_mask"].sum()) for _, features in cut)
    taken: list[float] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            on_cpu = model.device.type == "cpu"
            if on_cpu:
                torch.set_num_threads(1)
            clock = time.thread_time if on_cpu else time.perf_counter
            with torch.no_grad():
                _encoding.forward(model, dict(cut[-1][1]), task, bfloat16)
                if not on_cpu:
                    torch.cuda.synchronize(model.device)
                start = clock()
                for _, features in cut:
                    _encoding.forward(model, dict(features), task, bfloat16)
                if not on_cpu:
                    torch.cuda.synchronize(model.device)
            taken.append(clock() - start)
        except BaseException as error:  # it is raised again in the thread that asked
            failed.append(error)

    threads = torch.get_num_threads()
    with _encoding.evaluating(model):
        thread = threading.Thread(target=run, name="pt_dance-probe")
        thread.start()
        thread.join()
    torch.set_num_threads(threads)
    if failed:
        raise failed[0]
    return tokens / max(taken[0], 1e-9)


def _cosine(model: SentenceTransformer, task: str, dim: int, pack: bool) -> float:
    """The least cosine between a text's vectors in bfloat16 and float32."""
    key = f"{task} {pack} {fingerprint(model)}"
    if key not in _cosines:
        vectors = [
            _encoding.encode(model, _COMPARED, task, dim=dim, budget=1024, bfloat16=bfloat16, pack=pack).astype(float)
            for bfloat16 in (False, True)
        ]
        norms = [np.maximum(np.linalg.norm(v, axis=1), 1e-12) for v in vectors]
        _cosines[key] = round(float(((vectors[0] * vectors[1]).sum(1) / (norms[0] * norms[1])).min()), 7)
    return _cosines[key]
