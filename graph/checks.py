"""What an .onnx file must fulfil before anything is built from it: nobody vouches for the file."""

from __future__ import annotations

import graphlib
import math
import re
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from .errors import ModelError, NotSupported
from .weights import SharedMap, confine, require_inside

_SKELETON_LIMIT_BYTES = 1024
# Inlined functions may call each other: a file of some lines can expand to billions of nodes.
_MOST_NODES = 1_000_000
# Every map holds a descriptor; of more data files than this each is opened only while it is read.
_MOST_OPEN_FILES = 16

Nodes = onnx.GraphProto | onnx.FunctionProto


def check_text(proto: onnx.ModelProto, *, where: str) -> None:
    """Refuse a file without a graph, and one whose names are not text (protobuf does not look).

    Raises:
        ModelError: if so.
    """
    if not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(
            "the file is not an ONNX model",
            where=where,
            why="it has no graph or no operator-set version",
            remedy="check that the file is complete; export it again",
        )
    try:
        if all(isinstance(name, str) for name in _names(proto)):
            return
        why = "a name in it is not UTF-8 text"
    except UnicodeDecodeError as error:
        why = str(error)
    raise ModelError("the file is damaged", where=where, why=why, remedy="copy or export it again")


def _names(proto: onnx.ModelProto) -> Iterator[str]:
    for entry in proto.opset_import:
        yield entry.domain
    for item in proto.metadata_props:
        yield from (item.key, item.value)
    for function in proto.functions:
        yield from (function.domain, function.name, function.overload)
        yield from (*function.input, *function.output, *function.attribute)
    for container in (proto.graph, *proto.functions):
        for node in nodes_of(container):
            yield from (node.name, node.op_type, node.domain, node.overload, *node.input, *node.output)
        for _, attribute in attributes_of(container):
            yield from (attribute.name, attribute.ref_attr_name)
    for graph in graphs_of(proto.graph):
        yield graph.name
        for value in (*graph.input, *graph.output, *graph.value_info):
            yield value.name
            yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)
        for tensor in graph.initializer:
            yield tensor.name
            yield from (text for entry in tensor.external_data for text in (entry.key, entry.value))


