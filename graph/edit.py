"""Reading a graph's neighbourhood and changing it: the vocabulary in which rules are written."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .model import Model

Array = npt.NDArray[np.generic]
Attributes = Mapping[str, int | float | str | Sequence[int] | Sequence[float] | Sequence[str]]
_SHARED_CONSTANT_BYTES = 256


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The standard-ONNX node that makes `value`, if it is one of `op_types`."""
    node = None if value is None else value.producer()
    if node is None or node.domain not in ("", "ai.onnx") or (op_types and node.op_type not in op_types):
        return None
    return node


def operand(node: ir.Node, position: int) -> ir.Value | None:
    """The input at `position`, or None if it is left out (old operator sets have attributes instead)."""
    return node.inputs[position] if position < len(node.inputs) else None


def constant(value: ir.Value | None) -> Array | None:
    """The contents of an initializer, or None if the value is computed or fed."""
    if value is None or value.const_value is None or not is_constant(value):
        return None
    return value.const_value.numpy()


def small_constant(value: ir.Value | None, limit: int = 1024) -> Array | None:
    """Like `constant`, but None for tensors of more than `limit` elements (reads no big weights)."""
    if value is None or value.const_value is None or value.const_value.size > limit:
        return None
    return constant(value)


def scalar(value: ir.Value | None) -> float | None:
    """The number in a constant of one element, or None."""
    array = small_constant(value, 1)
    if array is None or array.size != 1 or array.dtype.kind not in "fiub":
        return None
    return float(array.reshape(()).item())


def integers(value: ir.Value | None) -> list[int] | None:
    """The integers of a small constant of rank 0 or 1, or None."""
    array = small_constant(value)
    if array is None or array.dtype.kind not in "iu" or array.ndim > 1:
        return None
    return [int(item) for item in array.reshape(-1)]


def axes_of(node: ir.Node) -> list[int] | None:
    """The axes of Squeeze/Unsqueeze/Reduce*, as attribute (old opsets) or constant input."""
    if "axes" in node.attributes:
        return list(node.attributes["axes"].as_ints())
    return integers(operand(node, 1))


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute or its default."""
    return node.attributes[name].as_int() if name in node.attributes else default


def float_attribute(node: ir.Node, name: str, default: float) -> float:
    """A float attribute or its default."""
    return node.attributes[name].as_float() if name in node.attributes else default


def permutation(node: ir.Node) -> list[int] | None:
    """The permutation of a Transpose; None if it is none, or left out and the rank is unknown."""
    if "perm" in node.attributes:
        order = list(node.attributes["perm"].as_ints())
        return order if sorted(order) == list(range(len(order))) else None
    size = rank(node.inputs[0])
    return None if size is None else list(range(size))[::-1]


def rank(value: ir.Value | None) -> int | None:
    """The number of axes, if known."""
    return None if value is None or value.shape is None else len(value.shape)


def static_dim(value: ir.Value | None, axis: int) -> int | None:
    """The size of one axis, if it is known and fixed."""
    size = rank(value)
    if value is None or value.shape is None or size is None or not -size <= axis < size:
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None


def same_shape(first: ir.Value | None, second: ir.Value | None) -> bool:
    """Whether both shapes are known and equal, dimension by dimension (unknown ones are not)."""
    if first is None or second is None or first.shape is None or second.shape is None:
        return False
    if len(first.shape) != len(second.shape):
        return False
    pairs = zip(first.shape, second.shape, strict=True)
    return all(_known(left) and left == right for left, right in pairs)


def _known(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, int) or dim.value is not None


def only_use(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value` once, or None if it has other readers or is a graph output."""
    uses = value.uses()
    if value.is_graph_output() or len(uses) != 1:
        return None
    return next(iter(uses)).node


