"""Learned rounding: weights rounded against the inputs that calibration shows, without labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...calibration.collect import Progress, stream_tensors
from ...graph.edit import constant, is_constant, operand
from ...graph.model import Model
from ...graph.scheme import Scheme
from ..operands import channel_axis
from ..plan import Decision
from ..quantize.constants import WEIGHTED, Rounded
from ..quantize.weights import weight_integers, weight_scale
from .patches import Window, as_rows, columns_of, from_rows, window_of
from .rounding import output_error, round_weight

if TYPE_CHECKING:
    from ...calibration.data import CalibrationData
    from ...runtimes.base import SessionOptions

LEARNED_ROUNDING = "learned-rounding"
"""The name under which a recipe's `fusions` switches it."""

LARGEST_INPUTS = 2304
"""Inputs of one output (256 channels under a 3x3 kernel) above which a layer keeps the nearest integers:
X Xᵀ has the square of it, and its inverse costs the cube."""
_SUMS_BYTES = 128 * 2**20
_RESULT_BYTES = 256 * 2**20
_COLUMNS_PER_INPUT = 32


class Layer(NamedTuple):
    """A node whose weight is rounded: what it reads, its scheme, its geometry and its weight as rows."""

    node: ir.Node
    scheme: Scheme
    reads: str
    window: Window | None
    groups: int
    outputs: int
    inputs: int

    @property
    def sums_bytes(self) -> int:
        """Bytes of its X Xᵀ."""
        return 8 * self.groups * (self.inputs + 1) ** 2


def learnable(model: Model, decisions: Sequence[Decision]) -> list[Layer]:
    """The planned layers whose weight can be rounded on recorded inputs, in graph order.

    Left out are weights that several nodes read, layers of more than `LARGEST_INPUTS` inputs an output,
    nodes in the bodies of control flow, and all that would pass 256 MB of integers.
    """
    planned = {item.node: item for item in decisions if item.form in ("static", "dynamic")}
    layers, used = [], 0
    for node in model.graph:
        decision = planned.get(node.name or "")
        if decision is None or decision.weight_scheme is None or node.op_type not in WEIGHTED or node.domain:
            continue
        layer = _layer(node, decision.weight_scheme)
        size = 0 if layer is None else layer.groups * layer.outputs * layer.inputs
        if layer is not None and used + size <= _RESULT_BYTES:
            layers.append(layer)
            used += size
    return layers


def _layer(node: ir.Node, scheme: Scheme) -> Layer | None:
    data, weight, bias = node.inputs[0], node.inputs[1], operand(node, 2)
    values = constant(weight) if is_constant(weight) else None
    if data is None or weight is None or values is None or len(tuple(weight.uses())) > 1:
        return None
    if bias is not None and not is_constant(bias):
        return None
    rows = as_rows(node, np.asarray(values, np.float32))
    if rows is None or rows.shape[2] > LARGEST_INPUTS or scheme.axis not in (None, channel_axis(node)):
        return None
    window = window_of(node, values.shape) if node.op_type == "Conv" else None
    if node.op_type == "Conv" and window is None:
        return None
    return Layer(node, scheme, str(data.name), window, *rows.shape)


def learn_rounding(
    model: Model,
    decisions: Sequence[Decision],
    data: CalibrationData,
    *,
    options: SessionOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Rounded]:
    """Round the weights of planned layers so that their outputs change least on the data.

    The float model's inputs of every layer are streamed; kept of them is X Xᵀ alone, of so many layers at
    a time as fit 128 MB, from about 32 columns for every input of an output.

    Returns:
        Node name -> integers, scales and the bias that fits them; only layers that it brings nearer.

    Source: layer-wise reconstruction as Nagel et al. 2020, arXiv:2004.10568, section 3.3; solved in
    closed form as Frantar et al. 2022, arXiv:2210.17323.
    """
    layers, found = learnable(model, decisions), dict[str, Rounded]()
    parts = list(_parts(layers))
    done = 0

    def advance(step: int, _total: int) -> None:
        if progress is not None:
            progress(done + min(step, len(data)), len(data) * len(parts))

    for part in parts:
        sums = _sums(model, part, data, options, advance)
        for layer in part:
            rounded = _rounded(layer, sums.pop(layer.node.name or ""))
            if rounded is not None:
                found[str(layer.node.name)] = rounded
        done += len(data)
    return found


