"""Which batches learn from which table of negatives: one line a switch, on the disk before the batch is made."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pt_dance.storage.folders import publish_file


@dataclass(frozen=True)
class Switch:
    """From which batch on a table is used.

    Attributes:
        batch: Of the round, from 0.
        step: After how many steps of the round the weights were taken that it was mined with.
        seconds: What taking them, encoding, mining, drawing and measuring took.
        waited: Seconds that training waited for the table.
        measured: Of these weights on the validation topics, by measure; empty where there are none.
    """

    batch: int
    step: int
    seconds: float = 0.0
    waited: float = 0.0
    measured: dict[str, float] = field(default_factory=dict)


class Journal:
    """The switches of a round, in a file of JSON lines that only grows.

    A line that a crash cut short was not followed by any batch; it does not count and is written over.

    Args:
        path: The file; made with the first switch.

    Raises:
        ValueError: If the file is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.switches: list[Switch] = []
        self._size = 0
        content = path.read_bytes() if path.exists() else b""
        for line in content.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                self.switches.append(Switch(**json.loads(line)))
            except (TypeError, ValueError):
                raise ValueError(
                    f"{str(path)!r} is damaged: line {len(self.switches) + 1} is no switch of negatives; remove the "
                    "folder of its round, and fit trains it again"
                ) from None
            self._size += len(line)

    @property
    def last(self) -> Switch:
        """The last switch; before the first one, all batches learn from what was mined when the round began."""
        return self.switches[-1] if self.switches else Switch(-1, 0)

    def add(self, switch: Switch) -> None:
        """Write a switch through to the disk."""
        line = json.dumps(asdict(switch)).encode() + b"\n"
        if self._size:
            with open(self.path, "r+b") as out:
                out.truncate(self._size)
                out.seek(self._size)
                out.write(line)
                out.flush()
                os.fsync(out.fileno())
        else:
            beside = self.path.with_name(f".{self.path.name}.new")
            beside.write_bytes(line)
            publish_file(beside, self.path)
        self._size += len(line)
        self.switches.append(switch)

    def step_at(self, batch: int) -> int:
        """Return after how many steps the weights were taken that a batch's negatives were mined with."""
        return int(self.steps_at(np.array([batch]))[0])

    def steps_at(self, batches: np.ndarray) -> np.ndarray:
        """Return the same for many batches."""
        steps = np.array([0, *(switch.step for switch in self.switches)])
        return steps[np.searchsorted([switch.batch for switch in self.switches], batches, side="right")]

    def report(self, steps: int, batches_per_step: int) -> dict[str, Any]:
        """Return what the history tells of a round's refreshes.

        Args:
            steps: Of the round.
            batches_per_step: How many batches a step adds up.

        Returns:
            ``refreshes``, how many tables were used beside the first; ``staleness`` and ``longest_staleness``, the mean
            and the largest number of steps between the weights that negatives were mined with and the step that learns
            from them; ``beside_seconds``, what the refreshes took, and ``waited_seconds``, what training waited for
            them. Where the weights of the tables were measured, ``measured_beside``: a dictionary for each of them,
            with their ``step`` and the measures.
        """
        step = np.arange(steps)
        stale = step - self.steps_at(step * batches_per_step)
        measured = [{"step": switch.step, **switch.measured} for switch in self.switches if switch.measured]
        return {
            "refreshes": len(self.switches),
            "staleness": float(stale.mean()),
            "longest_staleness": int(stale.max()),
            "beside_seconds": sum(switch.seconds for switch in self.switches),
            "waited_seconds": sum(switch.waited for switch in self.switches),
            **({"measured_beside": measured} if measured else {}),
        }

    def __repr__(self) -> str:
        """Return which batches have which tables, whatever it took."""
        return f"Journal({[(switch.batch, switch.step) for switch in self.switches]})"
