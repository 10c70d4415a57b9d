"""Which tensors of a static plan get a Q/DQ pair, and which of them share one scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...graph.edit import constant, only_use, operand, producer, scalar
from ...graph.model import Model
from ...graph.scheme import Scheme
from ..operands import data_operands, has_float_output, moves_data, output_tail
from ..plan import Decision

_NEVER_NEGATIVE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Softmax"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Which tensors get a Q/DQ pair.

    `source` maps each such tensor's name to the one whose range it shares: operators that only
    move data keep scale and zero point. `activation` is the scheme of all of them. `rerouted`
    are tensors made by integer operators: every reader takes the dequantized value.
    """

    source: dict[str, str]
    rerouted: frozenset[str]
    activation: Scheme | None

    @property
    def observed(self) -> tuple[str, ...]:
        """Names of the tensors whose ranges calibration must find, in graph order."""
        return tuple(dict.fromkeys(self.source.values()))


def static_layout(model: Model, decisions: Sequence[Decision]) -> Layout:
    """Place Q/DQ pairs for the nodes that are planned static.

    Inputs of every planned node are quantized; so are their outputs, behind a Relu or Clip that the
    runtime absorbs. A MatMul's output stays float (see `has_float_output`) unless a planned node
    reads it. Where pooling, reshaping, slicing… stand between, all tensors on the way share one
    range; what only a Concat reads shares the range of its result. Everything else, the mask of an
    attention above all, is never quantized.
    """
    planned = {item.node: item for item in decisions if item.form == "static"}
    wanted: dict[str, ir.Value] = {}
    rerouted: set[str] = set()
    for node in model.graph:
        if (node.name or "") not in planned:
            continue
        for value in data_operands(node):
            wanted.setdefault(str(value.name), value)
        tail = output_tail(node)
        if not has_float_output(node):
            wanted.setdefault(str(tail.name), tail)
            rerouted.add(str(tail.name))
    source: dict[str, str] = {}
    for name, value in wanted.items():
        owner, way = _way_from_owner(value, wanted)
        source[name] = str(owner.name)
        for moved in way:
            source[str(moved.name)] = str(owner.name)
            rerouted.add(str(moved.name))
    joined = _joined(model, planned, source)
    source = {name: _end(owner, joined) for name, owner in source.items()}
    scheme = next((item.activation for item in planned.values() if item.activation is not None), None)
    return Layout(source=source, rerouted=frozenset(rerouted), activation=scheme)


def _way_from_owner(value: ir.Value, wanted: Mapping[str, ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
    """The uppermost quantized tensor that `value` is moved from, and every tensor moved on the way."""
    owner, way, seen = value, [], list[ir.Value]()
    for node in _movers_above(value):
        seen.extend(node.outputs)
        above = node.inputs[0]
        if above is not None and str(above.name) in wanted:
            owner, way = above, list(seen)
    return owner, [moved for moved in way if moved.uses() or moved.is_graph_output()]


def _movers_above(value: ir.Value) -> Iterator[ir.Node]:
    node = value.producer()
    while node is not None and moves_data(node) and node.inputs[0] is not None:
        yield node
        node = node.inputs[0].producer()


def _joined(model: Model, planned: Mapping[str, Decision], source: Mapping[str, str]) -> dict[str, str]:
    """Range owners that only a planned Concat reads -> its result, at whose scale they are made at once.

    Two roundings become one, and the runtime copies instead of rescaling. A Relu or Clip in front
    is absorbed only where the lowest integer is its lower limit: see `_stays_absorbed`.
    """
    joined: dict[str, str] = {}
    for node in model.graph:
        if node.op_type != "Concat" or (node.name or "") not in planned:
            continue
        result = str(output_tail(node).name)
        for value in data_operands(node):
            root: ir.Value | None = value
            for mover in _movers_above(value):
                if root is None or only_use(root) is None:
                    break
                root = mover.inputs[0]
            if root is None or source.get(str(root.name)) != root.name or only_use(root) is None:
                continue
            if source.get(str(value.name)) == root.name and _is_made_to_scale(root, node, planned):
                joined[str(root.name)] = result
    return joined


def _is_made_to_scale(value: ir.Value, concat: ir.Node, planned: Mapping[str, Decision]) -> bool:
    """Whether a planned node makes a value, and could do so at the scale of the Concat's result."""
    maker = producer(value)
    if maker is None:
        return False
    if (maker.name or "") in planned and maker.op_type not in ("Relu", "HardSigmoid"):
        return True
    if maker.op_type != "Relu" or maker.inputs[0] is None:
        return False
    above = producer(maker.inputs[0])
    if above is None or (above.name or "") not in planned or output_tail(above) is not value:
        return False
    return all(_is_never_negative(other) for other in concat.inputs)


def _is_never_negative(value: ir.Value | None) -> bool:
    known = constant(value)
    if known is not None:
        return bool((np.asarray(known, np.float64) >= 0).all())
    node = producer(value)
    if node is None:
        return False
    if node.op_type == "Clip":
        low = scalar(operand(node, 1))
        return low is not None and low >= 0
    if node.op_type == "Concat":
        return all(_is_never_negative(item) for item in node.inputs)
    return node.op_type in _NEVER_NEGATIVE or (moves_data(node) and _is_never_negative(node.inputs[0]))


def _end(name: str, joined: Mapping[str, str]) -> str:
    while name in joined:
        name = joined[name]
    return name
