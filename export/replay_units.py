"""Cutting a quantized graph into the pieces that a runtime turns into integer kernels, each its own model.

A piece ("unit") is what onnxruntime fuses: DequantizeLinear, an operator, what it absorbs and
QuantizeLinear; a product of integers with the scaling behind it; an operator of com.microsoft; or a
lone QuantizeLinear, DequantizeLinear or DynamicQuantizeLinear.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ..compress.audit import INTEGER_OPS
from ..compress.operands import INTEGER_BY_ITSELF_OPS, moves_data
from ..graph.edit import is_constant, only_use, producer
from ..graph.model import Model
from ..graph.save import to_bytes
from ..runtimes.base import Array

QUANTIZING_OPS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_PRODUCTS = frozenset({"MatMulInteger", "ConvInteger"})
_CONTRIB = INTEGER_OPS | {
    "GatherBlockQuantized", "MatMulBnb4", "MatMulInteger16", "QEmbedLayerNormalization", "QMoE",
}  # fmt: skip
_ABSORBED = frozenset({"Relu", "Clip"})
_FLOAT_RESULT = frozenset({"MatMul", "Gemm"})
"""What has an integer kernel that gives floats: no QuantizeLinear need follow."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of a graph.

    Attributes:
        name: of its operator, or of the tensor that it makes where that has no name.
        operator: what it computes.
        nodes: in graph order.
        inputs: tensors that it reads from outside.
        outputs: tensors that it gives.
        moves: whether it only moves data.
    """

    name: str
    operator: str
    moves: bool
    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitModel:
    """A unit as a model: inputs i0, i1, …, outputs o0, o1, …; units that are equal share one.

    Attributes:
        name: of the first unit.
        operator: what it computes.
        data: the serialised model, weights inside.
        places: names of all units that are this model.
        inputs: place -> the tensors of the whole graph that feed i0, i1, … there.
        unit: the first of them.
    """

    name: str
    operator: str
    data: bytes
    unit: Unit
    places: tuple[str, ...]
    inputs: tuple[tuple[str, ...], ...]


def is_integer_kernel(operators: Iterable[str]) -> bool:
    """Whether the kernels that ran for a unit compute in integers, or only quantize and dequantize."""
    names = set(operators)
    return any(is_integer_operator(name) for name in names) or (bool(names) and names <= QUANTIZING_OPS)


def is_integer_operator(name: str) -> bool:
    """Whether an operator of the runtime computes with integers."""
    return name in _CONTRIB or name.startswith(("QLinear", "QOrdered"))


def cut_units(model: Model) -> tuple[Unit, ...]:
    """Every unit of the main graph, in graph order; If, Loop and Scan bodies are not looked into.

    Args:
        model: a graph with Q/DQ pairs or integer operators.
    """
    order = {id(node): place for place, node in enumerate(model.graph)}
    found: list[list[ir.Node]] = []
    for node in model.graph:
        if node.op_type in _PRODUCTS and not node.domain:
            found.append(_product(node))
        elif is_integer_operator(node.op_type):
            found.append([node])
        elif _may_be_integer(node):
            found.extend(filter(None, [_between(node)]))
    around: dict[int, set[int]] = {}
    for nodes in found:
        for node in nodes:
            around.setdefault(id(node), set()).update(id(other) for other in nodes)
    for node in model.graph:
        if node.op_type in QUANTIZING_OPS and not node.domain and _stands_alone(node, around):
            found.append([node])
    units = [_unit(nodes[0], nodes, order) for nodes in found]
    return tuple(sorted(units, key=lambda unit: order[id(unit.nodes[-1])]))


def in_bodies(model: Model) -> int:
    """How many quantized operators stand in If, Loop and Scan bodies, which are not cut."""
    return sum(
        is_integer_operator(node.op_type) or node.op_type in QUANTIZING_OPS
        for graph in model.graph.subgraphs()
        for node in graph
    )


def unit_models(
    units: Sequence[Unit], recorded: Mapping[str, Array], opsets: Mapping[str, int], source: Model
) -> tuple[UnitModel, ...]:
    """Units as models of their own, equal ones once.

    Args:
        units: of one graph.
        recorded: one array for every tensor that a unit reads, for its type and rank.
        opsets: operator sets of the graph.
        source: the graph's model, for its origin and the version of its file format.
    """
    made: dict[str, UnitModel] = {}
    for unit in units:
        data = _serialised(unit, recorded, opsets, source)
        key = hashlib.sha256(data).hexdigest()
        known = made.get(key)
        inputs = tuple(str(value.name) for value in unit.inputs)
        made[key] = UnitModel(
            name=unit.name if known is None else known.name,
            operator=unit.operator,
            data=data,
            unit=unit if known is None else known.unit,
            places=(*(known.places if known else ()), unit.name),
            inputs=(*(known.inputs if known else ()), inputs),
        )
    return tuple(made.values())


def _product(node: ir.Node) -> list[ir.Node]:
    """A product of integers with what scales it: Cast, Mul (and the Mul that makes the factor), Add."""
    nodes, value = [node], node.outputs[0]
    reader = only_use(value)
    if reader is not None and reader.op_type == "Cast":
        nodes.append(reader)
        reader = only_use(reader.outputs[0])
        while reader is not None and reader.op_type == "Mul":
            factors = [producer(other, "Mul") for other in reader.inputs if other is not nodes[-1].outputs[0]]
            nodes += [made for made in factors if made is not None and _only_scales(made)]
            nodes.append(reader)
            reader = only_use(reader.outputs[0])
        if len(nodes) > 2 and reader is not None and reader.op_type == "Add" and _has_constant(reader):
            nodes.append(reader)
    maker = producer(node.inputs[0], "DynamicQuantizeLinear")
    inside = {id(item) for item in nodes}
    if maker is not None and all(id(use.node) in inside for out in maker.outputs for use in out.uses()):
        nodes.append(maker)
    return nodes


def _only_scales(node: ir.Node) -> bool:
    """Whether a Mul makes one scale of others, for a single product."""
    return only_use(node.outputs[0]) is not None and all(
        is_constant(value) or producer(value, "DynamicQuantizeLinear") is not None for value in node.inputs
    )


def _has_constant(node: ir.Node) -> bool:
    return any(_is_constant_or_dequantized(value) for value in node.inputs)


def _may_be_integer(node: ir.Node) -> bool:
    return not node.domain and (node.op_type in INTEGER_BY_ITSELF_OPS or moves_data(node))


def _between(node: ir.Node) -> list[ir.Node] | None:
    """A node with the DequantizeLinear in front of it and what it absorbs; None if it has none in front."""
    if moves_data(node):
        return _moved(node)
    places = node.inputs[1:] if node.op_type == "Where" else node.inputs
    nodes, dequantized = [node], False
    for value in places:
        if value is None or is_constant(value):
            continue
        front = _front(value)
        if front is None:
            return None
        nodes += [item for item in front if item not in nodes]
        dequantized = dequantized or not is_constant(front[-1].inputs[0])
    behind = _behind(node)
    into_integers = any(item.op_type == "QuantizeLinear" for item in behind)
    if not dequantized or not (into_integers or node.op_type in _FLOAT_RESULT):
        return None
    return [*nodes, *behind]


def _moved(node: ir.Node) -> list[ir.Node] | None:
    """A move of data between DequantizeLinear and QuantizeLinear that no computing operator reads."""
    front = producer(node.inputs[0], "DequantizeLinear")
    behind = [use.node for out in node.outputs for use in out.uses()]
    if front is None or not behind or any(reader.op_type != "QuantizeLinear" for reader in behind):
        return None
    if is_constant(front.inputs[0]) or any(out.is_graph_output() for out in node.outputs):
        return None
    return [node, front, *dict.fromkeys(behind)]


def _front(value: ir.Value) -> list[ir.Node] | None:
    """The moves of data above a value and the DequantizeLinear above them; None if there is none."""
    nodes: list[ir.Node] = []
    maker = value.producer()
    while maker is not None and moves_data(maker) and len(maker.outputs) == 1:
        nodes.append(maker)
        maker = None if maker.inputs[0] is None else maker.inputs[0].producer()
    if maker is None or maker.op_type != "DequantizeLinear" or maker.domain:
        return None
    return [*nodes, maker]


def _behind(node: ir.Node) -> list[ir.Node]:
    """What a kernel absorbs behind a node: a product's bias, an activation, moves, QuantizeLinear."""
    nodes: list[ir.Node] = []
    value = node.outputs[0]
    reader = only_use(value)
    if node.op_type == "MatMul" and reader is not None and reader.op_type == "Add" and _has_constant(reader):
        nodes += [reader, *_constant_fronts(reader)]
        value = reader.outputs[0]
        reader = only_use(value)
    pending: list[ir.Node] = []
    while reader is not None and (reader.op_type in _ABSORBED or moves_data(reader)) and not reader.domain:
        if len(reader.outputs) != 1:
            break
        pending.append(reader)
        value = reader.outputs[0]
        reader = only_use(value)
    readers = list(dict.fromkeys(use.node for use in value.uses()))
    if value.is_graph_output() or not readers or any(item.op_type != "QuantizeLinear" for item in readers):
        return nodes
    return [*nodes, *pending, *readers]


