"""Two linear layers with a function of one number between them, fitted together by gradient descent.

All functions are of arrays, channels last: values (n, *sizes, channels), the weight of a layer
(kernel elements * channels, outputs), kernel elements in row-major order. A product of rows is a
convolution without spatial axes. p = beside + [f([x] W1 + b1)] W2 + b2, where [x] are the patches of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..refine.patches import Window

Floats = npt.NDArray[np.floating[Any]]
Rows = npt.NDArray[np.int64]
Function = Callable[[Floats], tuple[Floats, Floats]]
"""Values -> a function of each of them, and its derivative there."""
Parameters = list[Floats]
"""W1, b1, W2, b2."""
_DECAYS = (0.9, 0.99)
_TINY = 1e-12
_POSITIONS = 16384


class Slab(NamedTuple):
    """What some outputs of a convolution read along one axis.

    Attributes:
        first, last: elements [first, last) of its input.
        before, after: zeros of the padding on each side of them.
    """

    first: int
    last: int
    before: int
    after: int


class Pair(NamedTuple):
    """Two layers, without their weights.

    Attributes:
        first, second: their geometry, without axes for products.
        between: what is between them.
        inputs, hidden: sizes of the spatial axes of what the first reads, and of what it gives.
        rectified: whether a Relu follows: then nothing below zero counts as right or wrong.
    """

    first: Window
    second: Window
    between: Function
    inputs: tuple[int, ...]
    hidden: tuple[int, ...]
    rectified: bool


class Pool(NamedTuple):
    """Samples of which the same region of the second layer's result is known.

    Attributes:
        inputs: shape (n, *sizes, channels): as much as the region needs.
        beside: shape (n, *region, outputs), None where nothing is added.
        target: the same shape; what beside and result should add up to, not below 0 if rectified.
        region: [first, last) along each axis of the result.
    """

    inputs: Floats
    beside: Floats | None
    target: Floats
    region: tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """A part of a pool that a loss is computed of: its arrays, and zeros around inputs and hidden values."""

    inputs: Floats
    beside: Floats | None
    target: Floats
    around_inputs: tuple[Slab, ...]
    around_hidden: tuple[Slab, ...]


def slabs(region: Sequence[tuple[int, int]], window: Window, sizes: Sequence[int]) -> tuple[Slab, ...]:
    """What the outputs of a region read of an input of some sizes, axis by axis."""
    found = []
    for axis, ((low, high), size) in enumerate(zip(region, sizes, strict=True)):
        span = (window.kernel[axis] - 1) * window.dilations[axis] + 1
        start = low * window.strides[axis] - window.pads[axis]
        end = (high - 1) * window.strides[axis] - window.pads[axis] + span
        first = min(max(start, 0), size)
        last = max(min(end, size), first)
        before = max(first - start, 0)
        found.append(Slab(first, last, before, end - start - before - (last - first)))
    return tuple(found)


def needed(pair: Pair, region: Sequence[tuple[int, int]]) -> tuple[tuple[Slab, ...], tuple[Slab, ...]]:
    """What a region of the second result needs of the first layer's inputs, and of the hidden values."""
    hidden = slabs(region, pair.second, pair.hidden)
    inputs = slabs([(item.first, item.last) for item in hidden], pair.first, pair.inputs)
    return inputs, hidden


def piece_of(pair: Pair, pool: Pool, chosen: Rows | slice, region: Sequence[tuple[int, int]]) -> Piece:
    """Some samples of a pool, and a part of its region."""
    inputs, hidden = needed(pair, region)
    known, _ = needed(pair, pool.region)
    read = tuple(
        slice(item.first - base.first, item.last - base.first)
        for item, base in zip(inputs, known, strict=True)
    )
    result = tuple(
        slice(low - base, high - base) for (low, high), (base, _) in zip(region, pool.region, strict=True)
    )
    return Piece(
        inputs=pool.inputs[(chosen, *read)],
        beside=None if pool.beside is None else pool.beside[(chosen, *result)],
        target=pool.target[(chosen, *result)],
        around_inputs=inputs,
        around_hidden=hidden,
    )


