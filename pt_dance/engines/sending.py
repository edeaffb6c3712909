"""Objects on their way to another process of this job: what was on a GPU goes to the GPU that is that process's own."""

from __future__ import annotations

import io
from typing import Any

import dill
import torch

from pt_dance.storage.devices import own_device


class _Pickler(dill.Pickler):
    """Write what is on a GPU so that it does not go back to the one of the same number, which another process has."""

    def reducer_override(self, obj: Any) -> Any:
        # a parameter is made of such a tensor, and so is whatever else a model has
        if type(obj) is torch.Tensor and _is_on_gpu(obj):
            return _on_own_device, (obj.detach().cpu(), obj.requires_grad)
        return NotImplemented


def dump(obj: Any, file: Any) -> None:
    """Write an object, with the functions that it has, so that ``dill`` reads it in another process."""
    _Pickler(file, recurse=True).dump(obj)


def dumps(obj: Any) -> bytes:
    """Return the bytes that :func:`dump` writes."""
    file = io.BytesIO()
    dump(obj, file)
    return file.getvalue()


def _is_on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda"


def _on_own_device(tensor: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    return tensor.to(own_device()).requires_grad_(requires_grad)
