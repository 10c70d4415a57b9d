"""Residual branches that go as a whole: what is left of them is a constant that is added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph.edit import Editor, int_attribute, rank, remove_dead
from ...graph.model import Model
from .coupling import Coupling, Group
from .readers import Layer, layer_of


class Branch(NamedTuple):
    """A branch that went.

    Attributes:
        total: name of the sum that it was added in.
        beside: name of the other tensor there.
        adder: name of the node that adds.
        position: which of that node's inputs the constant is.
        axis: of the channels.
        rank: of the sum.
    """

    total: str
    beside: str
    adder: str
    position: int
    axis: int
    rank: int


def closing_layer(coupling: Coupling, group: Group) -> Layer | None:
    """The layer that ends a residual branch made of nothing but this group, None where there is none.

    Without any unit of the group the layer gives its bias alone, so that the branch can go.
    """
    if len(group.readers) != 1:
        return None
    (use,) = group.readers
    layer = layer_of(use.node)
    axis = use.axes[use.roles.index("in")]
    if layer is None or layer.beside is None or axis is None:
        return None
    return layer if set(coupling.classes.of(axis).tolist()) <= set(group.units) else None


def drop_branches(model: Model, names: Sequence[str]) -> dict[str, Branch]:
    """Replace the results of layers by their biases, and remove what made them.

    Args:
        model: changed in place.
        names: layers as `closing_layer` finds them.

    Returns:
        Layer -> what became of its branch.
    """
    nodes = {node.name: node for node in model.graph}
    editor = Editor(model)
    dropped = {}
    for name in names:
        layer = layer_of(nodes[name])
        assert layer is not None
        assert layer.beside is not None
        adder = layer.total.producer()
        assert adder is not None
        width = rank(layer.total) or 1
        branch = Branch(
            total=str(layer.total.name),
            beside=str(layer.beside.name),
            adder=str(adder.name),
            position=0 if adder.inputs[0] is layer.result else 1,
            axis=1 if layer.window is not None else width - 1,
            rank=width,
        )
        by_rows = layer.window is not None or bool(int_attribute(layer.node, "transB", 0))
        outputs = layer.weight.shape[0 if by_rows else -1]
        put_constant(adder, branch, np.broadcast_to(layer.bias(), (outputs,)), editor)
        dropped[name] = branch
    remove_dead(model)
    return dropped


def put_constant(
    adder: ir.Node, branch: Branch, values: npt.NDArray[np.floating[Any]], editor: Editor
) -> None:
    """Let the branch's input of a sum be one number for each channel.

    Args:
        adder: the sum.
        branch: says which input, and which axis the channels are.
        values: shape (channels,).
        editor: of the model.
    """
    shape = [1] * branch.rank
    shape[branch.axis] = len(values)
    graph = adder.graph
    assert isinstance(graph, ir.Graph)
    array = np.ascontiguousarray(values, np.float32).reshape(shape)
    adder.replace_input_with(branch.position, editor.constant(array, f"{adder.name}/constant", graph))