def columns(values: Floats, window: Window, around: Sequence[Slab]) -> Floats:
    """Patches under the kernel, shape (n, *positions, kernel elements * channels), zeros put around first."""
    axes = len(window.kernel)
    if any(item.before or item.after for item in around):
        values = np.pad(values, [(0, 0), *((item.before, item.after) for item in around), (0, 0)])
    if max(window.kernel, default=1) == 1:
        return values[(slice(None), *(slice(None, None, stride) for stride in window.strides))]
    spans = tuple((size - 1) * step + 1 for size, step in zip(window.kernel, window.dilations, strict=True))
    views = np.lib.stride_tricks.sliding_window_view(values, spans, tuple(range(1, 1 + axes)))
    places = tuple(slice(None, None, stride) for stride in window.strides)
    taps = tuple(slice(None, None, step) for step in window.dilations)
    views = views[(slice(None), *places, slice(None), *taps)]
    views = views.transpose(*range(1 + axes), *range(2 + axes, 2 + 2 * axes), 1 + axes)
    return np.ascontiguousarray(views).reshape(*views.shape[: 1 + axes], -1)


def spread(
    gradient: Floats, weight: Floats, window: Window, around: Sequence[Slab], sizes: Sequence[int]
) -> Floats:
    """The gradient by the values that `columns` took: its transpose after that of the weight.

    Args:
        gradient: by the result, shape (n, *positions, outputs).
        weight: shape (kernel elements * channels, outputs).
        window: the convolution.
        around: the zeros that were put around the values.
        sizes: of the values.
    """
    if not window.kernel:
        return gradient @ weight.T
    taps = weight.reshape(math.prod(window.kernel), -1, weight.shape[1])
    whole = [size + item.before + item.after for size, item in zip(sizes, around, strict=True)]
    found = np.zeros((len(gradient), *whole, taps.shape[1]), np.float32)
    counts = gradient.shape[1:-1]
    for tap, place in zip(taps, np.ndindex(*window.kernel), strict=True):
        starts = [at * step for at, step in zip(place, window.dilations, strict=True)]
        read = tuple(
            slice(start, start + (count - 1) * stride + 1, stride)
            for start, count, stride in zip(starts, counts, window.strides, strict=True)
        )
        found[(slice(None), *read)] += gradient @ tap.T
    inner = tuple(slice(item.before, item.before + size) for size, item in zip(sizes, around, strict=True))
    return found[(slice(None), *inner)]


def residual(pair: Pair, result: Floats, piece: Piece) -> Floats:
    """What the sum lacks; nothing where a Relu makes the same of both. Changes `result`."""
    if piece.beside is not None:
        result += piece.beside
    right = (piece.target <= 0) & (result <= 0) if pair.rectified else None
    result -= piece.target
    if right is not None:
        result[right] = 0
    return result


