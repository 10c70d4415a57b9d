"""Following every tensor axis through the graph: which space it has, and what a cut has to change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph.edit import Editor, bodies, is_constant, operand, rank
from ...graph.model import Model
from .spaces import Classes, Frozen, Indices, Spaces

Axis = int | None
"""The space of an axis; None for one of size 1, of unknown size, or that no cut may change."""
Axes = list[Axis]
FIXED = "it meets an axis that no cut may change: an input's, or one of unknown size"
Role = Literal["out", "in", "param", ""]
"""What a weight's axis is: it makes elements, sums over them, scales or shifts them, or none of these."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightUse:
    """One constant as one node reads it; several readers of one constant are several uses.

    Attributes:
        node: the reader.
        position: which of its inputs.
        value: the constant.
        axes: the space of each axis.
        roles: what each axis is to the reader.
    """

    node: ir.Node
    position: int
    value: ir.Value
    axes: Axes
    roles: list[Role]


@dataclasses.dataclass(frozen=True)
class Kept:
    """What stays in a cut: asked by space."""

    classes: Classes
    removed: npt.NDArray[np.bool_]
    _found: dict[int, Indices] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def of(self, space: int) -> Indices:
        """The positions of a space that stay, ascending."""
        root = self.classes.roots[space]
        if root not in self._found:
            self._found[root] = self.classes.kept(root, self.removed)
        return self._found[root]

    def count(self, space: int) -> int:
        """How many of a space's elements stay."""
        return len(self.of(space))

    def touches(self, space: int) -> bool:
        """Whether some of a space's elements go."""
        return self.count(space) < len(self.classes.of(space))


