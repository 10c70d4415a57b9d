"""Attention layers with tokens in one axis, sequence first: head splits and joins that need no copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import onnx_ir as ir

from ...graph.edit import (
    Editor,
    int_attribute,
    integers,
    is_constant,
    only_use,
    permutation,
    producer,
    rank,
    static_dim,
)
from ...graph.model import Model
from ...graph.passes import Outcome, Pass
from ...graph.symbolic import axis_terms
from .rewire import read_instead
from .sequence_sizes import Leading, SequenceSizes

SEQUENCE_MAJOR = "sequence-major"
"""The name under which a recipe's `fusions` switches it."""

_UNARY = frozenset(
    {
        "Abs", "Cast", "Celu", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity",
        "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign",
        "Sqrt", "Swish", "Tanh",
    }
)  # fmt: skip
_BINARY = frozenset({"Add", "Sub", "Mul", "Div", "Pow"})
_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})
_REDUCTIONS = frozenset({"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"})
_LAST = (-1, 2)
_SPLIT_ORDERS: dict[tuple[int, ...], tuple[int, ...]] = {
    (0, 2, 1, 3): (1, 2, 0, 3),
    (0, 2, 3, 1): (1, 2, 3, 0),
}
_JOIN_ORDER, _JOINED = (0, 2, 1, 3), (2, 0, 1, 3)
_DEPTH = 8


class _Heads(NamedTuple):
    """A Reshape between [B, S, H] and [B, S, heads, H / heads], and the Transposes next to it."""

    reshape: ir.Node
    turns: tuple[ir.Node, ...]


