"""What changed weights do to a model's outputs, on a few samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...calibration.representation import Representation
from ...graph.edit import Editor
from ...graph.model import Model
from .elimination import Matrix
from .observe import batches
from .readers import Layer, layer_of

if TYPE_CHECKING:
    from ...calibration.data import CalibrationData

_SAMPLES = 128


class OutputError:
    """Measures how far the outputs of a changed model are from those of the original one.

    Args:
        model: the original; not changed.
        data: its first 128 samples are used.
        threads: of the runtime.
    """

    def __init__(self, model: Model, data: CalibrationData, *, threads: int = 1) -> None:
        self._model = model
        self._threads = threads
        self._feeds = list(batches(data, _SAMPLES))
        self._representation: Representation | None = None
        self._reference = self._outputs(model)
        joined = np.concatenate(self._reference)
        self._energy = (
            float(np.square(joined - joined.mean(axis=0)).sum()) if _equal(self._reference) else 0.0
        )
        self._energy = self._energy or float(sum(np.square(item).sum() for item in self._reference)) or 1.0

    def __call__(self, changed: Mapping[Layer, Matrix]) -> float:
        """The mean squared error of the outputs over their variance, with other weights in some layers."""
        trial = self._model.fork()
        nodes = {node.name: node for node in trial.graph}
        editor = Editor(trial)
        for layer, rows in changed.items():
            twin = layer_of(nodes[layer.node.name])
            assert twin is not None
            twin.put(rows, editor)
        return self.of(trial)

    def of(self, model: Model) -> float:
        """The mean squared error of a model's outputs over their variance."""
        pairs = zip(self._reference, self._outputs(model), strict=True)
        return sum(float(np.square(found - wanted).sum()) for wanted, found in pairs) / self._energy

    def _outputs(self, model: Model) -> list[npt.NDArray[np.float64]]:
        from ...runtimes.base import SessionOptions
        from ...runtimes.ort_runtime import OrtSession

        session = OrtSession.from_model(model, SessionOptions(threads=self._threads))
        found: list[npt.NDArray[np.float64]] = []
        for feeds, count in self._feeds:
            outputs = session.run(feeds)
            if self._representation is None:
                self._representation = Representation(model.task, outputs)
            for sample in self._representation.rows(outputs, feeds, count):
                found.append(_flat(list(sample.values()), model.task.kind == "classification"))
        return found


def _flat(parts: Sequence[npt.NDArray[Any]], scores: bool) -> npt.NDArray[np.float64]:
    """All values of a sample in one row; class scores without their mean, which no decision sees."""
    row = np.concatenate([np.asarray(part, np.float64).reshape(-1) for part in parts])
    return (row - row.mean() if scores else row)[None]


def _equal(rows: Sequence[npt.NDArray[np.float64]]) -> bool:
    return len({row.shape for row in rows}) == 1