def _constant_fronts(node: ir.Node) -> list[ir.Node]:
    fronts = (producer(value, "DequantizeLinear") for value in node.inputs)
    return [front for front in fronts if front is not None and is_constant(front.inputs[0])]


def _is_constant_or_dequantized(value: ir.Value | None) -> bool:
    front = producer(value, "DequantizeLinear")
    return is_constant(value) or (front is not None and is_constant(front.inputs[0]))


def _stands_alone(node: ir.Node, around: Mapping[int, set[int]]) -> bool:
    """Whether a quantizing node is in no unit, or feeds something outside of those that it is in."""
    if is_constant(node.inputs[0]):
        return False
    inside = around.get(id(node))
    if inside is None:
        return True
    if node.op_type == "QuantizeLinear":
        return False
    return any(id(use.node) not in inside for out in node.outputs for use in out.uses())


def _unit(head: ir.Node, nodes: Sequence[ir.Node], order: Mapping[int, int]) -> Unit:
    inside = {id(node) for node in nodes}
    ordered = sorted({id(node): node for node in nodes}.values(), key=lambda node: order[id(node)])
    made = {id(value) for node in ordered for value in node.outputs}
    inputs = {
        id(value): value
        for node in ordered
        for value in node.inputs
        if value is not None and id(value) not in made and not is_constant(value)
    }
    outputs = [
        value
        for node in ordered
        for value in node.outputs
        if (value.is_graph_output() or any(id(use.node) not in inside for use in value.uses()))
        and not _is_shared_front(node, ordered)
    ]
    return Unit(
        name=head.name or str(head.outputs[0].name),
        operator=head.op_type,
        moves=head.op_type not in QUANTIZING_OPS and moves_data(head),
        nodes=tuple(ordered),
        inputs=tuple(inputs.values()),
        outputs=tuple(outputs),
    )


