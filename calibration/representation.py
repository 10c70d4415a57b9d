"""From raw outputs to what is compared: one array per sample, by the model's task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..graph.errors import DataError, NotSupported
from ..graph.model import Task
from .schema import quoted

Array = npt.NDArray[Any]
_MASK = "attention_mask"
# One score for each token, of shape (batch, tokens): a span's start and end. That the second axis is the
# tokens' cannot be told from a shape, an embedding may be as wide.
_TOKEN_SCORES = frozenset({"start_logits", "end_logits"})


class Representation:
    """What of a model's outputs is compared, decided on the first batch and stated in words.

    - embedding with pooling "mean" or "cls": the first output of shape (batch, tokens, hidden)
      becomes one row per sample, shape (1, hidden); "mean" is over attended tokens (Reimers and
      Gurevych 2019, arXiv:1908.10084, section 3).
    - embedding with pooling "none": every numeric output, one flat row per sample, shape
      (1, values); padded tokens are left out, of a span's start and end scores, too.
    - classification: the first float output of shape (batch, classes), shape (1, classes).
    - token-classification: the first float output of shape (batch, tokens, classes), one row per
      attended token, shape (tokens, classes).
    """

    def __init__(self, task: Task, outputs: Mapping[str, Array]) -> None:
        self.task = task
        self.names = _compared(task, outputs)

    @property
    def description(self) -> str:
        """What is compared, in words."""
        if self.task.kind == "classification":
            return f"class scores of output {self.names[0]!r}"
        if self.task.kind == "token-classification":
            return f"class scores of output {self.names[0]!r}, attended tokens only"
        if self.task.pooling == "mean":
            return f"output {self.names[0]!r}, mean over attended tokens"
        if self.task.pooling == "cls":
            return f"output {self.names[0]!r}, first token"
        return f"outputs {quoted(self.names)}, each flattened per sample"

    def rows(
        self, outputs: Mapping[str, Array], feeds: Mapping[str, Array], count: int
    ) -> list[dict[str, Array]]:
        """For each of the first `count` samples of a batch: output name -> rows (see the class).

        Raises:
            DataError: if an output does not carry the batch on its first axis.
        """
        size = max((len(values) for values in feeds.values() if values.ndim), default=1)
        mask = feeds.get(_MASK)
        samples: list[dict[str, Array]] = [{} for _ in range(count)]
        for name in self.names:
            values = outputs[name]
            if size > 1 and (values.ndim == 0 or len(values) != size):
                raise DataError(
                    f"output {name!r} has no batch axis: shape {values.shape} for {size} samples",
                    remedy="measure drift with batch size 1",
                )
            for index in range(count):
                own = values[index] if size > 1 or _has_batch_axis(values) else values
                samples[index][name] = self._one(name, own, None if mask is None else mask[index])
        return samples

    def _one(self, name: str, values: Array, mask: Array | None) -> Array:
        """Rows of one sample from its own output (batch axis taken off)."""
        attended = None if mask is None else mask.astype(bool)
        if self.task.kind == "classification":
            return values.reshape(1, -1)
        if self.task.kind == "token-classification":
            return values if attended is None else values[attended]
        if self.task.pooling == "cls":
            return values[:1] if attended is None else values[attended][:1]
        if self.task.pooling == "mean":
            kept = values if attended is None else values[attended]
            mean: Array = kept.sum(axis=0, dtype=np.float64, keepdims=True) / max(len(kept), 1)
            return mean.astype(values.dtype)
        per_token = values.ndim >= 2 or (values.ndim == 1 and name in _TOKEN_SCORES)
        if attended is not None and per_token and len(values) == len(attended):
            values = values[attended]
        return values.reshape(1, -1)


def _has_batch_axis(values: Array) -> bool:
    return values.ndim > 0 and len(values) == 1


def _compared(task: Task, outputs: Mapping[str, Array]) -> tuple[str, ...]:
    numeric = {name: values for name, values in outputs.items() if values.dtype.kind in "fiub"}
    if not numeric:
        raise NotSupported("the model has no numeric output to compare", why=f"it has {quoted(outputs)}")
    if task.kind == "embedding" and task.pooling == "none":
        return tuple(numeric)
    rank = 2 if task.kind == "classification" else 3
    fitting = [name for name, values in numeric.items() if values.dtype.kind == "f" and values.ndim == rank]
    if fitting:
        return (fitting[0],)
    shapes = ", ".join(f"{name}: {values.shape}" for name, values in outputs.items())
    raise NotSupported(
        f"no float output with {rank} axes fits the task {task.kind!r}",
        why=f"the outputs are {shapes}",
        remedy="measure the model as an embedding without pooling: every output is then compared",
    )


def count_non_finite(outputs: Mapping[str, Array]) -> int:
    """How many float values of all outputs are NaN or infinite."""
    return sum(
        int(values.size - np.count_nonzero(np.isfinite(values)))
        for values in outputs.values()
        if values.dtype.kind == "f"
    )