Change = Callable[[ir.Node, Kept, Editor], None]
"""Changes one node of the cut graph: its attributes, or constants that count or number elements."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adjustment:
    """A node that needs more than smaller weights when one of some spaces is cut."""

    node: ir.Node
    spaces: tuple[int, ...]
    change: Change


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """A node whose multiply-accumulates are in proportion to the sizes of some spaces."""

    node: ir.Node
    spaces: tuple[int, ...]


class Tracer:
    """Walks a graph in order and gives every axis a space; rules per operator say how (`RULES`).

    Args:
        model: with shapes inferred; not changed.
        rules: (domain, operator) -> rule.
    """

    def __init__(self, model: Model, rules: Mapping[tuple[str, str], Rule]) -> None:
        self.model = model
        self.spaces = Spaces()
        self.axes: dict[ir.Value, Axes] = {}
        self.uses: dict[tuple[ir.Node, int], WeightUse] = {}
        self.adjustments: list[Adjustment] = []
        self.works: list[Work] = []
        self.heads: set[int] = set()
        self.sums: set[int] = set()
        self.normalised: list[tuple[int, Frozen]] = []
        self._rules = rules

    def run(self) -> None:
        """Trace every node; what no rule knows keeps all that it touches."""
        graph = self.model.graph
        for value in graph.inputs:
            self.axes[value] = [None] * (rank(value) or 0)
        for node in graph:
            domain = "" if node.domain == "ai.onnx" else node.domain
            rule = self._rules.get((domain, node.op_type))
            if rule is None or any(value is not None and not self._has_rank(value) for value in node.inputs):
                self.keep_all(
                    node, "no rule says how its axes hang together" if rule is None else "a rank is unknown"
                )
            else:
                rule(self, node)
            for body in bodies(node):
                self._keep_captured(node, body)
            for value in node.outputs:
                self.axes.setdefault(value, [None] * (rank(value) or 0))
        for value in graph.outputs:
            for axis in self.axes.get(value, []):
                if axis is not None:
                    self.spaces.freeze(
                        axis, Frozen(value.name or "", "output", "the graph's output has this axis")
                    )

    def _keep_captured(self, node: ir.Node, body: ir.Graph) -> None:
        for inner in body.all_nodes():
            for value in inner.inputs:
                if value is not None and value in self.axes:
                    self.keep(node, self.axes[value], "the body of control flow reads it")

    def _has_rank(self, value: ir.Value) -> bool:
        return value.shape is not None or value in self.axes

    def size(self, value: ir.Value | None, axis: int) -> int | None:
        """The fixed size of an axis, or None; where shape inference gave up, that of its space."""
        if value is None:
            return None
        if value.shape is None:
            space = self.axes[value][axis] if value in self.axes else None
            return None if space is None else self.spaces.size(space)
        dim = value.shape[axis]
        return dim if isinstance(dim, int) else None

    def read(self, node: ir.Node, position: int) -> Axes:
        """The axes of an input; a constant's are its own at every reader."""
        value = node.inputs[position]
        assert value is not None
        if is_constant(value):
            return self.weight(node, position).axes
        if value not in self.axes:
            # An initializer that callers may override, or a value of an outer graph.
            self.axes[value] = [None] * (rank(value) or 0)
        return self.axes[value]

    def weight(self, node: ir.Node, position: int) -> WeightUse:
        """A constant input, with a new space for each of its axes of more than one element."""
        key = (node, position)
        if key not in self.uses:
            value = node.inputs[position]
            assert value is not None
            assert value.shape is not None
            axes: Axes = [
                self.spaces.new(size) if isinstance(size, int) and size > 1 else None for size in value.shape
            ]
            self.uses[key] = WeightUse(
                node=node, position=position, value=value, axes=axes, roles=["param"] * len(axes)
            )
        return self.uses[key]

    def reads_weight(self, node: ir.Node, position: int) -> bool:
        """Whether an input is there and constant."""
        return is_constant(operand(node, position))

    def role(self, node: ir.Node, position: int, axis: int, role: Role) -> None:
        """Say what an axis of a constant input is; nothing happens for a computed one."""
        if self.reads_weight(node, position):
            self.weight(node, position).roles[axis] = role

    def write(self, node: ir.Node, axes: Sequence[Axis], output: int = 0) -> None:
        """Set the axes of an output; where its declared size differs from the space's, nothing may go."""
        value = node.outputs[output]
        result: Axes = list(axes)
        if rank(value) not in (None, len(result)):
            self.keep(node, result, "its output's rank is not what its inputs say")
            result = [None] * (rank(value) or 0)
        for place, space in enumerate(result):
            size = None if value.shape is None else self.size(value, place)
            if space is not None and size is not None and size != self.spaces.size(space):
                self.keep(node, [space], "its output's size is not what its inputs say")
                result[place] = None
        self.axes[value] = result

    def keep(self, node: ir.Node, axes: Iterable[Axis], reason: str) -> None:
        """No element of these axes may go, because of this node."""
        for axis in axes:
            if axis is not None:
                self.spaces.freeze(axis, Frozen(node.name or "", node.op_type, reason))

    def keep_all(self, node: ir.Node, reason: str) -> None:
        """No element that the node reads may go; its outputs are unknown."""
        for position, value in enumerate(node.inputs):
            if value is not None and self._has_rank(value):
                self.keep(node, self.read(node, position), reason)
        for index, value in enumerate(node.outputs):
            self.write(node, [None] * (rank(value) or 0), index)

    def same(self, node: ir.Node, *axes: Axis) -> Axis:
        """Join axes that hold the same elements; one that no cut may change keeps the others."""
        known = [axis for axis in axes if axis is not None]
        if not known:
            return None
        sizes = {self.spaces.size(axis) for axis in known}
        if len(known) < len(axes) or len(sizes) > 1:
            self.keep(node, known, FIXED)
            return None
        for other in known[1:]:
            self.spaces.join(known[0], other)
        return known[0]

    def link(self, axis: Axis, elements: Indices, other: Axis, others: Indices, node: ir.Node) -> None:
        """Link elements of two axes; where one of them cannot be cut, the other's are kept."""
        if axis is not None and other is not None:
            self.spaces.link(axis, elements, other, others)
        elif axis is not None or other is not None:
            space, span = (axis, elements) if axis is not None else (other, others)
            assert space is not None
            why = Frozen(node.name or "", node.op_type, FIXED)
            self.spaces.freeze(space, why, span)

    def adjust(self, node: ir.Node, axes: Iterable[Axis], change: Change) -> None:
        """Note that a cut of these axes changes the node."""
        spaces = tuple(axis for axis in axes if axis is not None)
        if spaces:
            self.adjustments.append(Adjustment(node=node, spaces=spaces, change=change))

    def works_on(self, node: ir.Node, axes: Iterable[Axis]) -> None:
        """Note that the node's multiply-accumulates grow with each of these axes."""
        self.works.append(Work(node=node, spaces=tuple(axis for axis in axes if axis is not None)))


def counted_attributes(spaces: Mapping[str, Axis]) -> Change:
    """Integer attributes that a node has, each the number of elements that stay of a space."""

    def change(node: ir.Node, kept: Kept, _editor: Editor) -> None:
        for name, space in spaces.items():
            if space is not None and name in node.attributes:
                node.attributes[name] = ir.AttrInt64(name, kept.count(space))

    return change


Rule = Callable[[Tracer, ir.Node], None]
"""Reads the axes of a node's inputs, joins and links them, and writes those of its outputs."""
