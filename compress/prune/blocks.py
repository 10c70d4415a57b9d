"""Fitting a layer together with the one that makes its inputs, where nothing else reads what is between."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...graph.edit import Editor, producer
from ...graph.model import Model
from ..refine.patches import Window
from .descent import Pair, Parameters, Pool, descend, loss_of, needed
from .elementwise import Between, between
from .elimination import Matrix
from .observe import Asked, part_of
from .readers import Layer, layer_of

if TYPE_CHECKING:
    from ...calibration.data import CalibrationData

Array = npt.NDArray[Any]
Regions = tuple[tuple[int, int], ...]
RECORD_BYTES = 256 << 20
"""At most so much is recorded for a block; while it is joined, one of three tensors is there twice."""
_BATCH = 16
_EVERY = 5
"""Of so many batches one is held out of the fit."""
_STEPS = 500
_RATE = 4e-2
_IMAGES, _ROWS = 32, 2048
_POSITIONS = 256
"""A step looks at a window of about so many positions of each image."""
_REGIONS = 8
"""Where whole results would be too much, so many different parts of them are recorded."""
_PLAIN = Window((), (), (), (), 1)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Two layers, one of which reads nothing but what the other makes.

    Attributes:
        maker: the first layer.
        between: the function of one number between them.
        reader: the second layer.
    """

    maker: Layer
    between: Between
    reader: Layer


def block_of(reader: Layer) -> Block | None:
    """The block that a layer is the end of, None where what is before it is not so simple.

    Both layers have to be Conv of one group with the same number of axes, or both Gemm or MatMul, with at
    most element-wise nodes between them, and nothing else may read a tensor in between.
    """
    found = between(reader.reads, reader.node)
    if found is None:
        return None
    node = found.source.producer()
    if node is not None and node.op_type == "Add":
        node = next((made for value in node.inputs if (made := producer(value, "MatMul"))), None)
    maker = None if node is None else layer_of(node)
    if maker is None or maker.result is not found.source:
        return None
    first, second = maker.window, reader.window
    if (first is None) != (second is None):
        return None
    if first is not None and second is not None and len(first.kernel) != len(second.kernel):
        return None
    if any(window is not None and not _fits(window) for window in (first, second)):
        return None
    return Block(maker=maker, between=found, reader=reader)


def _fits(window: Window) -> bool:
    """One group, and no output that sees nothing but padding."""
    spans = [(size - 1) * step + 1 for size, step in zip(window.kernel, window.dilations, strict=True)]
    return window.groups == 1 and all(pad < span for pad, span in zip(window.pads, spans * 2, strict=True))


def fit_together(
    original: Model,
    current: Model,
    block: Block,
    asked: Asked,
    data: CalibrationData,
    *,
    editor: Editor,
    threads: int = 1,
    limit_bytes: int = RECORD_BYTES,
    steps: int = _STEPS,
) -> bool:
    """Fit both layers of a block; whether that is better on samples that were held out.

    Where it is not, both stay as they are.

    Args:
        original: the untouched graph.
        current: the cut graph, of which the block is a part; its weights are replaced.
        block: the layers.
        asked: the block's reader, and what it should give.
        data: calibration samples; a fifth of them is held out.
        editor: of the current graph.
        threads: of the runtime.
        limit_bytes: most bytes of recorded samples.
        steps: of the descent.
    """
    record = _Record(block, len(data), limit_bytes)
    if not record.read(original, current, asked, data, threads):
        return False
    pair = record.pair
    start = [*_parameters(block.maker), *_parameters(block.reader)]
    axes = len(pair.second.kernel)
    found = descend(
        pair,
        start,
        record.pools(held_out=False),
        steps=steps,
        rate=_RATE,
        samples=_IMAGES if axes else _ROWS,
        edge=round(_POSITIONS ** (1 / axes)) if axes else 1,
        fixed=[False, not block.maker.has_constant, False, not block.reader.has_constant],
        seed=0,
    )
    apart = record.pools(held_out=True)
    if not loss_of(pair, found, apart) < loss_of(pair, start, apart):
        return False
    _put(block.maker, found[0], found[1], editor)
    _put(block.reader, found[2], found[3], editor)
    return True


