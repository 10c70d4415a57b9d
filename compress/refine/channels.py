"""Which channels of which tensors must carry one factor: the ties that equalization respects."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph.edit import constant, int_attribute, integers, is_constant, operand, scalar
from ...graph.model import Model
from .patches import as_rows
from .shortcut import copied_channels

Labels = npt.NDArray[np.int64]

_POSITIVELY_HOMOGENEOUS = frozenset(
    {"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity"}
)
_SUMS = frozenset({"Add", "Sub", "Concat"})
WEIGHTED = frozenset({"Conv", "Gemm", "MatMul"})


class ChannelTies:
    """Classes of channels: scaling one of a class by a factor scales all of it, and a weight undoes it.

    A channel is `fixed` where an operator stands that no factor passes, or at a graph input or output.

    Args:
        model: float graph; only convolutional parts (tensors with channels on axis 1) are looked at.
    """

    def __init__(self, model: Model) -> None:
        self._parent: list[int] = []
        self._labels: dict[ir.Value, Labels] = {}
        self._fixed: set[int] = set()
        self._writers: list[ir.Node] = []
        for value in model.graph.inputs:
            self._fix(value)
        for node in model.graph:
            self._visit(node)
        for value in model.graph.outputs:
            self._fix(value)
        for body in list(model.all_graphs())[1:]:
            for node in body:
                for captured in node.inputs:
                    if captured is not None:
                        self._fix(captured)

    def of(self, value: ir.Value | None) -> Labels | None:
        """The class of every channel of a tensor, shape (channels,); -1 where it is fixed."""
        found = None if value is None else self._labels.get(value)
        if found is None:
            return None
        roots = np.array([self._root(int(label)) for label in found], np.int64)
        fixed = {self._root(label) for label in self._fixed}
        return np.array([-1 if root in fixed else root for root in roots], np.int64)

    def tensors(self) -> Iterator[ir.Value]:
        """Every tensor whose channels have classes, in graph order."""
        yield from self._labels

    def _visit(self, node: ir.Node) -> None:
        outputs = [value for value in node.outputs if value.uses() or value.is_graph_output()]
        if len(outputs) == 1 and not node.domain and self._tie(node, outputs[0]):
            return
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                self._fix(value)

    def _tie(self, node: ir.Node, output: ir.Value) -> bool:
        """Give the output its labels; False if no factor passes this node."""
        first = node.inputs[0] if node.inputs else None
        labels = self._labels.get(first) if first is not None else None
        if node.op_type in WEIGHTED:
            copied = None if labels is None else copied_channels(node)
            if labels is not None and copied is not None:
                self._labels[output] = np.where(copied < 0, self._new(len(copied)), labels[copied])
                return True
            return self._weighted(node, output)
        if labels is None:
            return node.op_type in _SUMS and self._sum(node, output)
        if node.op_type in _POSITIVELY_HOMOGENEOUS:
            self._labels[output] = labels
            return True
        if node.op_type in _SUMS:
            return self._sum(node, output)
        if node.op_type == "Pad":
            return self._padded(node, labels, output)
        if node.op_type == "Slice":
            return self._sliced(node, labels, output)
        if node.op_type == "ReduceMean":
            return self._averaged(node, labels, output)
        return node.op_type == "Flatten" and self._flattened(node, labels, output)

    def _weighted(self, node: ir.Node, output: ir.Value) -> bool:
        weight = constant(node.inputs[1]) if is_constant(node.inputs[1]) else None
        source = node.inputs[1]
        if weight is None or source is None or len(list(source.uses())) > 1 or source.is_graph_output():
            return False
        bias = operand(node, 2)
        if bias is not None and (not is_constant(bias) or len(list(bias.uses())) > 1):
            return False
        rows = as_rows(node, np.asarray(weight, np.float64))
        read = None if node.inputs[0] is None else self._labels.get(node.inputs[0])
        if rows is None:
            return False
        inputs = weight.shape[1] * rows.shape[0] if node.op_type == "Conv" else rows.shape[2]
        if node.inputs[0] is not None and (read is None or len(read) != inputs):
            self._fix(node.inputs[0])
        self._labels[output] = self._new(rows.shape[0] * rows.shape[1])
        return True

    def _sum(self, node: ir.Node, output: ir.Value) -> bool:
        operands = [self._labels.get(value) for value in node.inputs if value is not None]
        found = [labels for labels in operands if labels is not None]
        if len(found) != len(node.inputs):
            return False
        if node.op_type == "Concat":
            if int_attribute(node, "axis", 0) != 1:
                return False
            self._labels[output] = np.concatenate(found)
            return True
        if len({len(labels) for labels in found}) > 1:
            return False
        for one, other in zip(found[0], found[1], strict=True):
            self._join(int(one), int(other))
        self._labels[output] = found[0]
        return True

    def _padded(self, node: ir.Node, labels: Labels, output: ir.Value) -> bool:
        amounts, axes = integers(operand(node, 1)), operand(node, 3)
        mode = node.attributes.get("mode")
        zero = operand(node, 2) is None or scalar(operand(node, 2)) == 0.0
        plain = mode is None or mode.as_string() == "constant"
        if amounts is None or axes is not None or not plain or not zero or len(amounts) < 4:
            return False
        before, after = amounts[1], amounts[len(amounts) // 2 + 1]
        if before < 0 or after < 0 or amounts[0] or amounts[len(amounts) // 2]:
            return False
        self._labels[output] = np.concatenate([self._new(before), labels, self._new(after)])
        return True

    def _sliced(self, node: ir.Node, labels: Labels, output: ir.Value) -> bool:
        starts, ends = integers(operand(node, 1)), integers(operand(node, 2))
        axes, steps = integers(operand(node, 3)), operand(node, 4)
        strides = integers(steps) if steps is not None else [1] * len(starts or [])
        if starts is None or ends is None or axes is None or strides is None:
            return False
        for start, end, axis, stride in zip(starts, ends, axes, strides, strict=True):
            if axis < 0 or axis == 0:
                return False
            if axis == 1:
                labels = labels[start:end:stride]
        self._labels[output] = labels
        return True

    def _averaged(self, node: ir.Node, labels: Labels, output: ir.Value) -> bool:
        axes = integers(operand(node, 1))
        listed = node.attributes.get("axes")
        axes = list(listed.as_ints()) if axes is None and listed is not None else axes
        rank = None if node.inputs[0] is None or node.inputs[0].shape is None else len(node.inputs[0].shape)
        if axes is None or rank is None or any(axis % rank < 2 for axis in axes):
            return False
        self._labels[output] = labels
        return True

    def _flattened(self, node: ir.Node, labels: Labels, output: ir.Value) -> bool:
        shape = None if node.inputs[0] is None else node.inputs[0].shape
        if shape is None or int_attribute(node, "axis", 1) != 1:
            return False
        if any(not isinstance(size, int) or size != 1 for size in shape.dims[2:]):
            return False
        self._labels[output] = labels
        return True

    def _fix(self, value: ir.Value) -> None:
        labels = self._labels.get(value)
        if labels is not None:
            self._fixed.update(int(label) for label in labels)

    def _new(self, count: int) -> Labels:
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return np.arange(start, start + count, dtype=np.int64)

    def _root(self, label: int) -> int:
        while self._parent[label] != label:
            self._parent[label] = self._parent[self._parent[label]]
            label = self._parent[label]
        return label

    def _join(self, one: int, other: int) -> None:
        roots = self._root(one), self._root(other)
        self._parent[max(roots)] = min(roots)
