"""Ranges of a model's intermediate tensors: one sample at a time, in constant memory."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from ..graph.errors import DataError, ModelError
from ..graph.model import Model
from .cost import OBSERVER_BYTES, CalibrationCost, activation_budget, too_large
from .data import CalibrationData
from .histogram import Histogram
from .ranges import DEFAULT_PERCENTILE, Method, RangeObserver
from .schema import Array, Feeds, near_names

if TYPE_CHECKING:
    from ..runtimes.base import Runner, SessionOptions

Progress = Callable[[int, int], None]
Limits = npt.NDArray[np.float32]
DEFAULT_MEMORY_BYTES = 256 * 2**20
TYPICAL = " (typical)"
SPREAD = " (mean -+ deviation)"
"""Behind a tensor's name: the limits of one sample on average, and of one standard deviation."""
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE})


def collect_ranges(
    model: Model,
    tensor_names: Sequence[str],
    data: CalibrationData,
    *,
    method: Method = "auto",
    percentile: float = DEFAULT_PERCENTILE,
    options: SessionOptions | None = None,
    progress: Progress | None = None,
    max_memory_bytes: int | None = None,
    memory_limit_bytes: int | None = None,
    announce: Callable[[CalibrationCost], None] | None = None,
    open_session: Callable[[Model], Runner] | None = None,
) -> dict[str, RangeObserver]:
    """Run the model over the data and observe tensors; no activation outlives its sample.

    Tensors are taken in segments whose activations fit `max_memory_bytes`; each segment costs one
    pass over the data, through a graph cut down to what the segment needs.

    Args:
        model: not changed.
        tensor_names: float inputs and node outputs of the main graph.
        data: calibration samples.
        method: how each observer will choose its range.
        percentile: for the percentile method, in percent.
        options: session options of onnxruntime; graph optimisation is off by default.
        progress: called with (samples run, samples to run).
        max_memory_bytes: for the activations of one segment (256 MiB by default); one tensor may pass it.
        memory_limit_bytes: a bound that is held, for the activations fetched at a time and all counts.
        announce: told of the cost before the run starts, extrapolated from the largest sample.
        open_session: opens another runtime than onnxruntime.

    Returns:
        name -> observer, in the order of `tensor_names`.

    Raises:
        ModelError: if a name is unknown, inside a subgraph, an initializer or not a float tensor.
        DataError: if an activation is NaN, there are no samples, or one tensor alone passes the bound.
    """
    names = list(dict.fromkeys(tensor_names))
    observers = {name: RangeObserver(name, method=method, percentile=percentile) for name in names}
    budget = DEFAULT_MEMORY_BYTES if max_memory_bytes is None else max_memory_bytes
    if memory_limit_bytes is not None:
        budget = activation_budget(memory_limit_bytes, len(names))
    opener = open_session or _onnxruntime_opener(options)
    for name, values in _observed(
        model,
        names,
        data,
        budget=budget,
        opener=opener,
        progress=progress,
        strict=memory_limit_bytes is not None,
        announce=announce,
    ):
        observers[name].update(values)
    return observers


def collect_channel_limits(
    model: Model,
    tensor_names: Sequence[str],
    data: CalibrationData,
    *,
    typical: bool = False,
    batch_size: int = 1,
    options: SessionOptions | None = None,
    progress: Progress | None = None,
    open_session: Callable[[Model], Runner] | None = None,
) -> dict[str, tuple[Limits, Limits]]:
    """The smallest and largest value of every channel (last axis) of tensors, over the data.

    A dynamic quantizer meets the limits of one batch at a time: with `typical` their mean over the batches
    stands under name + `TYPICAL`, and each channel's mean less and plus its standard deviation under
    name + `SPREAD`.

    Args:
        model: not changed.
        tensor_names: float inputs and node outputs of the main graph.
        data: calibration samples.
        typical: whether those two are given as well.
        batch_size: samples run together, texts padded to the longest (unless the model fixes the size):
            padding tokens have outlier channels of their own.
        options: session options of onnxruntime; graph optimisation is off by default.
        progress: called with (samples run, samples to run).
        open_session: opens another runtime than onnxruntime.

    Returns:
        name (and name + `TYPICAL`, name + `SPREAD`) -> (minimum, maximum), each float32 of shape (channels,).

    Raises:
        ModelError: if a name is unknown, inside a subgraph, an initializer or not a float tensor.
        DataError: if there are no samples.
    """
    names = list(dict.fromkeys(tensor_names))
    sums: dict[str, _ChannelSums] = {}
    opener = open_session or _onnxruntime_opener(options)
    found: dict[str, tuple[Limits, Limits]] = {}
    for name, values in _observed(
        model,
        names,
        data,
        budget=DEFAULT_MEMORY_BYTES // batch_size,
        opener=opener,
        progress=progress,
        batch_size=batch_size,
    ):
        rows = np.asarray(values, np.float32).reshape(-1, values.shape[-1])
        low, high = rows.min(axis=0), rows.max(axis=0)
        if typical:
            sums.setdefault(name, _ChannelSums(rows.shape[1])).add(rows, low, high)
        if name in found:
            low, high = np.minimum(found[name][0], low), np.maximum(found[name][1], high)
        found[name] = low, high
    for name, item in sums.items():
        found[name + TYPICAL], found[name + SPREAD] = item.typical(), item.spread()
    return found