def _is_shared_front(node: ir.Node, nodes: Sequence[ir.Node]) -> bool:
    """Whether a node only prepares the operands of others; the runtime copies it for each of its readers."""
    prepares = node.op_type in ("DequantizeLinear", "Mul") or moves_data(node)
    if len(nodes) == 1 or not prepares:
        return False
    inside = {id(item) for item in nodes}
    return any(id(use.node) in inside for out in node.outputs for use in out.uses())


def _serialised(unit: Unit, recorded: Mapping[str, Array], opsets: Mapping[str, int], source: Model) -> bytes:
    values = {
        id(value): _input(f"i{index}", value, recorded[str(value.name)])
        for index, value in enumerate(unit.inputs)
    }
    inputs, weights = list(values.values()), _Weights(values)
    results = {id(value): f"o{index}" for index, value in enumerate(unit.outputs)}
    nodes = []
    for place, node in enumerate(unit.nodes):
        given = [
            None if value is None else values.get(id(value)) or weights.add(value) for value in node.inputs
        ]
        outputs: list[ir.Value] = []
        for value in node.outputs:
            name = results.get(id(value), f"v{place}_{len(outputs)}")
            values[id(value)] = ir.Value(name=name, type=value.type)
            outputs.append(values[id(value)])
        attributes = list(node.attributes.values())
        nodes.append(ir.Node(node.domain, node.op_type, given, attributes, outputs=outputs, name=f"n{place}"))
    domains = {node.domain for node in nodes}
    graph = ir.Graph(
        inputs,
        [values[id(value)] for value in unit.outputs],
        nodes=nodes,
        initializers=weights.made,
        opset_imports={domain: opsets.get(domain, 1) for domain in sorted(domains | {""})},
        name="unit",
    )
    return to_bytes(Model(ir.Model(graph, ir_version=source.ir.ir_version), origin=source.origin))


class _Weights:
    """Constants of a unit under names of its own, each once."""

    def __init__(self, values: dict[int, ir.Value]) -> None:
        self.made: list[ir.Value] = []
        self._values = values

    def add(self, value: ir.Value) -> ir.Value:
        """The unit's value for a constant of the graph."""
        weight = ir.Value(
            name=f"w{len(self.made)}", type=value.type, shape=value.shape, const_value=value.const_value
        )
        self._values[id(value)] = weight
        self.made.append(weight)
        return weight


def _input(name: str, value: ir.Value, array: Array) -> ir.Value:
    kind = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    return ir.Value(name=name, type=kind, shape=_shape(value, array))


def _shape(value: ir.Value, array: Array) -> ir.Shape:
    """The tensor's shape as the graph knows it; its rank alone where it knows less."""
    known = list(value.shape) if value.shape is not None and len(value.shape) == array.ndim else None
    if known is None:
        return ir.Shape([None] * array.ndim)
    fits = [
        dim if isinstance(dim, int) and dim == size else None
        for dim, size in zip(known, np.shape(array), strict=True)
    ]
    return ir.Shape(fits)
