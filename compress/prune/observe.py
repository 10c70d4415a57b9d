"""Moments of layers from running two forms of a model over the same samples, one batch at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ...graph.model import Model
from .elimination import Matrix, Moments, columns_sum
from .readers import Layer

if TYPE_CHECKING:
    from ...calibration.data import CalibrationData
    from ...runtimes.base import Runner

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]
_BATCH = 16
_COLUMNS_PER_INPUT = 192
"""Columns an input that are enough: more change the fit by less than the choice of samples does."""


class Asked(NamedTuple):
    """A layer of the current model, and the tensors that say what it should give.

    Attributes:
        layer: in the current model.
        target: name of the tensor of the original model that the layer's total should equal.
        outputs: which of the original's outputs are left, None for all.
    """

    layer: Layer
    target: str
    outputs: npt.NDArray[np.int64] | None = None


def moments_of(
    original: Model,
    current: Model,
    asked: Sequence[Asked],
    data: CalibrationData,
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> list[Moments]:
    """The moments of layers: inputs as the current model has them, targets as the original has them.

    A layer whose total adds another tensor has to give the original's total less that tensor as it
    is in the current model: so it makes up for what earlier cuts changed.

    Args:
        original: the untouched graph.
        current: the cut graph; may be the same object.
        asked: layers of the current graph.
        data: samples; each is run once through both graphs as far as is needed.
        threads: of the runtime.
        progress: called with (samples run, samples to run).
    """
    sums = [_Sum(item.layer, len(data)) for item in asked]
    wanted = list(dict.fromkeys(item.target for item in asked))
    needed = list(
        dict.fromkeys(
            str(value.name)
            for item in asked
            for value in (item.layer.reads, item.layer.beside)
            if value is not None
        )
    )
    same = original is current
    first = part_of(original, [*wanted, *needed] if same else wanted, threads)
    second = first if same else part_of(current, needed, threads)
    batch = data.static_batch or (_BATCH if data.source.uniform else 1)
    done = 0
    for feeds, count in data.batches(batch):
        truth = first(feeds)
        own = truth if same else second(feeds)
        for item, total in zip(asked, sums, strict=True):
            layer = item.layer
            beside = None if layer.beside is None else own[str(layer.beside.name)]
            target = truth[item.target]
            if item.outputs is not None:
                target = np.take(target, item.outputs, axis=1 if layer.window else -1)
            total.add(own[str(layer.reads.name)], target, beside)
        done += count
        if progress is not None:
            progress(done, len(data))
    return [total.result() for total in sums]


def part_of(
    model: Model, names: Sequence[str], threads: int
) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """Runs as much of a model as some tensors need: feeds -> name -> values."""
    from ...runtimes.base import SessionOptions
    from ...runtimes.ort_runtime import OrtSession

    part = model.fork()
    values = {value.name: value for value in part.graph.inputs}
    values |= {value.name: value for node in part.graph for value in node.outputs}
    names = list(dict.fromkeys(names))
    computed = [name for name in names if values[name].producer() is not None]
    part.graph.outputs.clear()
    part.graph.outputs.extend(values[name] for name in computed)
    RemoveUnusedNodesPass()(part.ir)
    fed = {spec.name for spec in model.inputs}
    runner: Runner | None = None
    if computed:
        runner = OrtSession.from_model(part, SessionOptions(threads=threads))

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        own = {name: values for name, values in feeds.items() if name in fed}
        found = {} if runner is None else dict(runner.run(own))
        return found | {name: own[name] for name in names if name in own}

    return run


class _Sum:
    """Moments of one layer, batch by batch."""

    def __init__(self, layer: Layer, samples: int) -> None:
        self._layer = layer
        self._samples = samples
        self._gram: Matrix | None = None
        self._cross: Matrix | None = None
        self._energy = 0.0
        self._count = 0
        self._seen = 0
        self._every: int | None = None

    def add(self, values: Array, target: Array, beside: Array | None) -> None:
        """One batch: what the layer reads, what its total should be, what is added to it."""
        wanted = target if beside is None else target - beside
        every = self._sparsely(values, wanted)
        # The first position moves from batch to batch, so that all are looked at in turn.
        start = self._seen % every
        self._seen += 1
        columns = self._layer.columns(values.astype(np.float32, copy=False), every, start)
        targets = self._layer.targets(wanted.astype(np.float32, copy=False), every, start)
        if self._layer.has_constant:
            ones = np.ones((len(columns), 1, columns.shape[2]), np.float32)
            columns = np.concatenate([columns, ones], axis=1)
        gram, cross, energy = columns_sum(columns, targets)
        self._gram = gram if self._gram is None else self._gram + gram
        self._cross = cross if self._cross is None else self._cross + cross
        self._energy += energy
        self._count += columns.shape[2]

    def _sparsely(self, values: Array, wanted: Array) -> int:
        """How sparsely positions are taken, along each spatial axis or over rows."""
        if self._every is None:
            window = self._layer.window
            positions = math.prod(wanted.shape[2:]) if window else math.prod(wanted.shape[1:-1])
            inputs = math.prod(self._layer.weight.shape[1:]) if window else values.shape[-1]
            times = positions * self._samples / max(_COLUMNS_PER_INPUT * inputs, 1)
            axes = len(window.kernel) if window else 1
            limit = max(min(wanted.shape[2:], default=1) // 2, 1) if window else max(positions, 1)
            self._every = int(min(max(times ** (1 / axes), 1), limit))
        return self._every

    def result(self) -> Moments:
        """All sums over the number of columns."""
        assert self._gram is not None
        assert self._cross is not None
        return Moments(
            gram=self._gram / self._count,
            cross=self._cross / self._count,
            energy=self._energy / self._count,
            constant=self._layer.has_constant,
        )


def own_moments(moments: Moments, rows: Matrix) -> Moments:
    """Moments whose target is what the layer itself gives: B = G W, with weights as `Layer.rows` has them."""
    cross = moments.gram @ rows
    return moments._replace(cross=cross, energy=float(np.sum(rows * cross)))


def batches(data: CalibrationData, limit: int) -> Iterator[tuple[Mapping[str, Array], int]]:
    """Batches of at most `limit` samples of the data."""
    batch = data.static_batch or (_BATCH if data.source.uniform else 1)
    done = 0
    for feeds, count in data.batches(batch):
        yield feeds, min(count, limit - done)
        done += count
        if done >= limit:
            return