def loss_and_gradients(pair: Pair, parameters: Parameters, piece: Piece) -> tuple[float, Parameters]:
    """Mean over positions of the residual's square, summed over outputs, and its gradients."""
    weight1, bias1, weight2, bias2 = parameters
    read = columns(piece.inputs, pair.first, piece.around_inputs)
    hidden, slope = pair.between(read @ weight1 + bias1)
    seen = columns(hidden, pair.second, piece.around_hidden)
    lacks = residual(pair, seen @ weight2 + bias2, piece)
    outputs = lacks.shape[-1]
    count = max(lacks.size // outputs, 1)
    loss = float(np.square(lacks).sum(dtype=np.float64)) / count
    lacks *= np.float32(2 / count)
    back = slope * spread(lacks, weight2, pair.second, piece.around_hidden, hidden.shape[1:-1])
    flat, back = lacks.reshape(-1, outputs), back.reshape(-1, hidden.shape[-1])
    return loss, [
        read.reshape(-1, len(weight1)).T @ back,
        back.sum(axis=0),
        seen.reshape(-1, len(weight2)).T @ flat,
        flat.sum(axis=0),
    ]


def loss_of(pair: Pair, parameters: Parameters, pools: Sequence[Pool]) -> float:
    """The same loss over whole pools."""
    weight1, bias1, weight2, bias2 = parameters
    total, count = 0.0, 0
    for pool in pools:
        positions = max(math.prod(pool.target.shape[1:-1]), 1)
        step = max(_POSITIONS // positions, 1)
        for start in range(0, len(pool.target), step):
            piece = piece_of(pair, pool, slice(start, start + step), pool.region)
            hidden, _ = pair.between(columns(piece.inputs, pair.first, piece.around_inputs) @ weight1 + bias1)
            seen = columns(hidden, pair.second, piece.around_hidden)
            lacks = residual(pair, seen @ weight2 + bias2, piece)
            total += float(np.square(lacks).sum(dtype=np.float64))
            count += lacks.size // lacks.shape[-1]
    return total / max(count, 1)


def descend(
    pair: Pair,
    start: Parameters,
    pools: Sequence[Pool],
    *,
    steps: int,
    rate: float,
    samples: int,
    edge: int,
    fixed: Sequence[bool],
    seed: int,
) -> Parameters:
    """Adam on both layers, over random samples and random windows of their regions.

    The step of a weight is `rate` of its layer's root mean square at the start, of a bias three times
    that; it falls to 0 along a cosine.

    Args:
        pair: the layers.
        start: their weights and biases; not changed.
        pools: samples.
        steps: how many.
        rate: the first step's size in parts of a weight.
        samples: of each step.
        edge: of the windows.
        fixed: parameters that stay.
        seed: of the choice of samples and windows.

    Source: Kingma and Ba 2015, arXiv:1412.6980, algorithm 1; Loshchilov and Hutter 2017, arXiv:1608.03983,
        eq. 5 (one period).
    """
    rng = np.random.default_rng(seed)
    draws = [_Draws(len(pool.target), samples, rng) for pool in pools]
    sizes = [float(np.sqrt(np.mean(np.square(item, dtype=np.float64)))) for item in start[::2]]
    scales = [sizes[0], 3 * sizes[0], sizes[1], 3 * sizes[1]]
    found = [item.astype(np.float32) for item in start]
    means = [np.zeros_like(item) for item in found]
    squares = [np.zeros_like(item) for item in found]
    for step in range(1, steps + 1):
        place = int(rng.integers(len(pools)))
        chosen = draws[place].next()
        piece = piece_of(pair, pools[place], chosen, _window(pools[place].region, edge, rng))
        _, gradients = loss_and_gradients(pair, found, piece)
        factor = rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        for at, gradient in enumerate(gradients):
            if fixed[at]:
                continue
            means[at] += np.float32(1 - _DECAYS[0]) * (gradient - means[at])
            squares[at] += np.float32(1 - _DECAYS[1]) * (np.square(gradient) - squares[at])
            spreads = np.sqrt(squares[at] / np.float32(1 - _DECAYS[1] ** step)) + np.float32(_TINY)
            length = np.float32(factor * scales[at] / (1 - _DECAYS[0] ** step))
            found[at] -= length * means[at] / spreads
    return found


def _window(
    region: Sequence[tuple[int, int]], edge: int, rng: np.random.Generator
) -> tuple[tuple[int, int], ...]:
    """A window of at most `edge` along each axis, anywhere in a region."""
    found = []
    for low, high in region:
        size = min(edge, high - low)
        first = int(rng.integers(low, high - size + 1))
        found.append((first, first + size))
    return tuple(found)


class _Draws:
    """Samples of a pool, each once before any comes again."""

    def __init__(self, total: int, count: int, rng: np.random.Generator) -> None:
        self._count, self._rng = min(count, total), rng
        self._order = rng.permutation(total)
        self._at = 0

    def next(self) -> Rows:
        if self._at + self._count > len(self._order):
            self._order, self._at = self._rng.permutation(len(self._order)), 0
        self._at += self._count
        return self._order[self._at - self._count : self._at]
