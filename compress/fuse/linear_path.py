"""Moving a number along linear operators to the weights that it can be multiplied into ahead of time."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph.edit import (
    Editor,
    int_attribute,
    integers,
    is_constant,
    operand,
    producer,
    rank,
    static_dim,
)
from ...graph.weights import MappedTensor

# Linear in their first input, whatever the others are.
_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Slice", "Identity", "Tile", "Neg")
_GATHERS = ("GatherElements", "Gather", "Div")
_ROTARY = ("com.microsoft", "RotaryEmbedding", "")
_DEPTH = 24
_SMALL_ELEMENTS = 1 << 16
_CONSTANT_NODES = 64


class _Site(NamedTuple):
    """An input to multiply: a constant (only `columns` of its last axis), or what is computed from such."""

    node: ir.Node
    place: int
    columns: tuple[int, int] | None = None


@dataclasses.dataclass
class Absorption:
    """Where a factor of one operand of a node can go: into constants that are computed with anyway.

    Every value between those constants and the operand must be read along that path alone; otherwise
    other readers would see it scaled. `reason` says why there is no place, once a linear layer was seen.
    """

    root: ir.Node
    place: int
    passing: frozenset[ir.Node] = frozenset()
    reason: str = ""
    _sites: list[_Site] = dataclasses.field(default_factory=list)
    _edges: set[tuple[ir.Node, int]] = dataclasses.field(default_factory=set)
    _seen: set[ir.Value] = dataclasses.field(default_factory=set)

    def found(self) -> bool:
        """Whether there is such a place; nothing is changed."""
        if not self._input(self.root, self.place, _DEPTH):
            return False
        for node, place in self._edges:
            value = node.inputs[place]
            assert value is not None
            uses = {(use.node, use.idx) for use in value.uses() if not _reads_shape(use.node)}
            if value.is_graph_output() or not uses <= self._edges:
                self.reason = "the unscaled values are also used elsewhere"
                return False
        return True

    def apply(self, scale: float, editor: Editor) -> None:
        """Multiply the constants that `found` named by `scale`."""
        for site in self._sites:
            value = site.node.inputs[site.place]
            assert value is not None
            graph = site.node.graph if isinstance(site.node.graph, ir.Graph) else editor.model.graph
            if value.producer() is not None:
                by = editor.constant(np.array(scale, np.float32), "scale", graph)
                stem = f"{value.name}/scaled"
                scaled = editor.value("Mul", [value, by], before=site.node, stem=stem, like=value)
                site.node.replace_input_with(site.place, scaled)
                continue
            assert value.const_value is not None
            tensor = scaled_tensor(value.const_value, scale, site.columns)
            if len(value.uses()) == 1 and not value.is_graph_output():
                tensor.name = value.name
                value.const_value = tensor
            else:
                site.node.replace_input_with(site.place, editor.tensor(tensor, value.name or "weight", graph))

    def _input(self, node: ir.Node, place: int, depth: int) -> bool:
        """Try to scale one input of a node."""
        value = node.inputs[place]
        if value is None or value.dtype != ir.DataType.FLOAT or depth == 0:
            return False
        if is_constant(value):
            return self._constant(node, place)
        if value.producer() is not None and is_computed_from_constants(value):
            self._sites.append(_Site(node, place))
            return True
        self._edges.add((node, place))
        if value in self._seen:
            return True
        self._seen.add(value)
        return self._made_by(value, depth - 1)

    def _constant(self, node: ir.Node, place: int) -> bool:
        """Try to scale a constant that is no weight: a bias, a table of positions."""
        value = node.inputs[place]
        if value is None:
            return True
        if not is_constant(value) or value.const_value is None or value.dtype != ir.DataType.FLOAT:
            return False
        if value.const_value.size > _SMALL_ELEMENTS and len(value.uses()) != 1:
            return False
        self._sites.append(_Site(node, place))
        return True

    def _made_by(self, value: ir.Value, depth: int) -> bool:
        """Try to scale a value through the node that makes it."""
        node = value.producer()
        if node is None or node.graph is not self.root.graph:
            return False
        if node.op_identifier() == _ROTARY:
            return self._input(node, 0, depth)
        if producer(value) is None:
            return False
        if node in self.passing or node.op_type in _MOVES or node.op_type in _GATHERS:
            first = node.inputs[0]
            skips = node in self.passing and first is not None and is_constant(first)
            return self._input(node, 1 if skips else 0, depth)
        if node.op_type in ("Concat", "Add", "Sub"):
            return all(self._input(node, place, depth) for place in range(len(node.inputs)))
        if node.op_type == "Mul":
            return self._either(node, depth)
        if node.op_type == "Split":
            return self._part(node, value)
        if node.op_type not in ("MatMul", "Gemm", "Conv"):
            return False
        if is_constant(node.inputs[1]):
            bias = range(2, len(node.inputs))
            return self._weight(node) and all(self._constant(node, place) for place in bias)
        return node.op_type == "MatMul" and not is_constant(node.inputs[0]) and self._either(node, depth)

    def _either(self, node: ir.Node, depth: int) -> bool:
        """Scale one operand of a product, not both: a computed one first."""
        order = sorted(range(len(node.inputs)), key=lambda place: is_constant(node.inputs[place]))
        for place in order:
            before = list(self._sites), set(self._edges), set(self._seen)
            if self._input(node, place, depth):
                return True
            self._sites, self._edges, self._seen = before
        return False

    def _weight(self, node: ir.Node, columns: tuple[int, int] | None = None) -> bool:
        """Try to scale the weight of a MatMul, Gemm or Conv, or some of its columns."""
        weight = node.inputs[1]
        assert weight is not None
        if weight.dtype != ir.DataType.FLOAT or (node.op_type == "MatMul" and rank(weight) != 2):
            return False
        if len(weight.uses()) != 1 or weight.is_graph_output():
            self.reason = "the projection's weight is also used elsewhere (tied weights)"
            return False
        self._sites.append(_Site(node, 1, columns))
        return True

    def _part(self, node: ir.Node, value: ir.Value) -> bool:
        """One part of Split(x W + b) along the last axis: some columns of W and b."""
        source, size = node.inputs[0], rank(node.inputs[0])
        if source is None or size is None or int_attribute(node, "axis", 0) not in (-1, size - 1):
            return False
        columns = _columns(node, value)
        self._edges.add((node, 0))
        biased = producer(source, "Add")
        if biased is not None:
            place = next((place for place in (0, 1) if is_constant(biased.inputs[place])), None)
            if place is None or rank(biased.inputs[place]) != 1:
                return False
            if columns is None or static_dim(biased.inputs[place], 0) != static_dim(source, -1):
                return False
            self._sites.append(_Site(biased, place, columns))
            self._edges.add((biased, 1 - place))
            source = biased.inputs[1 - place]
        product = producer(source, "MatMul")
        if product is None or columns is None or not is_constant(product.inputs[1]):
            return False
        return product.graph is node.graph and self._weight(product, columns)


def _reads_shape(node: ir.Node) -> bool:
    return node.op_type in ("Shape", "Size") and not node.domain


def sole_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads the numbers of `value`, once; None if others do, or it is a graph output.

    Unlike `only_use` it leaves out who reads the shape alone (older exporters do so everywhere).
    """
    readers = [use.node for use in value.uses() if not _reads_shape(use.node)]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _columns(node: ir.Node, value: ir.Value) -> tuple[int, int] | None:
    """Where one output of a Split along the last axis begins and ends."""
    if "split" in node.attributes:
        sizes: list[int] | None = list(node.attributes["split"].as_ints())
    elif operand(node, 1) is not None:
        sizes = integers(operand(node, 1))
    else:
        width = static_dim(node.inputs[0], -1)
        each = None if width is None or width % len(node.outputs) else width // len(node.outputs)
        sizes = None if each is None else [each] * len(node.outputs)
    if sizes is None or len(sizes) != len(node.outputs):
        return None
    index = [output is value for output in node.outputs].index(True)
    return sum(sizes[:index]), sum(sizes[: index + 1])


