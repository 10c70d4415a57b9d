"""Merging what is there twice: equal constants, equal nodes, and Identity nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

import onnx_ir as ir

from .edit import Editor, can_stand_for, is_constant, remove_dead
from .model import Model, tensor_digest
from .passes import Outcome, Pass

_MOST_ELEMENTS = 1024
# Tables of positions and indices that every layer of an export carries its own copy of. Equal float weights
# stay apart: what is tied cannot be changed for one reader.
_MOST_INDICES = 1 << 18
_INDEX_TYPES = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})
# Two equal nodes of these draw two different numbers; an Identity is only left where it makes an output.
_NOT_MERGED = frozenset(
    {"RandomUniform", "RandomNormal", "RandomUniformLike", "RandomNormalLike", "Multinomial"}
    | {"Bernoulli", "Dropout", "Identity"}
)
# Operators of other domains may have a state or an effect.
_PURE_DOMAINS = frozenset({"", "ai.onnx.ml", "com.microsoft"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeDuplicates(Pass):
    """Remove Identity nodes, merge equal small constants and equal nodes, also in subgraphs.

    Written here because onnx_ir's passes rename graph outputs that share a source, merge Bernoulli
    draws, and leave subgraphs out.
    """

    def run(self, model: Model) -> Outcome:
        """See `Pass.run`."""
        outcome = Outcome()
        editor = Editor(model)
        for graph in tuple(model.all_graphs()):
            outcome.count("identity", _drop_identities(graph, editor))
            outcome.count("equal-constant", _merge_constants(graph))
            outcome.count("equal-node", _merge_nodes(graph, editor))
        if outcome.applied:
            remove_dead(model)
        return outcome


def _drop_identities(graph: ir.Graph, editor: Editor) -> int:
    dropped = 0
    for node in tuple(graph):
        source = node.inputs[0] if node.op_type == "Identity" and node.domain == "" else None
        if source is None:
            continue
        if can_stand_for(node.outputs[0], source):
            editor.replace(node.outputs[0], source)
            graph.remove(node, safe=True)
            dropped += 1
    return dropped


def _merge_constants(graph: ir.Graph) -> int:
    first: dict[str, ir.Value] = {}
    merged = 0
    for name, value in tuple(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or not is_constant(value) or value.is_graph_output():
            continue
        if tensor.size > (_MOST_INDICES if tensor.dtype in _INDEX_TYPES else _MOST_ELEMENTS):
            continue
        kept = first.setdefault(tensor_digest(tensor), value)
        if kept is not value:
            ir.convenience.replace_all_uses_with(value, kept)
            del graph.initializers[name]
            merged += 1
    return merged


def _merge_nodes(graph: ir.Graph, editor: Editor) -> int:
    first: dict[Hashable, ir.Node] = {}
    merged = 0
    for node in tuple(graph):
        key = _node_key(node)
        kept = node if key is None else first.setdefault(key, node)
        if kept is node:
            continue
        for old, new in zip(node.outputs, kept.outputs, strict=True):
            if not (old.uses() or old.is_graph_output()):
                continue
            if not new.name:  # left out there, but read here
                new.name = editor.fresh_name(old.name or node.op_type)
            editor.replace(old, new)
        graph.remove(node, safe=True)
        merged += 1
    return merged


def _node_key(node: ir.Node) -> Hashable | None:
    """Equal for nodes that compute the same; None where that cannot be said."""
    if node.op_type in _NOT_MERGED or node.domain not in _PURE_DOMAINS:
        return None
    attributes = []
    for name in sorted(node.attributes):
        key = _attribute_key(node.attributes[name])
        if key is None:
            return None
        attributes.append((name, key))
    inputs = tuple(None if value is None else id(value) for value in node.inputs)
    return node.op_identifier(), len(node.outputs), inputs, tuple(attributes)


_PLAIN = frozenset(
    {
        ir.AttributeType.INT,
        ir.AttributeType.INTS,
        ir.AttributeType.FLOAT,
        ir.AttributeType.FLOATS,
        ir.AttributeType.STRING,
        ir.AttributeType.STRINGS,
    }
)


def _attribute_key(attribute: ir.Attr) -> Hashable | None:
    if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().size <= _MOST_ELEMENTS:
        return tensor_digest(attribute.as_tensor())
    if attribute.type not in _PLAIN:
        return None
    value = attribute.value  # repr: unlike ==, it tells 0.0 from -0.0
    return attribute.type, repr(tuple(value)) if isinstance(value, (list, tuple)) else repr(value)
