"""Cross-layer equalization: every channel uses more of the one range that its tensor has."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...calibration.collect import Progress, stream_tensors
from ...graph.edit import constant, operand
from ...graph.errors import InternalError
from ...graph.model import Model
from ...graph.passes import Outcome, Pass
from ..plan import Decision
from ..quantize.constants import WEIGHTED
from ..quantize.layout import static_layout
from .channels import ChannelTies
from .patches import as_rows, from_rows

if TYPE_CHECKING:
    from ...calibration.data import CalibrationData
    from ...runtimes.base import SessionOptions

EQUALIZE = "equalize-channels"
"""The name under which a recipe's `fusions` switches it."""

_LEAST_SHARE = 0.05
_EXPONENT = 0.5

Magnitudes = Mapping[str, npt.NDArray[np.float32]]
"""Tensor name -> the largest magnitude of each channel (axis 1), shape (channels,)."""
Floats = npt.NDArray[np.float64]


def equalizable(model: Model, decisions: Sequence[Decision]) -> list[str]:
    """The tensors that a static plan quantizes and whose channels can be scaled against each other."""
    observed = static_layout(model, decisions).observed
    ties = ChannelTies(model)
    named = {value.name: value for value in ties.tensors()}
    found = []
    for name in observed:
        labels = ties.of(named.get(name))
        if labels is not None and (labels >= 0).sum() > 1:
            found.append(name)
    return found


def collect_magnitudes(
    model: Model,
    names: Sequence[str],
    data: CalibrationData,
    *,
    options: SessionOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, npt.NDArray[np.float32]]:
    """The largest magnitude of every channel (axis 1) of tensors over the data: name -> (channels,)."""
    found: dict[str, npt.NDArray[np.float32]] = {}
    for name, values in stream_tensors(model, names, data, options=options, progress=progress):
        largest = np.abs(values).max(axis=(0, *range(2, values.ndim))).astype(np.float32)
        found[name] = np.maximum(found[name], largest) if name in found else largest
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class EqualizeChannels(Pass):
    """Divide channels by factors in the layer that makes them, and multiply in the layers that read them.

    Channels tied by Relu, Add, pooling, Pad, Slice and Concat carry one factor, so that a residual stream is
    scaled as one, or (without `shared`) not at all: what suits one tensor of a stream costs the others
    (ResNet-20: the logits' error grew by 3 % with one factor for all, and fell by 2 % without). The factor
    is the square root of the channel's largest magnitude beside its tensor's (the largest over the tensors
    of the tie, and at least 1/20): half way between untouched weights and equal ranges, as weights are
    quantized too. The function stays the same, but for float rounding.

    Source: Nagel et al. 2019, arXiv:1906.04721, section 4.1, equations 8 and 9, on measured ranges.
    """

    magnitudes: Magnitudes = dataclasses.field(repr=False)
    shared: bool = True

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome, ties = Outcome(), ChannelTies(model)
        factors = _factors(ties, self.magnitudes, self.shared)
        changes = [(node, *found) for node in model.graph if (found := _scales(node, ties, factors))]
        for node, reads, makes in changes:
            _rescale(node, reads, makes)
            outcome.count(EQUALIZE)
        return outcome


def _factors(ties: ChannelTies, magnitudes: Magnitudes, shared: bool) -> dict[int, float]:
    """Class of channels -> its factor, in (0, 1]; `shared`: of those that are in several tensors, too."""
    shares: dict[int, float] = {}
    tensors = collections.Counter[int]()
    for value in ties.tensors():
        largest = magnitudes.get(str(value.name))
        labels = None if largest is None else ties.of(value)
        if largest is None or labels is None or not np.isfinite(largest).all() or not largest.max() > 0:
            continue
        tensors.update({int(label) for label in labels})
        for label, share in zip(labels, largest / largest.max(), strict=True):
            if label >= 0:
                shares[int(label)] = max(shares.get(int(label), 0.0), float(share))
    return {
        label: max(share, _LEAST_SHARE) ** _EXPONENT
        for label, share in shares.items()
        if shared or tensors[label] == 1
    }


def _scales(node: ir.Node, ties: ChannelTies, factors: Mapping[int, float]) -> tuple[Floats, Floats] | None:
    """Factors of what a weighted node reads and makes, per channel; None if nothing changes."""
    if node.op_type not in WEIGHTED or node.domain:
        return None
    sides = []
    for value in (node.inputs[0], node.outputs[0]):
        labels = ties.of(value)
        known = [] if labels is None else [factors.get(int(label), 1.0) for label in labels]
        sides.append(np.array(known))
    if all((side == 1.0).all() for side in sides):
        return None
    return sides[0], sides[1]


def _rescale(node: ir.Node, reads: Floats, makes: Floats) -> None:
    weight, bias = node.inputs[1], operand(node, 2)
    values = constant(weight)
    rows = None if values is None else as_rows(node, values.astype(np.float64))
    if weight is None or values is None or rows is None:
        raise InternalError("a layer whose channels are tied has no constant weight", where=node.name)
    groups, outputs, inputs = rows.shape
    if reads.size:
        per_group = reads.reshape(groups, -1)
        rows = rows * np.repeat(per_group, inputs // per_group.shape[1], axis=1)[:, None, :]
    if makes.size:
        rows = rows / makes.reshape(groups, outputs, 1)
    made = from_rows(node, rows, values.shape).astype(values.dtype)
    # Nothing else reads them (see `ChannelTies`), so they keep their names.
    weight.const_value = ir.tensor(made, name=weight.name)
    added = constant(bias)
    if bias is not None and added is not None and makes.size:
        moved = np.broadcast_to(added.astype(np.float64).reshape(-1), makes.shape) / makes
        bias.const_value = ir.tensor(moved.astype(added.dtype), name=bias.name)
        bias.shape = ir.Shape(moved.shape)
