"""Outlier channels behind an activation function, computed apart in float ahead of dynamic quantization."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...graph.edit import (
    Editor,
    is_constant,
    only_use,
    producer,
    rank,
    remove_dead,
    scalar,
    static_dim,
)
from ...graph.model import Model
from ...graph.passes import Outcome, Pass
from ..fuse.rewire import read_instead
from ..plan import Decision
from .outlier_noise import Indices, changed_weight
from .outliers import is_linear, replace_constant

SPLIT = "split-outliers"
"""The name under which a recipe's `fusions` switches it."""

_DEPTH = 12
_UNARY = frozenset(
    {
        "Abs", "Celu", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Neg",
        "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh",
    }
)  # fmt: skip
_ODD_AT_ZERO = _UNARY - {"Exp", "HardSigmoid", "Sigmoid", "Softplus"}
"""Of those, the ones that are 0 at 0."""
_BINARY = frozenset({"Add", "Sub", "Mul", "Div", "Pow"})


class FeedForward(NamedTuple):
    """x -> MatMul (+ bias) -> activation function, elementwise -> MatMul."""

    up: ir.Node
    biased: ir.Node | None
    function: tuple[ir.Node, ...]  # in graph order
    down: ir.Node

    @property
    def hidden(self) -> ir.Value:
        """What the second MatMul reads."""
        value = self.down.inputs[0]
        assert value is not None
        return value

    @property
    def root(self) -> ir.Value:
        """What the activation function is of."""
        return (self.biased or self.up).outputs[0]


def splittable(model: Model, decisions: Sequence[Decision]) -> list[str]:
    """Hidden activations of feed-forward layers whose second MatMul is planned dynamic."""
    planned = {item.node for item in decisions if item.form == "dynamic"}
    return [str(item.hidden.name) for item in feed_forwards(model) if item.down.name in planned]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitOutliers(Pass):
    """Compute the outlier channels of a feed-forward layer apart, in float.

    With O the outlier channels: f(x U + b) D becomes f(x U' + b') D' + f(x U_O + b_O) D_O, where U', b' and
    D' are zero in O. The function is the same; the hidden activation that is quantized no longer
    has the channels that stretch its range. Its width stays, so that kernels keep their alignment.
    Sources: Dettmers et al. 2022 (LLM.int8), arXiv:2208.07339, section 3.1; Zhao et al. 2019,
    arXiv:1901.09504.

    Attributes:
        channels: hidden activation -> indices of its outlier channels, ascending.
    """

    channels: Mapping[str, Indices]

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome = Outcome()
        editor = Editor(model)
        for layer in tuple(feed_forwards(model)):
            chosen = self.channels.get(str(layer.hidden.name))
            if chosen is None:
                continue
            width = static_dim(layer.down.inputs[1], 0)
            if width is None or not len(chosen) or chosen[-1] >= width:
                outcome.refuse(layer.down.name or "", SPLIT, "the calibrated channels are not the weight's")
                continue
            _split(layer, chosen, editor)
            outcome.count(SPLIT)
        if outcome.applied:
            remove_dead(model)
        return outcome


def feed_forwards(model: Model) -> Iterator[FeedForward]:
    """All feed-forward layers of the main graph whose outlier channels can be computed apart."""
    for node in model.graph:
        hidden = node.inputs[0] if node.inputs else None
        if hidden is None or not is_linear(node, hidden) or only_use(hidden) is not node:
            continue
        found = _function_of(hidden, node)
        if found is None:
            continue
        root, function = found
        biased = producer(root, "Add")
        source = root
        if biased is not None:
            place = next((place for place in (0, 1) if _is_bias(biased.inputs[place], node)), None)
            if place is None:
                continue
            taken = biased.inputs[1 - place]
            if taken is None or only_use(taken) is not biased:
                continue
            source = taken
        up = producer(source, "MatMul")
        data = None if up is None else up.inputs[0]
        if up is None or data is None or up.graph is not node.graph or not is_linear(up, data):
            continue
        if static_dim(up.inputs[1], 1) == static_dim(node.inputs[1], 0):
            yield FeedForward(up, biased, function, node)


def _is_bias(value: ir.Value | None, down: ir.Node) -> bool:
    if value is None or not is_constant(value) or rank(value) != 1:
        return False
    return static_dim(value, 0) == static_dim(down.inputs[1], 0)