def _parameters(layer: Layer) -> Parameters:
    """Weight (kernel elements * channels, outputs) and bias (outputs,), the bias zero where none can be."""
    rows = layer.rows()[0]
    bias = rows[-1] if layer.has_constant else np.zeros(rows.shape[1])
    weight = rows[:-1] if layer.has_constant else rows
    taps = 1 if layer.window is None else math.prod(layer.window.kernel)
    turned = weight.reshape(-1, taps, rows.shape[1]).transpose(1, 0, 2).reshape(weight.shape)
    return [np.ascontiguousarray(turned, np.float32), bias.astype(np.float32)]


def _put(layer: Layer, weight: Array, bias: Array, editor: Editor) -> None:
    taps = 1 if layer.window is None else math.prod(layer.window.kernel)
    turned = weight.reshape(taps, -1, weight.shape[1]).transpose(1, 0, 2).reshape(weight.shape)
    rows: Matrix = turned.astype(np.float64)
    if layer.has_constant:
        rows = np.concatenate([rows, bias[None].astype(np.float64)])
    layer.put(rows[None], editor)


class _Record:
    """What the block reads, what is added to what it gives, and what the sum should be."""

    def __init__(self, block: Block, samples: int, limit_bytes: int) -> None:
        self._block, self._samples, self._limit = block, samples, limit_bytes
        self._convolves = block.reader.window is not None
        self._rng = np.random.default_rng(0)
        self._parts: dict[tuple[bool, Regions], list[list[Array]]] = {}
        self._regions: list[Regions] = []
        self._sizes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self._batches, self._skip, self._take = 0, 1, _BATCH
        self.pair: Pair

    def read(
        self, original: Model, current: Model, asked: Asked, data: CalibrationData, threads: int
    ) -> bool:
        """Run both models over the data; False where samples differ in size or none can be held out."""
        reader, inputs = self._block.reader, str(self._block.maker.reads.name)
        beside = None if reader.beside is None else str(reader.beside.name)
        first = part_of(original, [asked.target], threads)
        second = part_of(current, [inputs, *([] if beside is None else [beside])], threads)
        batch = data.static_batch or (
            min(_BATCH, max(len(data) // (2 * _EVERY), 1)) if data.source.uniform else 1
        )
        self._batches, self._take = -(-len(data) // batch), batch
        for number, (feeds, count) in enumerate(data.batches(batch)):
            if number % self._skip:
                continue
            target, own = first(feeds)[asked.target], second(feeds)
            if asked.outputs is not None:
                target = np.take(target, asked.outputs, axis=1 if self._convolves else -1)
            arrays = [own[inputs], target, *([] if beside is None else [own[beside]])]
            # A last batch may be filled up with copies.
            arrays = [item[:count] if len(item) == batch else item for item in arrays]
            if not self._add(number // self._skip, arrays):
                return False
        return len({held_out for held_out, _ in self._parts}) == 2

    def _add(self, number: int, arrays: list[Array]) -> bool:
        """One batch: inputs, target and what is beside; False where it does not go with the others."""
        if self._block.reader.rectified:
            arrays = [arrays[0], np.maximum(arrays[1], 0), *arrays[2:]]
        if not self._convolves:
            return self._add_rows(number, [item.reshape(-1, item.shape[-1]) for item in arrays])
        arrays = [np.moveaxis(item, 1, -1) for item in arrays]
        sizes = (arrays[0].shape[1:-1], arrays[1].shape[1:-1])
        if self._sizes is None:
            self._plan(sizes, arrays)
        if sizes != self._sizes:
            return False
        region = self._regions[number % len(self._regions)]
        read, _ = needed(self.pair, region)
        places = [tuple(slice(item.first, item.last) for item in read)]
        places += [tuple(slice(low, high) for low, high in region)] * (len(arrays) - 1)
        some = slice(self._take)
        self._keep(number, region, [item[(some, *at)] for item, at in zip(arrays, places, strict=True)])
        return True

    def _add_rows(self, number: int, arrays: list[Array]) -> bool:
        if len({len(item) for item in arrays}) != 1:
            return False
        if self._sizes is None:
            self.pair = self._pair(_PLAIN, _PLAIN, (), ())
            self._sizes = ((), ())
        most = max(self._limit // self._batches // sum(4 * item.shape[-1] for item in arrays), 1)
        if len(arrays[0]) > most:
            chosen = np.sort(self._rng.choice(len(arrays[0]), most, replace=False))
            arrays = [item[chosen] for item in arrays]
        self._keep(number, (), arrays)
        return True

    def _keep(self, number: int, region: Regions, arrays: list[Array]) -> None:
        held_out = number % _EVERY == _EVERY - 1
        lists = self._parts.setdefault((held_out, region), [[] for _ in arrays])
        for kept, item in zip(lists, arrays, strict=True):
            kept.append(np.array(item, np.float32, order="C"))

    def _pair(self, first: Window, second: Window, inputs: tuple[int, ...], hidden: tuple[int, ...]) -> Pair:
        return Pair(first, second, self._block.between, inputs, hidden, self._block.reader.rectified)

    def _plan(self, sizes: tuple[tuple[int, ...], tuple[int, ...]], arrays: list[Array]) -> None:
        """Choose the regions that are recorded, and of how many batches, so that all stays in the limit."""
        first, second = self._block.maker.window, self._block.reader.window
        assert first is not None
        assert second is not None
        self._sizes = sizes
        self.pair = self._pair(first, second, sizes[0], _result_sizes(first, sizes[0]))
        extent = list(sizes[1])
        channels = [item.shape[-1] for item in arrays]
        least = round(_POSITIONS ** (1 / len(extent)))

        def sample_bytes() -> int:
            read, _ = needed(self.pair, [(0, size) for size in extent])
            given = math.prod(item.last - item.first + item.after + item.before for item in read)
            return int(4 * (channels[0] * given + sum(channels[1:]) * math.prod(extent)))

        while sample_bytes() * self._samples > self._limit and max(extent) > least:
            extent = [max(least, size * 3 // 4) if size == max(extent) else size for size in extent]
        most = max(self._limit // sample_bytes(), 1)
        # Fewer samples of each batch, then fewer batches.
        self._take = max(min(most // self._batches, self._take), 1)
        self._skip = max(-(-self._batches // most), 1)
        count = 1 if tuple(extent) == sizes[1] else _REGIONS
        for _ in range(count):
            starts = [
                int(self._rng.integers(0, size - part + 1))
                for size, part in zip(sizes[1], extent, strict=True)
            ]
            self._regions.append(tuple((at, at + part) for at, part in zip(starts, extent, strict=True)))

    def pools(self, *, held_out: bool) -> list[Pool]:
        """The samples of one part, one pool for each region; they can be had once."""
        made = []
        for key in [key for key in self._parts if key[0] == held_out]:
            inputs, target, *beside = (_joined(arrays) for arrays in self._parts.pop(key))
            made.append(Pool(inputs, beside[0] if beside else None, target, key[1]))
        return made


def _joined(arrays: list[Array]) -> Array:
    """One array of several, which are given up."""
    found = np.concatenate(arrays)
    arrays.clear()
    return found


def _result_sizes(window: Window, sizes: tuple[int, ...]) -> tuple[int, ...]:
    found = []
    for axis, size in enumerate(sizes):
        span = (window.kernel[axis] - 1) * window.dilations[axis] + 1
        pads = window.pads[axis] + window.pads[len(sizes) + axis]
        found.append((size + pads - span) // window.strides[axis] + 1)
    return tuple(found)
