"""Migrating outlier channels out of activations ahead of dynamic quantization."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...graph.edit import Editor, is_constant, only_use, producer, rank, remove_dead, static_dim
from ...graph.model import Model
from ...graph.passes import Outcome, Pass
from ..plan import Decision
from .outlier_noise import Float64s, changed_weight

MIGRATE = "migrate-outliers"
"""The name under which a recipe's `fusions` switches it."""

_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})
_HOMOGENEOUS = frozenset({"Relu", "LeakyRelu"})
_DEPTH = 8


class Fold(NamedTuple):
    """An operand to divide: a constant (a vector, or the columns of a weight)."""

    node: ir.Node
    place: int


class Place(NamedTuple):
    """An activation that dynamic MatMuls read: where its channels can be divided, and what makes up for it.

    `folds` are the constants that the channels of `value` come from; None where a Mul has to be put
    between `value` and the products.
    """

    value: ir.Value
    products: tuple[ir.Node, ...]
    folds: tuple[Fold, ...] | None


def migratable(model: Model, decisions: Sequence[Decision]) -> list[str]:
    """Activations that a planned dynamic MatMul reads and whose channels can be scaled."""
    planned = {item.node for item in decisions if item.form == "dynamic"}
    return [
        str(place.value.name)
        for place in places(model)
        if any(product.name in planned for product in place.products)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MigrateOutliers(Pass):
    """Divide the channels of activations by factors, and multiply the rows of the weights that read them.

    Where the channels come from constants (the scale and bias of a normalization, the weight of a linear
    layer up to a Relu or the product of a gated unit), those are divided: no cost at run time. Otherwise
    (a residual connection reads them as well) a Mul stands in front of the products. The function is the
    same. Source: Xiao et al. 2023 (SmoothQuant), arXiv:2211.10438, equation 3.

    Attributes:
        factors: activation -> what its channels are divided by, shape (channels,).
    """

    factors: Mapping[str, Float64s]

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome = Outcome()
        editor = Editor(model)
        for place in tuple(places(model)):
            by = self.factors.get(str(place.value.name))
            if by is None:
                continue
            if len(by) != static_dim(place.products[0].inputs[1], 0):
                outcome.refuse(
                    place.products[0].name or "", MIGRATE, "the calibrated channels are not the weight's"
                )
                continue
            _migrate(place, by, editor)
            outcome.count(MIGRATE)
        if outcome.applied:
            remove_dead(model)
        return outcome


def places(model: Model) -> Iterator[Place]:
    """All activations of the main graph that can be migrated, each once."""
    for node in model.graph:
        for value in node.outputs[:1]:
            products = tuple(use.node for use in value.uses() if is_linear(use.node, value))
            products = tuple(dict.fromkeys(item for item in products if item.graph is node.graph))
            width = static_dim(products[0].inputs[1], 0) if products else None
            if width is None or value.dtype != ir.DataType.FLOAT:
                continue
            alone = len(value.uses()) == len(products) and not value.is_graph_output()
            folds = _constants_of(value, width, _DEPTH) if alone else None
            if folds is not None or _norm_vectors(value, width) is not None:
                yield Place(value, products, None if folds is None else tuple(folds))


def is_linear(node: ir.Node, source: ir.Value) -> bool:
    """Whether a node is a product of `source` with a constant float32 weight [K, N]."""
    if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx") or node.inputs[0] is not source:
        return False
    weight = node.inputs[1]
    return (
        is_constant(weight) and rank(weight) == 2 and weight is not None and weight.dtype == ir.DataType.FLOAT
    )


def _norm_vectors(value: ir.Value, width: int) -> list[Fold] | None:
    """The scale and bias of the normalization that makes `value`, or None."""
    node = value.producer()
    if node is None:
        return None
    if node.op_type in _NORMS:
        if value is not node.outputs[0] or static_dim(node.inputs[1], -1) != width:
            return None
        folds = [Fold(node, place) for place in range(1, len(node.inputs)) if node.inputs[place] is not None]
        return folds if all(_is_vector(fold, width) for fold in folds) else None
    if node.op_type == "Mul" and not node.domain:
        vectors = [Fold(node, place) for place in (0, 1) if _is_vector(Fold(node, place), width)]
        return vectors if len(vectors) == 1 else None
    return None


def _is_vector(fold: Fold, width: int) -> bool:
    value = fold.node.inputs[fold.place]
    if value is None or not is_constant(value) or value.dtype != ir.DataType.FLOAT:
        return False
    return rank(value) == 1 and static_dim(value, 0) == width


def _constants_of(value: ir.Value, width: int, depth: int) -> list[Fold] | None:
    """The constants to divide so that the channels of `value` (read nowhere else) are divided, or None."""
    folds = _norm_vectors(value, width)
    node = producer(value)
    if folds is not None or node is None or depth == 0:
        return folds
    if node.op_type in _HOMOGENEOUS:
        return _through(node, 0, width, depth)
    if node.op_type == "Mul":
        # A gated unit: one factor is enough, and the one behind the activation function has none.
        found = (_through(node, place, width, depth) for place in (0, 1))
        return next((item for item in found if item is not None), None)
    if node.op_type == "Add":
        vector = next((place for place in (0, 1) if _is_vector(Fold(node, place), width)), None)
        if vector is None:
            return None
        before = _through(node, 1 - vector, width, depth)
        return None if before is None else [*before, Fold(node, vector)]
    source = node.inputs[0] if node.inputs else None
    if source is not None and is_linear(node, source) and static_dim(node.inputs[1], 1) == width:
        return [Fold(node, 1)]
    return None


def _through(node: ir.Node, place: int, width: int, depth: int) -> list[Fold] | None:
    source = node.inputs[place]
    if source is None or only_use(source) is not node or static_dim(source, -1) != width:
        return None
    maker = source.producer()
    return None if maker is None or maker.graph is not node.graph else _constants_of(source, width, depth - 1)


def _migrate(place: Place, by: Float64s, editor: Editor) -> None:
    first = min(place.products, key=_position)
    assert isinstance(first.graph, ir.Graph)
    if place.folds is None:
        inverse = editor.tensor(
            ir.tensor((1.0 / by).astype(np.float32)), f"{place.value.name}.migration", first.graph
        )
        source = editor.value(
            "Mul", [place.value, inverse], before=first, stem=f"{place.value.name}/migrated", like=place.value
        )
        for product in place.products:
            product.replace_input_with(0, source)
    else:
        for fold in place.folds:
            replace_constant(fold.node, fold.place, editor, columns=1.0 / by)
    moved: dict[int, ir.Value] = {}
    for product in place.products:
        weight = product.inputs[1]
        if id(weight) in moved:  # tied: two products of one activation with one weight
            product.replace_input_with(1, moved[id(weight)])
        else:
            moved[id(weight)] = replace_constant(product, 1, editor, rows=by)


def _position(node: ir.Node) -> int:
    """Where a node stands in its graph."""
    assert isinstance(node.graph, ir.Graph)
    return next(index for index, other in enumerate(node.graph) if other is node)


def replace_constant(
    node: ir.Node,
    place: int,
    editor: Editor,
    *,
    rows: Float64s | None = None,
    columns: Float64s | None = None,
) -> ir.Value:
    """Let one input of a node be its constant times factors per row or column, in a tensor of its own."""
    value = node.inputs[place]
    assert value is not None
    assert value.const_value is not None
    assert isinstance(node.graph, ir.Graph)
    tensor = changed_weight(value.const_value, rows=rows, columns=columns)
    made = editor.tensor(tensor, value.name or "weight", node.graph)
    node.replace_input_with(place, made)
    return made