class _ChannelSums:
    """Sums over samples of each channel's limits, and over rows of its values and their squares."""

    def __init__(self, channels: int) -> None:
        self._limits, self._moments = np.zeros((2, channels)), np.zeros((2, channels))
        self._samples = self._rows = 0

    def add(self, rows: Limits, low: Limits, high: Limits) -> None:
        self._limits += low, high
        self._moments += rows.sum(axis=0, dtype=np.float64), np.einsum("ij,ij->j", rows, rows)
        self._samples += 1
        self._rows += len(rows)

    def typical(self) -> tuple[Limits, Limits]:
        low, high = (self._limits / self._samples).astype(np.float32)
        return low, high

    def spread(self) -> tuple[Limits, Limits]:
        mean, square = self._moments / self._rows
        deviation = np.sqrt(np.maximum(square - np.square(mean), 0.0))
        return (mean - deviation).astype(np.float32), (mean + deviation).astype(np.float32)


def stream_tensors(
    model: Model,
    tensor_names: Sequence[str],
    data: CalibrationData,
    *,
    options: SessionOptions | None = None,
    progress: Progress | None = None,
    max_memory_bytes: int | None = None,
) -> Iterator[tuple[str, Array]]:
    """(name, values) of every tensor for every batch of the data, in memory that the data does not raise.

    Args:
        model: not changed.
        tensor_names: float inputs and node outputs of the main graph.
        data: calibration samples.
        options: session options of onnxruntime; graph optimisation is off by default.
        progress: called with (samples run, samples to run).
        max_memory_bytes: for the tensors that are fetched at a time (256 MiB by default).

    Raises:
        ModelError: if a name is unknown, inside a subgraph, an initializer or not a float tensor.
        DataError: if there are no samples.
    """
    names = list(dict.fromkeys(tensor_names))
    budget = DEFAULT_MEMORY_BYTES if max_memory_bytes is None else max_memory_bytes
    return _observed(
        model, names, data, budget=budget, opener=_onnxruntime_opener(options), progress=progress
    )


def _observed(
    model: Model,
    names: Sequence[str],
    data: CalibrationData,
    *,
    budget: int,
    opener: Callable[[Model], Runner],
    progress: Progress | None,
    strict: bool = False,
    announce: Callable[[CalibrationCost], None] | None = None,
    batch_size: int = 1,
) -> Iterator[tuple[str, Array]]:
    """(name, values) of every tensor for every batch, in segments that fit the budget (`strict`: or fail)."""
    if len(data) == 0:
        raise DataError("the calibration data holds no samples", where=data.name)
    check_observable(model, names)
    largest = _one_batch(data.largest_sample(), data)
    fed = {spec.name for spec in model.inputs}
    segments = deque(_segments([name for name in names if name not in fed], model, largest, budget))
    inputs = [name for name in names if name in fed]
    if inputs and not segments:
        segments.append([])
    done = 0
    run: _Segment | None = None
    while segments:
        segment = segments.popleft()
        run = None  # closes the last session before the next one loads the weights again
        run = _Segment(model, segment, opener, fed) if segment else None
        needed = 0 if run is None or (len(segment) == 1 and not strict) else run.nbytes(largest)
        if needed > budget and len(segment) > 1:
            half = len(segment) // 2
            segments.extendleft([segment[half:], segment[:half]])
            continue
        if strict and needed > budget:
            raise too_large(segment[0], needed, budget)
        if announce is not None:
            announce(_cost(run, largest, data, inputs=inputs, tensors=len(names), passes=1 + len(segments)))
            announce = None
        total = done + len(data) * (1 + len(segments))
        for feeds, count in data.batches(data.static_batch or batch_size):
            for name in inputs:
                yield name, feeds[name]
            if run is not None:
                yield from run(feeds)
            done += count
            if progress is not None:
                progress(done, total)
        inputs = []


