"""Which device is this process's own."""

from __future__ import annotations

import os

import torch

from pt_dance.storage.writing import number_of_processes


def own_device() -> str:
    """Return this process's GPU by its number, ``"cuda:1"``, or ``"cpu"`` where there is none.

    Of the processes of a job each has one of its own, as accelerate deals them out, also before training begins; one
    process alone has PyTorch's current one.
    """
    if not torch.cuda.is_available():
        return "cpu"
    here = os.environ.get("LOCAL_RANK") if number_of_processes() > 1 else None
    number = torch.cuda.current_device() if here is None else int(here) % torch.cuda.device_count()
    return f"cuda:{number}"


def is_on(device: str, wanted: str) -> bool:
    """Return whether a device is the wanted one; ``"cuda"`` wants any GPU."""
    return device == wanted or device.partition(":")[0] == wanted