def _parts(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Layers in order, as many together as the memory for their sums allows."""
    part, used = list[Layer](), 0
    for layer in layers:
        if part and used + layer.sums_bytes > _SUMS_BYTES:
            yield part
            part, used = [], 0
        part.append(layer)
        used += layer.sums_bytes
    if part:
        yield part


def _sums(
    model: Model,
    layers: Sequence[Layer],
    data: CalibrationData,
    options: SessionOptions | None,
    progress: Progress,
) -> dict[str, npt.NDArray[np.float64]]:
    """X Xᵀ of every layer, X with a row of ones below: node name -> (groups, inputs + 1, inputs + 1)."""
    readers: dict[str, list[Layer]] = {}
    for layer in layers:
        readers.setdefault(layer.reads, []).append(layer)
    sums = {str(layer.node.name): _Sum(layer.groups, layer.inputs) for layer in layers}
    seen = dict.fromkeys(readers, 0)
    for name, values in stream_tensors(model, list(readers), data, options=options, progress=progress):
        for layer in readers[name]:
            every = _every(layer, values, len(data))
            # The first position moves from sample to sample, so that all are looked at in turn.
            columns = columns_of(values, layer.window, every, seen[name] % every)
            sums[str(layer.node.name)].add(columns.astype(np.float32))
        seen[name] += 1
    return {name: item.total() for name, item in sums.items()}


class _Sum:
    """X Xᵀ over columns (groups, inputs, n) that come piece by piece, X with a row of ones below."""

    def __init__(self, groups: int, inputs: int) -> None:
        self._total = np.zeros((groups, inputs + 1, inputs + 1))
        self._waiting: list[npt.NDArray[np.float32]] = []
        self._columns = 0

    def add(self, columns: npt.NDArray[np.float32]) -> None:
        # One product of many columns costs far less than many of few.
        self._waiting.append(columns)
        self._columns += columns.shape[2]
        if self._columns >= 4 * columns.shape[1]:
            self._flush()

    def total(self) -> npt.NDArray[np.float64]:
        self._flush()
        return self._total

    def _flush(self) -> None:
        if not self._waiting:
            return
        ones = np.ones((self._total.shape[0], 1, self._columns), np.float32)
        extended = np.concatenate([np.concatenate(self._waiting, axis=2), ones], axis=1)
        self._total += extended @ extended.transpose(0, 2, 1)
        self._waiting, self._columns = [], 0


def _every(layer: Layer, values: npt.NDArray[np.generic], samples: int) -> int:
    """How sparsely positions are taken so that about `_COLUMNS_PER_INPUT` columns an input come together."""
    wanted = _COLUMNS_PER_INPUT * (layer.inputs + 1)
    if layer.window is None:
        rows = math.prod(values.shape[:-1])
        return max(rows * samples // len(values) // wanted, 1) if rows else 1
    axes = len(layer.window.kernel)
    positions = math.prod(values.shape[2:]) // math.prod(layer.window.strides)
    sparse = int(float(positions * samples / wanted) ** (1.0 / axes))
    smallest: int = min(
        size // stride for size, stride in zip(values.shape[2:], layer.window.strides, strict=True)
    )
    return max(min(sparse, smallest), 1)


def _rounded(layer: Layer, sums: npt.NDArray[np.float64]) -> Rounded | None:
    """The learned integers of one layer; None where the nearest ones are as good on the data."""
    weight = np.asarray(constant(layer.node.inputs[1]), np.float32)
    scale = weight_scale(weight, layer.scheme)
    rows = as_rows(layer.node, weight.astype(np.float64))
    nearest = as_rows(layer.node, weight_integers(weight, scale, layer.scheme).astype(np.float64))
    bias = constant(operand(layer.node, 2))
    if rows is None or nearest is None:
        return None
    shape = (layer.groups, layer.outputs)
    flat = (
        np.zeros(shape) if bias is None else np.broadcast_to(np.float64(bias).reshape(-1), math.prod(shape))
    )
    real = np.concatenate([rows, flat.reshape(*shape, 1)], axis=2)
    steps = np.broadcast_to(scale.astype(np.float64), math.prod(shape)).reshape(shape)
    integers, biases = np.empty(rows.shape, np.int8), np.empty(shape)
    before = after = 0.0
    for group in range(layer.groups):
        unit = steps[group][:, None]
        integers[group], biases[group] = round_weight(
            real[group], _bias_free(sums[group], bias is None), steps[group], layer.scheme.limits
        )
        if bias is None:
            biases[group] = 0.0
        change = np.concatenate([integers[group] * unit, biases[group][:, None]], axis=1) - real[group]
        after += output_error(change, sums[group])
        plain = np.concatenate([nearest[group] * unit, flat.reshape(shape)[group][:, None]], axis=1)
        before += output_error(plain - real[group], sums[group])
    if not after < before:
        return None
    return Rounded(
        integers=from_rows(layer.node, integers, weight.shape),
        scale=scale,
        bias=None if bias is None else biases.reshape(-1),
    )


def _bias_free(sums: npt.NDArray[np.float64], without: bool) -> npt.NDArray[np.float64]:
    """The sums with the row of ones cut off from the others, where a layer has no bias to move."""
    if not without:
        return sums
    cut = sums.copy()
    cut[-1, :-1] = cut[:-1, -1] = 0.0
    return cut
