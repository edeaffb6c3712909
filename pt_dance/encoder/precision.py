"""Choose how a model's matrix products are made: float32 by PyTorch's choice or by oneDNN, or bfloat16.

PyTorch multiplies float32 matrices with Intel's MKL, which on some other makers' processors runs at half of what
oneDNN, also part of PyTorch, gets out of them. Which one is faster is measured by products of the model's own shapes.
"""

from __future__ import annotations

import copy
import functools
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple, TypeGuard

import torch
from sentence_transformers import SentenceTransformer
from torch import nn
from torch.nn.functional import linear

FLOAT32, ONEDNN, BFLOAT16 = PRECISIONS = ("float32", "float32-onednn", "bfloat16")

_MIN_SPEEDUP = 1.2  # what gains less is not worth another rounding, and may be noise
_OPERATIONS = 0.25e9  # of a product that is timed: some 3 ms on a core
_SHAPES = 3  # are timed at most, those with the most work
_ROUNDS = 3
_MANY = 512  # texts, from which on speed matters
_said = False


class Choice(NamedTuple):
    """What is used, and how much faster a product in bfloat16 is than the best one in float32."""

    precision: str
    bfloat16_speedup: float


def choose(model: SentenceTransformer, dtype: str) -> Choice:
    """Choose the precision for a model on its device, by timed products of its linear layers' shapes.

    Takes some 50 ms on a core, once for each kind of model in a process, and nothing for models without linear layers.

    Args:
        model: The model.
        dtype: "float32" and "bfloat16" are kept to; "auto" is bfloat16 where its products are 1.2 times as fast.

    Returns:
        The choice; its precision is one of :data:`PRECISIONS`.
    """
    work = Counter((layer.in_features, layer.out_features) for layer in model.modules() if type(layer) is nn.Linear)
    if not work or model.device.type not in ("cpu", "cuda"):
        return Choice(BFLOAT16 if dtype == BFLOAT16 else FLOAT32, 1.0)
    heaviest = sorted(work, key=lambda shape: (-work[shape] * shape[0] * shape[1], shape))[:_SHAPES]
    times = [(work[shape], _seconds(str(model.device), *shape)) for shape in heaviest]
    seconds = {name: sum(count * time[name] for count, time in times) for name in PRECISIONS}
    best = ONEDNN if seconds[FLOAT32] >= _MIN_SPEEDUP * seconds[ONEDNN] else FLOAT32
    speedup = seconds[best] / seconds[BFLOAT16]
    if dtype == BFLOAT16 or (dtype == "auto" and speedup >= _MIN_SPEEDUP):
        best = BFLOAT16
    return Choice(best, speedup)


def say_if_slow(choice: Choice | None, count: int) -> None:
    """Say once in a process that bfloat16 would be at least twice as fast, where there are enough texts to care."""
    global _said
    if _said or choice is None or count < _MANY:
        return
    if choice.precision != BFLOAT16 and choice.bfloat16_speedup >= 2:
        _said = True
        warnings.warn(
            f"products in bfloat16 are {choice.bfloat16_speedup:.1f} times as fast here: DualEncoder(..., "
            "dtype='auto') uses them, at two to three digits",
            stacklevel=4,
        )


@functools.cache
def _seconds(device: str, width: int, height: int) -> dict[str, float]:
    """Return the least time for a row of a product (rows, width) x (width, height), on a CPU a core's own."""
    on_cpu = device == "cpu"
    rows = min(1024, max(64, int(_OPERATIONS / (2 * width * height)))) if on_cpu else 16384
    generator = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(n, width, generator=generator).to(device) for n in (rows, height))
    halves = [matrix.to(torch.bfloat16) for matrix in (inputs, weight)]
    products: dict[str, Callable[[], object]] = {
        FLOAT32: lambda: linear(inputs, weight),
        BFLOAT16: lambda: linear(*halves),
    }
    if on_cpu and torch.backends.mkldnn.is_available():
        laid_out = weight.to_mkldnn()
        products[ONEDNN] = lambda: linear(inputs.to_mkldnn(), laid_out).to_dense()
    least = dict.fromkeys(PRECISIONS, float("inf"))

    def measure() -> None:
        clock = time.thread_time if on_cpu else time.perf_counter
        with torch.no_grad(), torch.autocast("cpu" if on_cpu else "cuda", enabled=False):
            for turn in range(_ROUNDS):  # in turn, so that whatever else the machine does hits all of them alike
                for name, product in products.items():
                    start = clock()
                    product()
                    if not on_cpu:
                        torch.cuda.synchronize(device)
                    if turn:  # the first one warms up
                        least[name] = min(least[name], (clock() - start) / rows)

    if not on_cpu:
        measure()  # another thread has no CUDA context yet, of which cuBLAS would warn
        return least

    def alone() -> None:
        torch.set_num_threads(1)  # the setting is this thread's own
        measure()

    threads = torch.get_num_threads()
    thread = threading.Thread(target=alone, name="pt_dance-precision")
    thread.start()
    thread.join()
    torch.set_num_threads(threads)  # new threads begin with the setting that was made last
    return least


class _OneDnnLinear(nn.Module):
    """A linear layer whose weight is laid out for oneDNN; for use without gradients."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias  # some models look at them
        self._laid_out = (layer.weight.detach().to_mkldnn(), None if layer.bias is None else layer.bias.to_mkldnn())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Multiply as ``nn.Linear`` does."""
        return linear(inputs.to_mkldnn(), *self._laid_out).to_dense()


def onednn_is_there(model: SentenceTransformer) -> bool:
    """Return whether this build of PyTorch has oneDNN and the model is where it works."""
    return model.device.type == "cpu" and torch.backends.mkldnn.is_available()


def with_onednn(model: SentenceTransformer) -> SentenceTransformer:
    """Return a model of the same weights whose float32 linear layers multiply with oneDNN, for a CPU without gradients.

    The model itself is not touched. What is returned takes as much memory as these layers' weights, and holds those of
    now: a model that is trained on needs a new one.
    """
    with torch.no_grad():
        return _with_onednn(model, {})


def _with_onednn(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module not in done:
        if _is_plain_linear(module):
            done[module] = _OneDnnLinear(module)
        else:
            done[module] = made = copy.copy(module)
            made._modules = {
                name: None if part is None else _with_onednn(part, done) for name, part in module._modules.items()
            }
    return done[module]


def _is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    # A weight that is computed before each pass, a hook, or a forward that is somebody else's, is left alone.
    return (
        type(module) is nn.Linear
        and "weight" in module._parameters
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and module.weight.dtype == torch.float32
    )
