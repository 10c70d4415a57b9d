"""Weights that a graph cuts and joins anew when it loads: joined here, once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from .edit import Editor, integers, is_constant, operand, remove_dead
from .model import Model
from .passes import Outcome, Pass
from .weights import MappedTensor

_MOVES = frozenset({"Concat", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"})
# Sizes and axes; data begins above.
_PARAMETER_ELEMENTS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldMovedWeights(Pass):
    """Slice, Concat, Reshape… of weights alone -> the weights in the form that is read.

    Taken only where that makes the model no larger. torch's exporter reorders the gates of recurrent
    weights in this way. The new tensor is computed when it is read, so that large models stay on disk.
    """

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome = Outcome()
        editor = Editor(model)
        renamed: list[tuple[ir.Value, str]] = []
        for graph in tuple(model.all_graphs()):
            for region in _regions(graph):
                if _is_gain(region):
                    results = region.results
                    renamed += [_replace(value, region, editor, graph) for value in results]
                    outcome.count("moved-weight", len(results))
        if outcome.applied:
            remove_dead(model)
        for value, name in renamed:
            _rename(value, name)
        return outcome


@dataclasses.dataclass(kw_only=True)
class _Region:
    """Moving nodes that hang together, in order, the weights they move and what others read of them."""

    nodes: list[ir.Node]
    weights: set[ir.Value]

    @property
    def results(self) -> list[ir.Value]:
        own = set(self.nodes)
        return [
            value
            for node in self.nodes
            for value in node.outputs
            if value.is_graph_output() or any(use.node not in own for use in value.uses())
        ]


def _regions(graph: ir.Graph) -> list[_Region]:
    """The regions of one graph: nodes are together if one reads the other, or both the same weight."""
    parents: dict[ir.Value, ir.Value] = {}

    def root(value: ir.Value) -> ir.Value:
        while parents[value] is not value:
            parents[value] = value = parents[parents[value]]
        return value

    moving = []
    for node in graph:
        data = _moved(node)
        if not data or not all(value in parents or _is_weight(value, graph) for value in data):
            continue
        moving.append((node, data))
        for value in (*data, *node.outputs):
            parents.setdefault(value, value)
            parents[root(value)] = root(data[0])
    regions: dict[ir.Value, _Region] = {}
    for node, data in moving:
        region = regions.setdefault(root(data[0]), _Region(nodes=[], weights=set()))
        region.nodes.append(node)
        region.weights.update(value for value in data if is_constant(value))
    return list(regions.values())


def _moved(node: ir.Node) -> list[ir.Value]:
    """What a node moves; empty if it does something else, or its sizes are computed."""
    if node.op_type not in _MOVES or node.domain:
        return []
    operands = [value for value in node.inputs if value is not None]
    steps = integers(operand(node, 4)) if node.op_type == "Slice" else None
    if steps is not None and min(steps, default=1) < 0:
        return []  # the reference and the runtime disagree on ends beyond the axis
    if node.op_type != "Concat" and not all(_is_parameter(value) for value in operands[1:]):
        return []
    return [value for value in operands if not _is_parameter(value)]


def _is_parameter(value: ir.Value) -> bool:
    tensor = value.const_value
    return (
        tensor is not None
        and is_constant(value)
        and tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32)
        and tensor.size <= _PARAMETER_ELEMENTS
    )


def _is_weight(value: ir.Value, graph: ir.Graph) -> bool:
    tensor = value.const_value
    return (
        tensor is not None
        and is_constant(value)
        and value.graph is graph
        and tensor.dtype != ir.DataType.STRING
    )


def _is_gain(region: _Region) -> bool:
    """Whether the results take no more bytes than the weights that nobody needs any more."""
    own, needed = set(region.nodes), 0.0
    for value in region.results:
        if value.is_graph_output() or value.shape is None or value.dtype is None:
            return False
        if not all(isinstance(size, int) for size in value.shape):
            return False
        needed += int(np.prod(value.shape.numpy(), dtype=np.int64)) * value.dtype.itemsize
    freed = sum(
        weight.const_value.nbytes
        for weight in region.weights
        if weight.const_value is not None
        and not weight.is_graph_output()
        and all(use.node in own for use in weight.uses())
    )
    return bool(region.results) and needed <= freed


def _replace(value: ir.Value, region: _Region, editor: Editor, graph: ir.Graph) -> tuple[ir.Value, str]:
    """Put a weight in the place of a region's result; also the name it should have once that is free."""
    nodes = _needed(value, region.nodes)
    sources = list(
        dict.fromkeys(v for node in nodes for v in node.inputs if v is not None and is_constant(v))
    )
    evaluator = _evaluator(nodes, sources, value, editor.model)
    tensors = {source.name or "": source.const_value for source in sources}
    dtype, shape = value.dtype, value.shape
    assert dtype is not None
    assert shape is not None

    def compute() -> ir.TensorProtocol:
        arrays = {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}
        (found,) = ReferenceEvaluator(evaluator).run(None, arrays)
        for tensor in tensors.values():
            if isinstance(tensor, MappedTensor):
                tensor.release()
        return ir.Tensor(np.ascontiguousarray(found), dtype=dtype)

    weights = [source.name or "weight" for source in sources if source in region.weights]
    folded = ir.LazyTensor(compute, dtype=dtype, shape=ir.Shape(shape.numpy()))
    made = editor.tensor(folded, _name(weights), graph)
    editor.replace(value, made)
    return made, _name(weights)


def _rename(value: ir.Value, name: str) -> None:
    graph = value.graph
    if graph is None or value.name is None or name in graph.initializers:
        return
    del graph.initializers[value.name]
    value.name = name
    if value.const_value is not None:
        value.const_value.name = name
    graph.register_initializer(value)


def _needed(value: ir.Value, nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """Those of the nodes that lead to a value, in order."""
    wanted, kept = {value}, []
    for node in reversed(nodes):
        if wanted & set(node.outputs):
            kept.append(node)
            wanted.update(item for item in node.inputs if item is not None)
    return kept[::-1]


def _evaluator(
    nodes: Sequence[ir.Node], sources: Sequence[ir.Value], result: ir.Value, model: Model
) -> onnx.ModelProto:
    """A model of the nodes alone: it needs no weights until it is run."""
    proto = onnx.ModelProto(ir_version=model.ir.ir_version)
    proto.opset_import.add(domain="", version=model.opset)
    proto.graph.name = "moves"
    for node in nodes:
        ir.serde.serialize_node_into(proto.graph.node.add(), node)
    for source in sources:
        proto.graph.input.add(name=source.name)
    proto.graph.output.add(name=result.name)
    return proto


def _name(weights: Sequence[str]) -> str:
    """A weight's own name, or what the names of several begin with."""
    if len(weights) == 1:
        return weights[0]
    shared = weights[0]
    while not all(name.startswith(shared) for name in weights):
        shared = shared[:-1]
    return f"{shared.rstrip('._/') or weights[0]}.joined"
