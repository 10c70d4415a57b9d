"""Carrying a cut out: smaller weights, counts and bounds in a fork of the graph."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...graph.edit import Editor, remove_dead
from ...graph.errors import InternalError
from ...graph.model import Model
from .coupling import Coupling
from .tracer import Kept, WeightUse

Removed = npt.NDArray[np.bool_]
"""One flag for each class: whether it goes."""


def nothing_removed(coupling: Coupling) -> Removed:
    """The cut that removes nothing."""
    return np.zeros(coupling.classes.count, bool)


def cut(coupling: Coupling, removed: Removed) -> Model:
    """A new model without the marked classes; inputs and outputs keep their shapes.

    Args:
        coupling: of the model that is cut; it is not changed.
        removed: which classes go.

    Raises:
        InternalError: if a marked class has to stay, or an axis would be left without elements.
    """
    _check(coupling, removed)
    kept = Kept(coupling.classes, removed)
    fork = coupling.model.fork()
    pairs = list(zip(coupling.model.graph, fork.graph, strict=True))
    twins = dict(pairs)
    editor = Editor(fork)
    for use in coupling.tracer.uses.values():
        _cut_weight(use, twins[use.node], kept, editor)
    for item in coupling.tracer.adjustments:
        if any(kept.touches(space) for space in item.spaces):
            item.change(twins[item.node], kept, editor)
    for old, new in pairs:
        for before, after in zip(old.outputs, new.outputs, strict=True):
            _cut_shape(after, coupling.tracer.axes.get(before, []), kept)
    remove_dead(fork)
    return fork


def _check(coupling: Coupling, removed: Removed) -> None:
    for label in np.flatnonzero(removed).tolist():
        if label in coupling.classes.frozen:
            why = coupling.classes.frozen[label]
            raise InternalError("a cut takes elements that have to stay", where=why.node, why=why.reason)
    tracer = coupling.tracer
    every = [*tracer.axes.values(), *(use.axes for use in tracer.uses.values())]
    used = {space for axes in every for space in axes if space is not None}
    for space in {coupling.classes.roots[space] for space in used}:
        labels = coupling.classes.of(space)
        if len(labels) and removed[labels].all():
            raise InternalError("a cut leaves an axis without elements", where=f"space {space}")


def _cut_weight(use: WeightUse, node: ir.Node, kept: Kept, editor: Editor) -> None:
    spaces = [(place, axis) for place, axis in enumerate(use.axes) if axis is not None and kept.touches(axis)]
    if not spaces:
        return
    tensor = use.value.const_value
    assert tensor is not None
    array = tensor.numpy()
    for place, axis in spaces:
        array = np.take(array, kept.of(axis), axis=place)
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    node.replace_input_with(use.position, editor.constant(array, use.value.name or "weight", graph))


def _cut_shape(value: ir.Value, axes: list[int | None], kept: Kept) -> None:
    if value.shape is None or value.is_graph_output():
        return
    dims = list(value.shape)
    for place, axis in enumerate(axes):
        if axis is None or not kept.touches(axis):
            continue
        dim = dims[place]
        dims[place] = kept.count(axis) if isinstance(dim, int) else _fewer(dim, axis, kept)
    value.shape = ir.Shape(dims)


def _fewer(dim: ir.SymbolicDim, space: int, kept: Kept) -> ir.SymbolicDim:
    """The size of an axis that heads are folded into, such as 12*batch, with fewer heads."""
    head, _, rest = (dim.value or "").partition("*")
    if rest and head == str(len(kept.classes.of(space))):
        return ir.SymbolicDim(f"{kept.count(space)}*{rest}")
    return ir.SymbolicDim(None)


def mask(coupling: Coupling, removed: Removed) -> Model:
    """The model in which the marked classes count for nothing: weights that sum over them are zero there.

    The output of a cut equals the output of this model, to the order in which floats are added.
    """
    fork = coupling.model.fork()
    twins = dict(zip(coupling.model.graph, fork.graph, strict=True))
    editor = Editor(fork)
    for use in coupling.tracer.uses.values():
        gone = [
            (place, removed[coupling.classes.of(axis)])
            for place, (axis, role) in enumerate(zip(use.axes, use.roles, strict=True))
            if axis is not None and role == "in"
        ]
        if not any(flags.any() for _, flags in gone):
            continue
        tensor = use.value.const_value
        assert tensor is not None
        array = np.array(tensor.numpy())
        for place, flags in gone:
            array[(slice(None),) * place + (flags,)] = 0
        graph = fork.graph
        twins[use.node].replace_input_with(
            use.position, editor.constant(array, use.value.name or "weight", graph)
        )
    return fork


def marked(coupling: Coupling, units: Iterable[int]) -> Removed:
    """Flags for these classes."""
    removed = nothing_removed(coupling)
    removed[list(units)] = True
    return removed