def check_structure(proto: onnx.ModelProto, *, where: str) -> None:
    """Run onnx's checker on the structure (without weight data, so that size does not matter).

    Raises:
        ModelError: with the checker's own words.
        NotSupported: for sparse tensors and values that are maps.
    """
    _check_opsets(proto, where)
    _check_kinds(proto, where)
    try:
        onnx.checker.check_model(_skeleton(proto))
    except (onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        raise _checker_error(error, where) from error
    _check_expansion(proto, where)


def _skeleton(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model for the checker: large weights become inputs, missing ranks are filled in."""
    skeleton = onnx.ModelProto(ir_version=max(proto.ir_version, 4))
    skeleton.opset_import.extend(proto.opset_import)
    skeleton.functions.extend(proto.functions)
    graph, source = skeleton.graph, proto.graph
    graph.name = source.name or "graph"
    graph.node.extend(source.node)
    graph.output.extend(source.output)
    graph.input.extend(source.input)
    listed = {value.name for value in source.input}
    for tensor in source.initializer:
        if tensor.name in listed:
            continue
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.ByteSize() > _SKELETON_LIMIT_BYTES:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            graph.initializer.append(tensor)
    for tensor in (*_attribute_tensors(skeleton), *_inner_weights(graph)):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:  # the checker would look for the file
            tensor.CopyFrom(onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0]))
    for value in (*graph.input, *graph.output):
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"):
            value.type.tensor_type.shape.SetInParent()  # an unknown rank is legal; the checker minds it
    return skeleton


def _check_opsets(proto: onnx.ModelProto, where: str) -> None:
    newest = onnx.defs.onnx_opset_version()
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx") and not 1 <= entry.version <= newest:
            raise ModelError(
                f"the model needs operator set {entry.version}, which is not known here",
                where=where,
                why=f"the installed onnx {onnx.__version__} knows operator sets 1 to {newest}",
                remedy=f"export the model with opset {newest} or older",
            )


def _check_kinds(proto: onnx.ModelProto, where: str) -> None:
    """Refuse by name what the graph library would drop or trip over."""
    for graph in graphs_of(proto.graph):
        if graph.sparse_initializer:
            raise _not_supported("sparse weights", where, "store them as dense tensors")
    for value in (*proto.graph.input, *proto.graph.output):
        if value.type.HasField("map_type"):
            what = f"{value.name!r}, whose type is a map,"
            raise _not_supported(what, where, "export without it (scikit-learn: options zipmap=False)")
    for container in (proto.graph, *proto.functions):
        for node, attribute in attributes_of(container):
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise _not_supported("sparse constants", where, "store them as dense tensors")
            if attribute.ref_attr_name and isinstance(container, onnx.GraphProto):
                raise ModelError(
                    "an attribute refers to a function's attribute outside of a function",
                    where=f"node {node.name or node.op_type!r}, attribute {attribute.name!r} in {where}",
                    remedy="export the model again",
                )


def _not_supported(what: str, where: str, remedy: str) -> NotSupported:
    return NotSupported(f"{what} cannot be compiled", where=where, remedy=remedy)


def _checker_error(error: Exception, where: str) -> ModelError:
    text = str(error).strip()
    first = text.splitlines()[0] if text else "unknown reason"
    unknown = re.search(r"No Op registered for (\S+)", text)
    if unknown:
        return ModelError(
            f"the model uses the unknown operator {unknown.group(1)!r}",
            where=where,
            why=first,
            remedy="export with standard ONNX operators, or correct the operator set version",
        )
    if "topologically sorted" in text or "single static assignment" in text or "not unique" in text:
        return ModelError(
            "the model's graph is cyclic, unsorted, or defines a value twice",
            where=where,
            why=re.sub(r"\s+", " ", text)[:300],
            remedy="export the model again; a valid ONNX graph lists nodes in order and has no cycle",
        )
    return ModelError(
        "the model does not pass the ONNX checker",
        where=where,
        why=re.sub(r"\s+", " ", text)[:300],
        remedy="export the model again, or repair the node that is named",
    )


def _check_expansion(proto: onnx.ModelProto, where: str) -> None:
    """Count the nodes that inlining all functions would give."""
    functions = {(item.domain, item.name, item.overload): item for item in proto.functions}
    calls = {
        key: [(node.domain, node.op_type, node.overload) for node in nodes_of(item)]
        for key, item in functions.items()
    }
    known = {key: [call for call in called if call in functions] for key, called in calls.items()}
    sizes: dict[tuple[str, str, str], int] = {}
    for key in graphlib.TopologicalSorter(known).static_order():  # the checker has refused cycles
        sizes[key] = sum(sizes.get(call, 1) for call in calls[key])
    total = sum(sizes.get((node.domain, node.op_type, node.overload), 1) for node in nodes_of(proto.graph))
    if total > _MOST_NODES:
        raise ModelError(
            f"the model has {total} nodes once its functions are inlined",
            where=where,
            why=f"more than {_MOST_NODES} are not taken",
            remedy="export the model without nested functions; do not trust this file otherwise",
        )


def nodes_of(container: Nodes) -> Iterator[onnx.NodeProto]:
    """All nodes, those of subgraphs included."""
    queue: list[Nodes] = [container]
    while queue:
        current = queue.pop()
        for node in current.node:
            yield node
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    queue.append(attribute.g)
                queue.extend(attribute.graphs)


def attributes_of(container: Nodes) -> Iterator[tuple[onnx.NodeProto, onnx.AttributeProto]]:
    """All attributes of all nodes, those of subgraphs included."""
    for node in nodes_of(container):
        for attribute in node.attribute:
            yield node, attribute


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all of its subgraphs."""
    yield graph
    for _, attribute in attributes_of(graph):
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _attribute_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for container in (proto.graph, *proto.functions):
        for _, attribute in attributes_of(container):
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _inner_weights(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for body in graphs_of(graph):
        yield from body.initializer


def open_weights(proto: onnx.ModelProto, path: Path) -> dict[str, SharedMap]:
    """Check every weight's type and size, and open every data file once, inside the model's folder.

    Returns:
        The data files by the location that the model names.

    Raises:
        ModelError: if a tensor's data does not fit its shape, or a data file is missing, unreadable,
            too short, or outside of the model's folder.
    """
    for tensor in _attribute_tensors(proto):
        place = f"constant {tensor.name!r}" if tensor.name else "a constant"
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ModelError(
                "a node attribute has external data",
                where=place,
                why="only initializers may be stored outside of the file",
                remedy="store the constant as an initializer, or inline",
            )
        _check_inline(tensor, place)
    weights = [tensor for graph in graphs_of(proto.graph) for tensor in graph.initializer]
    external = [item for item in weights if item.data_location == onnx.TensorProto.EXTERNAL]
    locations = {_entries(tensor).get("location", "") for tensor in external}
    maps: dict[str, SharedMap] = {}
    for tensor in weights:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            _check_inline(tensor, f"initializer {tensor.name!r}")
            continue
        location = _entries(tensor).get("location", "")
        if location not in maps:
            file = _data_file(path, location, tensor.name)
            maps[location] = _open(file, location, keep_open=len(locations) <= _MOST_OPEN_FILES)
        _check_extent(tensor, len(maps[location]), location)
    return maps


def _entries(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _data_file(path: Path, location: str, tensor: str) -> Path:
    # A hub cache keeps the model as a link to a blob; its data files are links beside it.
    roots = (path.parent.resolve(), path.resolve().parent)
    return require_inside(confine(path.parent, location, tensor=tensor), roots, tensor=tensor)


def _open(file: Path, location: str, *, keep_open: bool) -> SharedMap:
    try:
        if file.stat().st_size == 0:
            raise ModelError("external data file is empty", where=location, remedy="copy it again")
        return SharedMap(file, keep_open=keep_open)
    except OSError as error:
        raise ModelError(
            "external data file cannot be read",
            where=location,
            why=error.strerror or str(error),
            remedy="check the file's permissions; copy it again",
        ) from error


def _stored_bytes(tensor: onnx.TensorProto, place: str) -> int:
    try:
        bits = ir.DataType(tensor.data_type).bitwidth
    except (TypeError, ValueError) as error:
        raise _damaged(place, f"its type has the number {tensor.data_type}") from error
    if any(size < 0 for size in tensor.dims):
        raise _damaged(place, f"its shape is {list(tensor.dims)}")
    count: int = math.prod(tensor.dims)
    return -(-count * bits // 8)


def _damaged(place: str, why: str) -> ModelError:
    remedy = "the file is damaged: copy or export it again"
    return ModelError("a tensor has no valid type or shape", where=place, why=why, remedy=remedy)


def _check_inline(tensor: onnx.TensorProto, place: str) -> None:
    if tensor.data_type == onnx.TensorProto.STRING:
        needed, held, unit = math.prod(tensor.dims), len(tensor.string_data), "strings"
    else:
        needed, held, unit = _stored_bytes(tensor, place), len(tensor.raw_data), "bytes"
        if not tensor.HasField("raw_data"):
            held = _typed_bytes(tensor, needed)
    if needed != held or any(size < 0 for size in tensor.dims):
        raise ModelError(
            "a weight's data does not fit its shape",
            where=place,
            why=f"shape {list(tensor.dims)} needs {needed} {unit}, the file holds {held}",
            remedy="the file is damaged: copy or export it again",
        )


def _typed_bytes(tensor: onnx.TensorProto, needed: int) -> int:
    """Bytes in the typed field that the tensor uses instead of raw_data."""
    bits = ir.DataType(tensor.data_type).bitwidth
    if tensor.int32_data:  # one entry per element of up to 32 bits; types below 8 bits are packed
        entries = -(-math.prod(tensor.dims) // max(1, 8 // bits))
        return needed if len(tensor.int32_data) == entries else len(tensor.int32_data) * 4
    if tensor.data_type == onnx.TensorProto.UINT32:
        return 4 * len(tensor.uint64_data)
    held: int = 4 * len(tensor.float_data) + 8 * len(tensor.double_data)
    return held + 8 * (len(tensor.int64_data) + len(tensor.uint64_data))


def _check_extent(tensor: onnx.TensorProto, size_bytes: int, location: str) -> None:
    entries = _entries(tensor)
    place = f"initializer {tensor.name!r}"
    needed = _stored_bytes(tensor, place)
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", str(needed)))
    except ValueError:
        offset, length = -1, -1
    if offset < 0 or length != needed or offset + needed > size_bytes:
        raise ModelError(
            "external data does not fit its tensor",
            where=f"{place}, file {location!r}",
            why=f"needs {needed} bytes at offset {entries.get('offset', '0')}, "
            f"declares length {entries.get('length', 'none')}, the file has {size_bytes}",
            remedy="the data file is truncated or belongs to another model: copy or export both again",
        )
