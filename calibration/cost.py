"""What a calibration costs: the estimate before it starts, and what a memory bound is held against."""

from __future__ import annotations

import dataclasses

from ..graph.errors import DataError
from .histogram import SIDE_BINS

OBSERVER_BYTES = 2 * SIDE_BINS * 8
"""What one observed tensor keeps for the whole run, whatever the data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationCost:
    """An estimate from one measured sample, the largest: seconds, bytes of tensors and counts, passes."""

    seconds: float
    memory_bytes: int
    passes: int
    samples: int

    def __str__(self) -> str:
        passes = "one pass" if self.passes == 1 else f"{self.passes} passes"
        time = f"about {self.seconds:.0f} s" if self.seconds >= 1 else "less than 1 s"
        size = max(self.memory_bytes / 1e6, 0.1)
        shown = f"{size:.0f} MB" if size >= 10 else f"{size:.1f} MB"
        return f"{time} and {shown}, {passes} over {self.samples} samples"


def activation_budget(max_memory_bytes: int, tensors: int) -> int:
    """Bytes that are left for the activations of one pass beside the counts of every tensor.

    Raises:
        DataError: if nothing is left.
    """
    left = max_memory_bytes - tensors * OBSERVER_BYTES
    if left < 1:
        raise DataError(
            "the memory bound is too small for this calibration",
            where=f"--max-memory {max_memory_bytes / 1e6:.1f}MB",
            why=f"the counts of {tensors} tensors alone take {tensors * OBSERVER_BYTES / 1e6:.1f} MB",
            remedy="raise it, or keep more of the model in float (--keep-float)",
        )
    return left


def too_large(name: str, needed_bytes: int, budget: int) -> DataError:
    """The error of one tensor that does not fit into the bound by itself."""
    return DataError(
        "the memory bound is too small for this calibration",
        where=f"tensor {name!r}",
        why=f"one sample of it takes {needed_bytes / 1e6:.1f} MB, {budget / 1e6:.1f} MB are left",
        remedy="raise --max-memory, use smaller samples, or keep the nodes around it in float (--keep-float)",
    )
