"""Keeping the exporting machine out of a model: doc strings, exporters' notes, local paths."""

from __future__ import annotations

import re

import onnx
import onnx_ir as ir

from .checks import Nodes, graphs_of, nodes_of

# Namespaces in which exporters keep notes for themselves, and values that name a place on a machine.
_TOOL_METADATA = re.compile(r"pkg\.")
_LOCAL_PATH = re.compile(r"(^|[\s\"'=:(,;\[{|])(/\w|~/|[A-Za-z]:[\\/]|\\\\|file://)")


def strip_metadata(proto: onnx.ModelProto) -> None:
    """Remove doc strings and notes everywhere, and model metadata that names a local path.

    What else the author attached to the model as a whole (labels, licence) stays.
    """
    proto.ClearField("doc_string")
    kept = [
        (entry.key, entry.value)
        for entry in proto.metadata_props
        if not (_TOOL_METADATA.match(entry.key) or _LOCAL_PATH.search(entry.value))
    ]
    proto.ClearField("metadata_props")
    for key, value in kept:
        proto.metadata_props.add(key=key, value=value)
    for graph in graphs_of(proto.graph):
        if _LOCAL_PATH.search(graph.name):
            graph.name = "graph"
        for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            _clear(value)
        _clear(graph)
    for container in (proto.graph, *proto.functions):
        _strip_nodes(container)


def _strip_nodes(container: Nodes) -> None:
    for node in nodes_of(container):
        _clear(node)
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
            for tensor in (attribute.t, *attribute.tensors) if attribute.HasField("t") else attribute.tensors:
                _clear(tensor)


def _clear(item: onnx.GraphProto | onnx.NodeProto | onnx.ValueInfoProto | onnx.TensorProto) -> None:
    item.ClearField("doc_string")
    item.ClearField("metadata_props")


def drop_metadata(model: ir.Model) -> None:
    """Remove the same from a model in memory, where an exporter's stack traces only cost memory."""
    model.doc_string = None
    for key, text in tuple(model.metadata_props.items()):
        if _TOOL_METADATA.match(key) or _LOCAL_PATH.search(text):
            del model.metadata_props[key]
    for graph in (model.graph, *model.graph.subgraphs()):
        values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
        values += [value for node in graph for value in node.outputs]
        for item in (graph, *graph, *values):
            item.metadata_props.clear()
            item.doc_string = None
