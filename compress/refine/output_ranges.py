"""Ranges of activations chosen by what their rounding costs at the model's outputs, as measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...calibration.collect import Progress
from ...graph.edit import Editor, is_constant, remove_dead
from ...graph.errors import ModelError
from ...graph.model import Model
from ...graph.scheme import Scheme, affine_parameters, dequantize, quantize
from ..plan import Decision
from ..quantize.static import Ranges, static_layout
from .shortcut import copies

if TYPE_CHECKING:
    from ...calibration.data import CalibrationData
    from ...runtimes.base import Array, SessionOptions

OUTPUT_RANGES = "output-ranges"
"""The name under which a recipe's `fusions` switches it."""

SAMPLE_FORWARDS = 16384
"""Runs of one sample through what lies behind a tensor, over all tensors and candidates."""
_CANDIDATES = 8  # tried of one tensor, about
_FEWEST, _MOST = 16, 64
_WIDER, _NARROWER = (1.15, 1.3), (0.85, 0.7, 0.55, 0.4)
_MARGIN = 0.99
_BATCH = 8
_RECORDED_BYTES = 64 * 2**20
_CUT = "edgepress.cut"


def samples_for(tensors: int) -> int:
    """How many samples `choose_output_ranges` looks at for so many tensors."""
    return min(max(SAMPLE_FORWARDS // max(tensors * _CANDIDATES, 1), _FEWEST), _MOST)


def choose_output_ranges(
    model: Model,
    decisions: Sequence[Decision],
    ranges: Ranges,
    data: CalibrationData,
    *,
    options: SessionOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, tuple[float, float]]:
    """Widen or narrow the range of one tensor after the other where the model's float outputs come closer.

    For each tensor the float graph behind it runs on recorded inputs with this tensor alone quantized; either
    end of its range moves by the steps 1.15, 1.3 or 0.85, 0.7, 0.55, 0.4 as long as the squared error at the
    outputs, beside their squared size, falls by more than 1 %. Held at a time are the tensors at one cut, of
    at most 64 samples and about 64 MB.

    Args:
        model: the float graph, not changed.
        decisions: of a static plan.
        ranges: tensor name -> (minimum, maximum) to start from.
        data: calibration samples; the first `samples_for(tensors)` are used.
        options: session options of onnxruntime.
        progress: called with (tensors done, tensors).

    Returns:
        The ranges, with those of the plan's tensors as chosen; what only copies shares its source's range.
        As they came where control flow or outputs without floats leave nothing to measure.
    """
    layout = static_layout(model, decisions)
    chosen = dict(ranges)
    outputs = [str(value.name) for value in model.graph.outputs if value.dtype == ir.DataType.FLOAT]
    if layout.activation is None or not outputs or len(list(model.all_graphs())) > 1:
        return chosen
    copied = copies(model, layout.observed)
    searched = [name for name in layout.observed if name not in copied and name in ranges]
    few = data.select(range(min(len(data), samples_for(len(searched)))), data.split)
    for done, name in enumerate(searched, 1):
        behind = _Behind(model, name, outputs, few, options)
        if behind.feeds:
            chosen[name] = _search(behind, chosen[name], layout.activation)
        if progress is not None:
            progress(done, len(searched))
    for name in layout.observed:  # in graph order: copies of copies follow
        if name in copied:
            chosen[name] = chosen[copied[name]]
    return chosen


def _search(behind: _Behind, limits: tuple[float, float], scheme: Scheme) -> tuple[float, float]:
    """The range of least error, one end after the other."""
    best, least = limits, behind.error(limits, scheme)
    for side in (0, 1):
        start = best[side]
        for factors in (_WIDER, _NARROWER) if start else ():
            for factor in factors:
                moved = start * factor
                candidate = (moved, best[1]) if side == 0 else (best[0], moved)
                if candidate[0] >= candidate[1]:
                    break  # both ends lie on one side of zero
                found = behind.error(candidate, scheme)
                if not found < least * _MARGIN:
                    break
                best, least = candidate, found
    return best


class _Cut(NamedTuple):
    """The graph behind a tensor: its inputs by the name of the tensor that each takes."""

    model: Model
    inputs: dict[str, str]


class _Behind:
    """What lies behind one tensor, ready to run on recorded inputs with that tensor quantized."""

    def __init__(
        self,
        model: Model,
        name: str,
        outputs: Sequence[str],
        data: CalibrationData,
        options: SessionOptions | None,
    ) -> None:
        from ...runtimes.base import SessionOptions
        from ...runtimes.ort_runtime import OrtSession

        plain = options or SessionOptions(graph_optimization_level="basic")
        cut = _cut_behind(model, name)
        self._name = name
        reached = {str(value.name) for value in cut.model.graph.outputs}
        self._outputs = [output for output in outputs if output in reached]
        self.feeds: list[dict[str, Array]] = []
        self._expected: list[list[npt.NDArray[np.float32]]] = []
        if not self._outputs:
            return
        giving = _giving(model, list(cut.inputs))
        recorder = OrtSession.from_model(giving, plain) if giving.graph.outputs else None
        self._inputs = cut.inputs
        self._session = OrtSession.from_model(cut.model, plain)
        fed = set[str]() if recorder is None else {spec.name for spec in recorder.inputs}
        held = 0
        for feeds, _ in data.batches(data.static_batch or _BATCH):
            known = {key: value for key, value in feeds.items() if key in fed}
            found = {} if recorder is None else dict(recorder.run(known))
            recorded = {tensor: found.get(f"{_CUT}/{tensor}", feeds.get(tensor)) for tensor in cut.inputs}
            self.feeds.append({key: value for key, value in recorded.items() if value is not None})
            self._expected.append(self._run(self.feeds[-1]))
            held += sum(values.nbytes for values in self.feeds[-1].values())
            if held > _RECORDED_BYTES:
                break

    def error(self, limits: tuple[float, float], scheme: Scheme) -> float:
        """Squared error at the outputs, each beside its squared size, with the tensor in this range."""
        scale, zero_point = affine_parameters(np.array(limits[0]), np.array(limits[1]), scheme)
        off, size = np.zeros(len(self._outputs)), np.zeros(len(self._outputs))
        for feeds, expected in zip(self.feeds, self._expected, strict=True):
            integers = quantize(feeds[self._name].astype(np.float32), scale, zero_point, scheme)
            rounded = dequantize(integers, scale, zero_point, None)
            made = self._run({**feeds, self._name: rounded})
            off += [
                float(np.square(a.astype(np.float64) - b).sum()) for a, b in zip(made, expected, strict=True)
            ]
            size += [float(np.square(b, dtype=np.float64).sum()) for b in expected]
        return float((off / np.maximum(size, np.finfo(np.float64).tiny)).sum())

    def _run(self, feeds: Mapping[str, Array]) -> list[npt.NDArray[np.float32]]:
        found = self._session.run({self._inputs[name]: values for name, values in feeds.items()})
        return [found[name].astype(np.float32) for name in self._outputs]


def _cut_behind(model: Model, name: str) -> _Cut:
    """The nodes that depend on a tensor, as a graph whose inputs are the tensors that they read."""
    part = model.fork()
    editor, graph = Editor(part), part.graph
    values = {str(value.name): value for value in graph.inputs}
    values |= {str(value.name): value for node in graph for value in node.outputs}
    if name not in values:
        raise ModelError("the graph has no such tensor", where=f"tensor {name!r}")
    behind, nodes = {values[name]}, list[ir.Node]()
    for node in graph:
        if any(value in behind for value in node.inputs):
            nodes.append(node)
            behind.update(node.outputs)
    made = {value for node in nodes for value in node.outputs}
    inputs: dict[str, ir.Value] = {}
    for node in nodes:
        for place, value in enumerate(node.inputs):
            if value is None or value in made or is_constant(value):
                continue
            key = str(value.name)
            if key not in inputs:
                inputs[key] = ir.Value(
                    name=editor.fresh_name(f"{_CUT}/{key}"), type=value.type, shape=value.shape
                )
            node.replace_input_with(place, inputs[key])
    kept = [value for value in graph.outputs if value in made]
    graph.outputs.clear()
    graph.outputs.extend(kept)
    remove_dead(part)
    graph.inputs.clear()
    graph.inputs.extend(inputs.values())
    return _Cut(part, {key: str(value.name) for key, value in inputs.items()})


def _giving(model: Model, names: Sequence[str]) -> Model:
    """A fork that computes tensors and nothing else, under their names behind a prefix."""
    part = model.fork()
    values = {str(value.name): value for node in part.graph for value in node.outputs}
    part.graph.outputs.clear()
    for name in names:
        if name in values:
            values[name].name = f"{_CUT}/{name}"
            part.graph.outputs.append(values[name])
    remove_dead(part)
    return part