@dataclasses.dataclass(kw_only=True)
class _Region:
    """Nodes that compute token by token on [B, S, *], and the head splits and joins at their edge."""

    graph: ir.Graph
    leading: Leading
    splits: list[_Heads]
    joins: list[_Heads]
    nodes: dict[ir.Node, None] = dataclasses.field(default_factory=dict)
    values: dict[ir.Value, None] = dataclasses.field(default_factory=dict)

    def inside(self) -> set[ir.Node]:
        """All nodes that will read or make values of two axes."""
        return set(self.nodes) | {item.reshape for item in (*self.splits, *self.joins)}

    def entries(self) -> list[ir.Value]:
        """Values of three axes that the region reads and does not make."""
        makers = set(self.nodes) | {item.reshape for item in self.joins}
        return [value for value in self.values if value.producer() not in makers]

    def exits(self) -> list[ir.Value]:
        """Values that the region makes and others read, the graph's outputs included."""
        inside, entries = self.inside(), set(self.entries())
        return [
            value
            for value in self.values
            if value not in entries
            and (value.is_graph_output() or any(use.node not in inside for use in value.uses()))
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceMajor(Pass):
    """[batch, sequence, hidden] between attention layers -> [sequence * batch, hidden].

    Heads of [sequence, batch, heads, width] stand in a layout that onnxruntime's FusedMatMul reads with
    strides (transBatchA, transBatchB): the Transposes of queries, keys and values become part of the
    products. With batch first they are copies. Measured with onnxruntime 1.31.1, x86-64 with AMX, dynamic
    INT8, 1 thread: 4 to 7 % of MiniLM's time. Static INT8 loses by it (the runtime makes float Gemm
    of products with two axes ahead of its integer fusions): for dynamic plans only.

    Everything else is left as it was: the ids of embeddings are turned instead of what is looked up,
    and what leaves the region is turned back.
    """

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome = Outcome()
        editor = Editor(model)
        for region in _regions(model.graph):
            first = region.joins[0].reshape.name or ""
            copies = len(region.entries()) + len(region.exits())
            outside = [value for value in region.exits() if value.is_graph_output()]
            if 2 * copies > len(region.splits) + len(region.joins):
                outcome.refuse(
                    first, SEQUENCE_MAJOR, "turning what goes in and out would cost more than it saves"
                )
            elif any(value not in set(model.graph.outputs) for value in outside):
                outcome.refuse(
                    first, SEQUENCE_MAJOR, "the body of a control-flow operator returns its values"
                )
            else:
                _apply(region, editor)
                outcome.count(SEQUENCE_MAJOR)
        return outcome


def _regions(graph: ir.Graph) -> Iterator[_Region]:
    found: dict[Leading, _Region] = {}
    for node in graph:
        if node.op_type != "Reshape" or node.domain not in ("", "ai.onnx"):
            continue
        split, join = _split_heads(node), _joined_heads(node)
        seed = node.inputs[0] if split is not None else node.outputs[0]
        leading = _leading(seed) if split is not None or join is not None else None
        if leading is None or seed is None:
            continue
        region = found.setdefault(leading, _Region(graph=graph, leading=leading, splits=[], joins=[]))
        if split is not None:
            region.splits.append(split)
        elif join is not None:
            region.joins.append(join)
        _grow(region, seed)
    # Seeds that nothing else joins (attention without linear layers around) are no stream.
    yield from (region for region in found.values() if region.splits and region.joins and region.nodes)


def _leading(value: ir.Value | None) -> Leading | None:
    """The first two of three axes, if they are known by name or number."""
    terms = axis_terms(value)
    if terms is None or len(terms) != 3 or any(isinstance(term, tuple) for term in terms[:2]):
        return None
    return terms[0], terms[1]


def _split_heads(node: ir.Node) -> _Heads | None:
    """[B, S, H] -> [B, S, N, D] that only Transposes to [B, N, S, D] or [B, N, D, S] read."""
    result, leading = node.outputs[0], _leading(node.inputs[0])
    terms = axis_terms(result)
    if leading is None or terms is None or len(terms) != 4 or tuple(terms[:2]) != leading:
        return None
    if not all(isinstance(term, int) for term in terms[2:]) or result.is_graph_output():
        return None
    turns = tuple(use.node for use in result.uses())
    if not turns or any(turn.op_type != "Transpose" or turn.graph is not node.graph for turn in turns):
        return None
    orders = [tuple(permutation(turn) or ()) for turn in turns]
    return _Heads(node, turns) if all(order in _SPLIT_ORDERS for order in orders) else None


def _joined_heads(node: ir.Node) -> _Heads | None:
    """Transpose of [B, N, S, D] to [B, S, N, D] -> [B, S, N * D]."""
    turn, leading = producer(node.inputs[0], "Transpose"), _leading(node.outputs[0])
    if turn is None or leading is None or turn.graph is not node.graph:
        return None
    if only_use(turn.outputs[0]) is not node or tuple(permutation(turn) or ()) != _JOIN_ORDER:
        return None
    terms = axis_terms(turn.outputs[0])
    if terms is None or tuple(terms[:2]) != leading or static_dim(node.outputs[0], 2) is None:
        return None
    return _Heads(node, (turn,))


def _grow(region: _Region, seed: ir.Value) -> None:
    """Add every token-wise node that is connected with `seed`."""
    pending = [seed]
    while pending:
        value = pending.pop()
        if value in region.values:
            continue
        region.values[value] = None
        maker = value.producer()
        around = [*([] if maker is None else [maker]), *(use.node for use in value.uses())]
        for node in around:
            if (
                node not in region.nodes
                and node.graph is region.graph
                and _is_token_wise(node, region.leading)
            ):
                region.nodes[node] = None
                pending += _streams(node.inputs, region.leading)
                pending += list(node.outputs[:1] if node.op_type != "Split" else node.outputs)


def _streams(values: Iterable[ir.Value | None], leading: Leading) -> list[ir.Value]:
    return [
        value
        for value in values
        if value is not None and not is_constant(value) and _leading(value) == leading
    ]


def _is_token_wise(node: ir.Node, leading: Leading) -> bool:
    """Whether a node of the main graph computes each token by itself, whatever the axes in front."""
    if node.domain not in ("", "ai.onnx") and node.op_type not in _NORMS:
        return False
    made = node.outputs if node.op_type == "Split" else node.outputs[:1]
    if len(_streams(made, leading)) != len(made) or static_dim(made[0], 2) is None:
        return False
    if any(value.uses() or value.is_graph_output() for value in node.outputs[len(made) :]):
        return False
    streams = set(_streams(node.inputs, leading))
    others = [value for value in node.inputs if value is not None and value not in streams]
    if not streams:
        return False
    if node.op_type in _UNARY:
        return not others
    if node.op_type in _BINARY:
        return all((rank(value) or 0) <= 1 and value.shape is not None for value in others)
    if node.op_type == "Clip":
        return node.inputs[0] in streams and all(rank(value) == 0 for value in others)
    if node.inputs[0] not in streams or len(streams) != 1:
        return False
    if node.op_type == "MatMul":
        return is_constant(node.inputs[1]) and rank(node.inputs[1]) == 2
    if node.op_type in _NORMS:
        return int_attribute(node, "axis", -1) in _LAST and all((rank(value) or 0) == 1 for value in others)
    if node.op_type == "Softmax":
        return int_attribute(node, "axis", -1) in _LAST
    if node.op_type == "Split":
        return int_attribute(node, "axis", 0) in _LAST
    if node.op_type in _REDUCTIONS and int_attribute(node, "keepdims", 1):
        axes = list(node.attributes["axes"].as_ints()) if "axes" in node.attributes else None
        return (axes or (integers(others[0]) if len(others) == 1 else None)) == [-1]
    return False


def _apply(region: _Region, editor: Editor) -> None:
    entries, exits, inside = region.entries(), region.exits(), region.inside()
    order = {node: place for place, node in enumerate(region.graph)}
    entries.sort(key=lambda value: -1 if (maker := value.producer()) is None else order[maker])
    made = {value: value.shape for value in region.values if value.producer() in inside}
    turned = [_turned(value, inside, region, editor, _DEPTH) for value in entries]
    outside = {value: [use for use in value.uses() if use.node not in inside] for value in exits}
    sizes = SequenceSizes.of(turned[0], region.leading, editor, region.graph)
    for value, source in zip(entries, turned, strict=True):
        flat = sizes.flat(source)
        for use in tuple(source.uses() if source is value else value.uses()):
            if use.node in inside:
                use.node.replace_input_with(use.idx, flat)
    for node in region.nodes:
        if "axis" in node.attributes:
            node.attributes["axis"] = ir.AttrInt64("axis", -1)
    for value in made:
        value.shape = sizes.tokens(value)
    for heads in region.splits:
        _split_sequence_major(heads, sizes)
    for heads in region.joins:
        _join_sequence_major(heads, sizes)
    for value in exits:
        _turn_back(value, made[value], outside[value], sizes, editor)


def _split_sequence_major(heads: _Heads, sizes: SequenceSizes) -> None:
    result = heads.reshape.outputs[0]
    inner = [static_dim(result, 2), static_dim(result, 3)]
    heads.reshape.replace_input_with(1, sizes.vector(*(size for size in inner if size is not None)))
    result.shape = ir.Shape([*sizes.dims, *inner])
    for turn in heads.turns:
        order = _SPLIT_ORDERS[tuple(permutation(turn) or ())]
        turn.attributes["perm"] = ir.AttrInt64s("perm", order)


def _join_sequence_major(heads: _Heads, sizes: SequenceSizes) -> None:
    (turn,) = heads.turns
    turn.attributes["perm"] = ir.AttrInt64s("perm", _JOINED)
    result, shape = heads.reshape.outputs[0], turn.outputs[0].shape
    turn.outputs[0].shape = None if shape is None else ir.Shape([*sizes.dims, *list(shape)[2:]])
    heads.reshape.replace_input_with(1, sizes.flat_target(static_dim(result, 1)))
    heads.reshape.attributes.pop("allowzero", None)


def _turned(value: ir.Value, readers: set[ir.Node], region: _Region, editor: Editor, depth: int) -> ir.Value:
    """`value` [B, S, X] as [S, B, X]: computed so where only `readers` read it, else transposed."""
    node = producer(value)
    alone = not value.is_graph_output() and all(use.node in readers for use in value.uses())
    movable = node is not None and node.graph is region.graph and node not in region.nodes and depth > 0
    if node is not None and alone and movable and _turn_in_place(node, region, editor, depth):
        if value.shape is not None:
            value.shape = ir.Shape([value.shape[1], value.shape[0], value.shape[2]])
        return value
    return _transposed(value, (1, 0, 2), editor, region.graph)


def _turn_in_place(node: ir.Node, region: _Region, editor: Editor, depth: int) -> bool:
    """Let a lookup or a sum of three axes come out sequence first; False if it is neither."""
    if node.op_type == "Gather":
        table, ids = node.inputs
        if int_attribute(node, "axis", 0) or rank(table) != 2 or rank(ids) != 2 or ids is None:
            return False
        node.replace_input_with(1, _transposed(ids, (1, 0), editor, region.graph))
        return True
    if node.op_type not in _BINARY or any(rank(value) not in (0, 1, 3) for value in node.inputs):
        return False
    turned: dict[ir.Value, ir.Value] = {}
    for place, value in enumerate(node.inputs):
        if value is not None and rank(value) == 3:
            if value not in turned:
                turned[value] = _turned(value, {node}, region, editor, depth - 1)
            node.replace_input_with(place, turned[value])
    return True


def _transposed(value: ir.Value, order: tuple[int, ...], editor: Editor, graph: ir.Graph) -> ir.Value:
    """A Transpose right behind what makes `value`, or at the head of the graph."""
    maker = value.producer()
    shape = None if value.shape is None else ir.Shape([value.shape[axis] for axis in order])
    return editor.value(
        "Transpose",
        [value],
        {"perm": order},
        before=graph[0] if maker is None else None,
        after=maker,
        stem=f"{value.name}/sequence_major",
        dtype=value.dtype,
        shape=shape,
    )


def _turn_back(
    value: ir.Value,
    shape: ir.Shape | None,
    uses: Sequence[tuple[ir.Node, int]],
    sizes: SequenceSizes,
    editor: Editor,
) -> None:
    """[S * B, X] -> [B, S, X] for those outside."""
    maker, width = value.producer(), static_dim(value, 1)
    assert maker is not None
    assert width is not None
    apart = editor.value(
        "Reshape",
        [value, sizes.vector(width)],
        after=maker,
        stem=f"{value.name}/apart",
        dtype=value.dtype,
        shape=ir.Shape([*sizes.dims, width]),
    )
    back = editor.value(
        "Transpose",
        [apart],
        {"perm": (1, 0, 2)},
        after=apart.producer(),
        stem=f"{value.name}/batch_first",
        dtype=value.dtype,
        shape=shape,
    )
    read_instead(value, back, uses, editor)
