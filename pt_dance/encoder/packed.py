"""Linear layers whose weights are laid out for oneDNN while texts are encoded on a CPU.

PyTorch multiplies float32 matrices with Intel's MKL, which on other makers' processors runs at less than half of what
oneDNN, also part of PyTorch, gets out of them. Which one is faster is measured, see :mod:`pt_dance.encoder.precision`.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import linear

_lock = threading.Lock()
_users: weakref.WeakKeyDictionary[nn.Linear, int] = weakref.WeakKeyDictionary()


def available() -> bool:
    """Whether this build of PyTorch has what it takes."""
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )


class _PackedForward:
    """What a linear layer does instead of its own ``forward``; under autocast it multiplies in bfloat16."""

    def __init__(self, layer: nn.Linear) -> None:
        self._weight, self._bias = layer.weight, layer.bias
        self._packed: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        if torch.is_grad_enabled() or inputs.dtype not in (torch.float32, dtype):
            return linear(inputs, self._weight, self._bias)
        if dtype not in self._packed:
            with _lock:
                if dtype not in self._packed:
                    self._packed[dtype] = self._pack(dtype)
        weight, bias = self._packed[dtype]
        return torch.ops.mkldnn._linear_pointwise(inputs.to(dtype), weight, bias, "none", [], "")

    def _pack(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        with torch.no_grad():
            weight = torch.ops.mkldnn._reorder_linear_weight(self._weight.detach().to(dtype))
            return weight, None if self._bias is None else self._bias.detach().to(dtype)


@contextlib.contextmanager
def packed(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Let a model's float32 linear layers multiply with oneDNN inside the block; its weights are not touched.

    Takes as much memory as these layers' weights. With gradients the layers do what they always do.

    Args:
        model: The model; on a CPU.
        wanted: Nothing happens where this is False.
    """
    if not wanted:
        yield
        return
    with _lock:
        layers = list(_layers(model))
        for layer in layers:
            if layer not in _users:
                layer.forward = _PackedForward(layer)
            _users[layer] = _users.get(layer, 0) + 1
    try:
        yield
    finally:
        with _lock:
            for layer in layers:
                _users[layer] -= 1
                if not _users[layer]:
                    del _users[layer], layer.forward


def _layers(model: nn.Module) -> Iterator[nn.Linear]:
    for module in model.modules():
        # A weight that is computed before each pass, or a forward that is somebody else's, is left alone.
        if type(module) is not nn.Linear or "weight" not in module._parameters:
            continue
        if "forward" in module.__dict__ and module not in _users:
            continue
        if module.weight.dtype == torch.float32 and module.weight.device.type == "cpu":
            yield module
