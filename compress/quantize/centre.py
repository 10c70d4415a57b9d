"""Centring activations ahead of dynamic quantization: a smaller range at no cost at run time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...calibration.collect import SPREAD, TYPICAL
from ...graph.edit import Editor, constant, is_constant, only_use, producer, remove_dead
from ...graph.errors import InternalError
from ...graph.model import Model
from ...graph.passes import Outcome, Pass
from ..plan import Decision

ChannelLimits = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
Limits = Mapping[str, ChannelLimits]
"""Tensor name -> (minimum, maximum) per channel, each of shape (channels,)."""

CENTRE = "centre-activations"
"""The name under which a recipe's `fusions` switches it."""

_WORTHWHILE = 0.98
_NORM_INPUTS = 3


class _Readers(NamedTuple):
    """What reads a normalised tensor, and the bias Adds that can take up a shift."""

    products: tuple[tuple[ir.Node, ir.Node], ...]  # (MatMul, its bias Add)
    residuals: tuple[ir.Node, ...]  # bias Adds of the other branch of a residual Add


def centrable(model: Model, decisions: Sequence[Decision]) -> list[str]:
    """Outputs of LayerNormalization that a planned dynamic MatMul reads and that can be centred."""
    planned = {item.node for item in decisions if item.form == "dynamic"}
    names = []
    for node in model.graph:
        if node.op_type != "LayerNormalization" or node.domain:
            continue
        readers = _absorbing_readers(node)
        if isinstance(readers, _Readers) and any(product.name in planned for product, _ in readers.products):
            names.append(str(node.outputs[0].name))
    return names


@dataclasses.dataclass(frozen=True, kw_only=True)
class CentreActivations(Pass):
    """Shift each channel of a LayerNormalization's output so that its calibrated range is centred.

    With m the middle of each channel: the normalization's bias becomes beta - m, the bias behind
    every MatMul that reads it b + m W, and the bias of a residual branch that it is added to b + m.
    The function is the same; the tensor's range, and so its one quantization step, is smaller.
    Left alone where the range would shrink by less than 2 %.

    Source: the zero-shift of Outlier Suppression+, Wei et al. 2023, arXiv:2304.09145, section 4.1.
    """

    limits: Limits

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome = Outcome()
        editor = Editor(model)
        for node in tuple(model.graph):
            if node.op_type != "LayerNormalization" or node.outputs[0].name not in self.limits:
                continue
            readers = _absorbing_readers(node)
            if isinstance(readers, str):
                outcome.refuse(node.name or "", CENTRE, readers)
                continue
            low, high = (np.asarray(side, np.float64) for side in self.limits[str(node.outputs[0].name)])
            before = max(high.max(), 0.0) - min(low.min(), 0.0)
            if (high - low).max() > _WORTHWHILE * before:
                outcome.refuse(node.name or "", CENTRE, "its range would hardly shrink")
                continue
            _shift(node, (low + high) / 2, readers, editor)
            outcome.count(CENTRE)
        if outcome.applied:
            remove_dead(model)
        return outcome


def moved_limits(before: Model, after: Model, limits: Limits) -> dict[str, ChannelLimits]:
    """Limits of the normalizations' outputs as centring left them, from what became of their biases.

    Args:
        before: the model ahead of `CentreActivations`.
        after: the model behind it.
        limits: tensor name (and name + `TYPICAL`, name + `SPREAD`) -> (minimum, maximum), each of
            shape (channels,).
    """
    old, new = (
        {
            str(node.outputs[0].name): node.inputs[2]
            for node in model.graph
            if len(node.inputs) >= _NORM_INPUTS
        }
        for model in (before, after)
    )
    moved = dict(limits)
    for name, bias in old.items():
        first, second = constant(bias), constant(new.get(name))
        if name not in limits or first is None or second is None or first.dtype.kind != "f":
            continue
        shift = np.asarray(second, np.float32) - np.asarray(first, np.float32)
        for key in (name, name + TYPICAL, name + SPREAD):
            if key in limits:
                moved[key] = limits[key][0] + shift, limits[key][1] + shift
    return moved


def _absorbing_readers(node: ir.Node) -> _Readers | str:
    """The readers of a normalization that can take up a shift of its output, or why they cannot."""
    value = node.outputs[0]
    if len(node.inputs) < _NORM_INPUTS or not is_constant(node.inputs[2]):
        return "it has no constant bias"
    if value.is_graph_output() or any(extra.uses() for extra in node.outputs[1:]):
        return "its result leaves the graph, or its statistics are read"
    products, residuals = [], []
    for use in value.uses():
        reader = use.node
        if reader.graph is not node.graph:
            return "the body of a control-flow operator reads it"
        if reader.op_type == "MatMul" and use.idx == 0 and is_constant(reader.inputs[1]):
            biased = only_use(reader.outputs[0])
            if biased is None or not _adds_bias(biased, reader.outputs[0]):
                return "a MatMul that reads it has no bias"
            products.append((reader, biased))
        elif reader.op_type == "Add" and reader.inputs[0] is not reader.inputs[1]:
            other = reader.inputs[1 - use.idx]
            branch = producer(other, "Add")
            if branch is None or only_use(branch.outputs[0]) is not reader or not _bias_place(branch):
                return "a residual branch that it is added to has no bias"
            residuals.append(branch)
        else:
            return f"{reader.op_type} reads it"
    return _Readers(tuple(products), tuple(residuals))


def _bias_place(node: ir.Node) -> tuple[int] | None:
    """The place of the operand of an Add that is a constant vector, in a tuple; None if there is none."""
    for place, operand in enumerate(node.inputs):
        if operand is not None and is_constant(operand) and operand.shape is not None:
            return (place,) if len(operand.shape) == 1 else None
    return None


def _adds_bias(node: ir.Node, product: ir.Value) -> bool:
    return node.op_type == "Add" and not node.domain and product in node.inputs and bool(_bias_place(node))


def _shift(node: ir.Node, middle: npt.NDArray[np.float64], readers: _Readers, editor: Editor) -> None:
    _move(node, 2, -middle, editor)
    for product, biased in readers.products:
        weight = constant(product.inputs[1])
        if weight is None:
            raise InternalError("a weight that was constant is not", where=product.name)
        _move_bias(biased, middle @ weight.astype(np.float64), editor)
    for branch in readers.residuals:
        _move_bias(branch, middle, editor)


def _move_bias(node: ir.Node, shift: npt.NDArray[np.float64], editor: Editor) -> None:
    place = _bias_place(node)
    if place is None:
        raise InternalError("a bias that was to be shifted is gone", where=node.name)
    _move(node, place[0], shift, editor)


def _move(node: ir.Node, place: int, shift: npt.NDArray[np.float64], editor: Editor) -> None:
    """Replace a constant vector operand by itself plus `shift`, in a constant of its own."""
    operand = node.inputs[place]
    values = constant(operand)
    if operand is None or values is None or not isinstance(node.graph, ir.Graph):
        raise InternalError("a bias that was to be shifted is not constant", where=node.name)
    moved = (values.astype(np.float64) + shift).astype(values.dtype)
    node.replace_input_with(place, editor.tensor(ir.tensor(moved), f"{operand.name}.centred", node.graph))