def split_constant(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """(computed, constant) operands of a binary node with exactly one constant operand."""
    if len(node.inputs) != 2:
        return None
    left, right = node.inputs
    if left is None or right is None:
        return None
    if is_constant(right) and not is_constant(left):
        return left, right
    if is_constant(left) and not is_constant(right):
        return right, left
    return None


def is_constant(value: ir.Value | None) -> bool:
    """Whether the value is an initializer that no caller can override."""
    return (
        value is not None
        and value.const_value is not None
        and value.producer() is None
        and not value.is_graph_input()
    )


def name_nodes(model: ir.Model) -> None:
    """Give every node a name of its own, also across subgraphs: decisions refer to nodes by name."""
    taken: set[str] = set()
    numbers: dict[str, int] = {}
    for node in model.graph.all_nodes():
        stem = node.name or f"{node.op_type}/{next((v.name for v in node.outputs if v.name), 'unnamed')}"
        name = stem
        while name in taken:
            numbers[stem] = numbers.get(stem, 0) + 1
            name = f"{stem}_{numbers[stem]}"
        node.name = name
        taken.add(name)


def can_stand_for(old: ir.Value, new: ir.Value) -> bool:
    """Whether `new` can take the place of `old` without an Identity to make a graph output."""
    maker, owner = new.producer(), old.producer()
    if not old.is_graph_output():
        return True
    return (
        maker is not None and owner is not None and maker.graph is owner.graph and not new.is_graph_output()
    )


class Editor:
    """Adds nodes and constants with names that are free, and moves uses from one value to another."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._names: set[str] = set()
        self._numbers: dict[str, int] = {}
        for graph in model.all_graphs():
            self._names.update(graph.initializers)
            self._names.update(value.name for value in graph.inputs if value.name)
            for node in graph:
                self._names.update(value.name for value in node.outputs if value.name)
                if node.name:
                    self._names.add(node.name)
        self._small: dict[tuple[int, str, bytes, tuple[int, ...]], ir.Value] = {}

    def fresh_name(self, stem: str) -> str:
        """A name that no value or node of the model has."""
        candidate = stem
        while candidate in self._names:
            self._numbers[stem] = self._numbers.get(stem, 0) + 1
            candidate = f"{stem}_{self._numbers[stem]}"
        self._names.add(candidate)
        return candidate

    def constant(self, array: Array, stem: str, graph: ir.Graph) -> ir.Value:
        """An initializer with these contents; equal small ones are shared."""
        array = np.ascontiguousarray(array) if array.ndim else array
        if array.nbytes > _SHARED_CONSTANT_BYTES:
            return self.tensor(ir.tensor(array), stem, graph)
        key = (id(graph), array.dtype.name, array.tobytes(), array.shape)
        known = self._small.get(key)
        # A constant that lost its readers may have been removed from the graph in between.
        if known is None or graph.initializers.get(known.name or "") is not known:
            known = self._small[key] = self.tensor(ir.tensor(array), stem, graph)
        return known

    def tensor(self, tensor: ir.TensorProtocol, stem: str, graph: ir.Graph) -> ir.Value:
        """An initializer with this tensor (which may be lazy)."""
        name = self.fresh_name(stem)
        tensor.name = name
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        graph.register_initializer(value)
        return value

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Attributes | None = None,
        *,
        before: ir.Node | None = None,
        after: ir.Node | None = None,
        stem: str,
        like: ir.Value | None = None,
        dtype: ir.DataType | None = None,
        shape: ir.Shape | None = None,
        outputs: int = 1,
        domain: str = "",
    ) -> ir.Node:
        """Insert a node in front of `before` or behind `after`.

        Args:
            op_type: the operator.
            inputs: its inputs, None for an absent optional one.
            attributes: plain Python values.
            before: the node in front of which it stands (same graph).
            after: the node behind which it stands, if `before` is not given.
            stem: wish for the node's and the output's name.
            like: a value whose dtype and shape the first output has.
            dtype: overrides the dtype of `like`.
            shape: overrides the shape of `like`.
            outputs: the number of outputs.
            domain: "" for standard operators.
        """
        node = ir.node(op_type, inputs, attributes=attributes or {}, domain=domain, num_outputs=outputs)
        node.name = self.fresh_name(f"{stem}/{op_type}")
        for index, value in enumerate(node.outputs):
            value.name = self.fresh_name(stem if outputs == 1 else f"{stem}.{index}")
        first = node.outputs[0]
        if like is not None:
            first.shape = None if like.shape is None else like.shape.copy()
            first.type = copy.copy(like.type)
        if dtype is not None:
            first.type = ir.TensorType(dtype)
        if shape is not None:
            first.shape = shape.copy()
        if domain and domain not in self.model.graph.opset_imports:
            self.model.graph.opset_imports[domain] = 1
        if before is not None:
            before.prepend(node)
        elif after is not None:
            after.append(node)
        else:
            raise ValueError("a new node needs a neighbour")
        return node

    def value(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Attributes | None = None,
        *,
        before: ir.Node | None = None,
        after: ir.Node | None = None,
        stem: str,
        like: ir.Value | None = None,
        dtype: ir.DataType | None = None,
        shape: ir.Shape | None = None,
        domain: str = "",
    ) -> ir.Value:
        """Like `node`, for one output; returns the output value."""
        return self.node(
            op_type,
            inputs,
            attributes,
            before=before,
            after=after,
            stem=stem,
            like=like,
            dtype=dtype,
            shape=shape,
            domain=domain,
        ).outputs[0]

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let every reader of `old`, the graph's outputs included, read `new`; output names stay.

        Where `new` cannot become the output itself (an input, a weight, another output, a value of
        an outer graph), an Identity makes the output from it.
        """
        declared = new.is_graph_output() or new.is_graph_input()
        if not declared:
            new.shape = old.shape.copy() if new.shape is None and old.shape is not None else new.shape
            new.type = copy.copy(old.type) if new.type is None else new.type
        if not old.is_graph_output():
            ir.convenience.replace_all_uses_with(old, new)
            return
        owner = old.producer()
        assert owner is not None  # a graph output that is an input is never rewritten
        if not can_stand_for(old, new):
            new = self.value("Identity", [new], before=owner, stem=f"{old.name}/source", like=old)
        name = old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name = self.fresh_name(f"{name}/before")
        new.name = name
        new.shape = None if old.shape is None else old.shape.copy()
        new.type = copy.copy(old.type)


def remove_dead(model: Model) -> int:
    """Remove nodes and initializers that no output depends on; returns how many nodes went.

    Bodies of If, Loop and Scan are swept too. (onnx_ir's own pass leaves a removed node's body
    attached to the values it captures, and resizes outputs on the way.)
    """
    removed = _remove_dead_nodes(model.graph)
    for graph in model.all_graphs():
        for name, value in tuple(graph.initializers.items()):
            if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
                del graph.initializers[name]
    return removed


def _remove_dead_nodes(graph: ir.Graph) -> int:
    removed = 0
    for node in reversed(graph):
        if any(value.uses() or value.is_graph_output() for value in node.outputs):
            removed += sum(_remove_dead_nodes(body) for body in bodies(node))
        else:
            detach_bodies(node)
            graph.remove(node, safe=True)
            removed += 1
    return removed


def bodies(node: ir.Node) -> list[ir.Graph]:
    """The subgraphs of an If, Loop or Scan node."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found.extend(attribute.as_graphs())
    return found


def detach_bodies(node: ir.Node) -> None:
    """Let the nodes inside forget what they read, so that it no longer counts as used."""
    for body in bodies(node):
        body.outputs.clear()
        for inner in body:
            detach_bodies(inner)
            for place in range(len(inner.inputs)):
                inner.replace_input_with(place, None)