def _cost(
    run: _Segment | None,
    largest: Feeds,
    data: CalibrationData,
    *,
    inputs: Sequence[str],
    tensors: int,
    passes: int,
) -> CalibrationCost:
    """The cost of a calibration, as the largest sample has it in the first segment."""
    fetched = 0
    started = time.perf_counter()
    for name in inputs:
        Histogram().add(largest[name], name)
    for name, values in () if run is None else run(largest):
        Histogram().add(values, name)
        fetched += values.nbytes
    seconds = (time.perf_counter() - started) * passes * len(data) / (data.static_batch or 1)
    memory_bytes = fetched + tensors * OBSERVER_BYTES
    return CalibrationCost(seconds=seconds, memory_bytes=memory_bytes, passes=passes, samples=len(data))


def check_observable(model: Model, names: Sequence[str]) -> None:
    """Raise unless every name is a float input or node output of the main graph.

    Raises:
        ModelError: naming the tensor and why it cannot be observed.
    """
    visible = _visible_values(model)
    inner = {
        value.name for graph in list(model.all_graphs())[1:] for node in graph for value in node.outputs
    } | {value.name for graph in list(model.all_graphs())[1:] for value in graph.inputs}
    for name in names:
        value = visible.get(name)
        if value is None and name in inner:
            raise _not_observable(name, "it lives inside an If, Loop or Scan body", "leave it in float")
        if value is None and name in model.graph.initializers:
            raise _not_observable(name, "it is a weight", "take its range from its values")
        if value is None:
            raise _not_observable(name, f"the graph has no such tensor{near_names(name, visible)}", None)
        if value.dtype is not None and value.dtype not in _FLOATS:
            raise _not_observable(name, f"its type is {value.dtype.name}", "leave it as it is")


def _not_observable(name: str, why: str, remedy: str | None) -> ModelError:
    return ModelError("a tensor cannot be calibrated", where=f"tensor {name!r}", why=why, remedy=remedy)


def _visible_values(model: Model) -> dict[str, ir.Value]:
    values = {value.name: value for value in model.graph.inputs if value.name not in model.graph.initializers}
    values |= {value.name: value for node in model.graph for value in node.outputs}
    return {name: value for name, value in values.items() if name}


def _one_batch(sample: Feeds, data: CalibrationData) -> Feeds:
    """A sample as one batch of the size that the model fixes."""
    size = data.static_batch or 1
    return {name: v.repeat(size, 0) if v.ndim and len(v) == 1 else v for name, v in sample.items()}


class _Segment:
    """Some tensors of a model as the only outputs of a graph that computes nothing else."""

    def __init__(
        self, model: Model, names: Sequence[str], opener: Callable[[Model], Runner], fed: set[str]
    ) -> None:
        part = model.fork()
        visible = _visible_values(part)
        part.graph.outputs.clear()
        part.graph.outputs.extend(visible[name] for name in names)
        RemoveUnusedNodesPass()(part.ir)
        self._names = list(names)
        self._runner = opener(part)
        self._fed = fed

    def __call__(self, feeds: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
        """Run one batch; tensors come one by one and can be dropped one by one."""
        outputs = self._runner.run({name: v for name, v in feeds.items() if name in self._fed})
        for name in self._names:
            yield name, outputs.pop(name)

    def nbytes(self, feeds: Mapping[str, Array]) -> int:
        """Bytes of all tensors of the segment for one batch."""
        return sum(values.nbytes for _, values in self(feeds))


def _segments(names: Sequence[str], model: Model, largest: Feeds, budget: int) -> list[list[str]]:
    """Tensors in graph order, as many in each segment as the estimate lets fit into `budget` bytes."""
    order = {name: index for index, name in enumerate(_visible_values(model))}
    sizes = _estimate_bytes(model, largest)
    segments: list[list[str]] = []
    used = 0
    for name in sorted(names, key=order.__getitem__):
        size = sizes.get(name, 0)
        if not segments or used + size > budget:
            segments.append([])
            used = 0
        segments[-1].append(name)
        used += size
    return segments


def _estimate_bytes(model: Model, largest: Feeds) -> dict[str, int]:
    """Bytes of the tensors whose shape follows from the shapes of the largest sample."""
    fixed = model.fork()
    for value in fixed.graph.inputs:
        if value.name in largest:
            value.shape = ir.Shape(largest[value.name].shape)
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(fixed.ir)
    return {
        name: math.ceil(math.prod(value.shape.numpy()) * value.dtype.itemsize)
        for name, value in _visible_values(fixed).items()
        if value.shape is not None and value.dtype is not None and value.shape.is_static()
    }


def _onnxruntime_opener(options: SessionOptions | None) -> Callable[[Model], Runner]:
    from ..runtimes.base import SessionOptions
    from ..runtimes.ort_runtime import OrtSession

    # Nothing to gain from the runtime's fusions: the tensors asked for must exist one by one.
    plain = options or SessionOptions(graph_optimization_level="disable_all")
    return lambda model: OrtSession.from_model(model, plain)