def _function_of(hidden: ir.Value, down: ir.Node) -> tuple[ir.Value, tuple[ir.Node, ...]] | None:
    """The value that `hidden` is an elementwise function of, with f(0) = 0, and that function's nodes."""
    seen: dict[ir.Node, None] = {}
    roots: dict[ir.Value, None] = {}

    def visit(value: ir.Value | None, depth: int) -> bool:
        if value is None:
            return True
        node = producer(value)
        if is_constant(value):
            return value.const_value is not None and value.const_value.size == 1
        if node is None or node.graph is not down.graph or depth == 0:
            return False
        linear = node.op_type == "MatMul" or (
            node.op_type == "Add" and any(_is_bias(item, down) for item in node.inputs)
        )
        if linear:
            roots[value] = None
            return True
        if node.op_type not in _UNARY | _BINARY:
            return False
        if node not in seen:
            seen[node] = None
            return all(visit(item, depth - 1) for item in node.inputs)
        return True

    if not visit(hidden, _DEPTH) or len(roots) != 1 or not seen:
        return None
    (root,) = roots
    inside = set(seen)
    for value in (root, *(node.outputs[0] for node in seen)):
        readers = {use.node for use in value.uses()}
        expected = {down} if value is hidden else inside
        if value.is_graph_output() or not readers <= expected:
            return None
    graph = down.graph
    assert graph is not None
    order = tuple(node for node in graph if node in inside)
    return (root, order) if _is_zero(hidden, root) else None


def _is_zero(value: ir.Value | None, root: ir.Value) -> bool:
    """Whether `value` is 0 where `root` is: the channels that are emptied then stretch no range."""
    if value is root:
        return True
    node = producer(value)
    if node is None:
        return scalar(value) == 0.0
    zeros = [_is_zero(item, root) for item in node.inputs]
    if node.op_type == "Mul":
        return any(zeros)
    if node.op_type in ("Div", "Pow"):
        return zeros[0]
    if node.op_type in ("Add", "Sub"):
        return all(zeros)
    return node.op_type in _ODD_AT_ZERO and zeros[0]


def _split(layer: FeedForward, chosen: Indices, editor: Editor) -> None:
    graph, result = layer.down.graph, layer.down.outputs[0]
    assert isinstance(graph, ir.Graph)
    stem = f"{layer.hidden.name}/outliers"
    apart = _product(layer.up, editor, stem, layer.down, take_columns=chosen)
    if layer.biased is not None:
        place = next(place for place in (0, 1) if is_constant(layer.biased.inputs[place]))
        bias = layer.biased.inputs[place]
        assert bias is not None
        assert bias.const_value is not None
        few = editor.tensor(
            changed_weight(bias.const_value, take_columns=chosen), f"{bias.name}.outliers", graph
        )
        apart = editor.value("Add", [apart, few], before=layer.down, stem=f"{stem}/biased", like=apart)
    copies: dict[ir.Value | None, ir.Value | None] = {layer.root: apart}
    for node in layer.function:
        made = editor.node(
            node.op_type,
            [copies.get(value, value) for value in node.inputs],
            before=layer.down,
            stem=f"{stem}/{node.op_type}",
            like=apart,
        )
        made.attributes.update(node.attributes)
        copies[node.outputs[0]] = made.outputs[0]
    hidden = copies[layer.hidden]
    assert hidden is not None
    part = _product(
        layer.down, editor, f"{result.name}/outliers", layer.down, source=hidden, take_rows=chosen
    )
    width = static_dim(layer.down.inputs[1], 0)
    assert width is not None
    kept = np.ones(width)
    kept[chosen] = 0.0
    replace_constant(layer.up, 1, editor, columns=kept)
    if layer.biased is not None:
        replace_constant(layer.biased, place, editor, columns=kept)
    replace_constant(layer.down, 1, editor, rows=kept)
    total = editor.node("Add", [result, part], after=layer.down, stem=f"{result.name}/whole", like=result)
    uses = [use for use in result.uses() if use.node is not total]
    read_instead(result, total.outputs[0], uses, editor)


def _product(
    node: ir.Node,
    editor: Editor,
    stem: str,
    before: ir.Node,
    *,
    source: ir.Value | None = None,
    take_rows: Indices | None = None,
    take_columns: Indices | None = None,
) -> ir.Value:
    """A MatMul like `node` with some rows or columns of its weight, in float."""
    weight, graph = node.inputs[1], node.graph
    assert weight is not None
    assert weight.const_value is not None
    assert isinstance(graph, ir.Graph)
    tensor = changed_weight(weight.const_value, take_rows=take_rows, take_columns=take_columns)
    few = editor.tensor(tensor, f"{weight.name}.outliers", graph)
    shape = node.outputs[0].shape
    if take_columns is not None and shape is not None:
        shape = ir.Shape([*list(shape)[:-1], len(take_columns)])
    return editor.value(
        "MatMul",
        [source or node.inputs[0], few],
        before=before,
        stem=stem,
        dtype=ir.DataType.FLOAT,
        shape=shape,
    )