def is_computed_from_constants(value: ir.Value) -> bool:
    """Whether only constants go into `value`: the runtime computes it once, when it loads the model."""
    pending, seen = [value], set[ir.Value]()
    while pending:
        item = pending.pop()
        if item in seen or is_constant(item):
            continue
        seen.add(item)
        node = item.producer()
        if node is None or node.domain not in ("", "ai.onnx") or len(seen) > _CONSTANT_NODES:
            return False
        if not node.inputs or node.op_type in ("If", "Loop", "Scan") or node.op_type.startswith("Random"):
            return False
        pending += [operand for operand in node.inputs if operand is not None]
    return True


def scaled_tensor(
    tensor: ir.TensorProtocol, scale: float | npt.NDArray[np.float64], columns: tuple[int, int] | None = None
) -> ir.TensorProtocol:
    """`tensor` times `scale`, in float64 and rounded once; read only when it is used, if it is mapped.

    Args:
        tensor: float32, of any shape.
        scale: a number, or one per element of the last axis.
        columns: the part of the last axis that is scaled; None for all of it.
    """

    def compute() -> ir.TensorProtocol:
        scaled = tensor.numpy().astype(np.float64)
        part = scaled if columns is None else scaled[..., columns[0] : columns[1]]
        part *= scale
        if isinstance(tensor, MappedTensor):
            tensor.release()
        with np.errstate(over="ignore"):
            rounded = scaled.astype(np.float32)
        return ir.Tensor(np.ascontiguousarray(rounded) if rounded.ndim else rounded)

    if not isinstance(tensor, (MappedTensor, ir.LazyTensor)):
        return compute()
    return ir.LazyTensor(compute, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()))
