"""Read an .onnx file that nobody vouches for into a `Model`."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as stock
from google.protobuf.message import DecodeError

from .errors import ModelError
from .model import Model, Origin, Task
from .weights import MappedTensor, SharedMap, confine, require_inside

_SKELETON_LIMIT_BYTES = 1024
_SIGNATURES = {
    b"PK\x03\x04": "a zip archive (a PyTorch .pt/.pt2 or a saved archive)",
    b"\x89HDF": "an HDF5 file (Keras)",
    b"version https://git-lfs": "a git-lfs pointer, not the file itself",
    b"\x80\x02": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
}


def load_model(path: Path, *, task: Task | None = None) -> Model:
    """Load, check and normalise an ONNX model; weights of external data stay in the file.

    Functions are inlined, initializers that old exporters also list as inputs become plain
    constants, and exporters' node metadata (stack traces with local paths) is dropped.

    Args:
        path: the .onnx file.
        task: what its outputs mean, if known.

    Raises:
        ModelError: if the file is missing, not ONNX, truncated, malformed, cyclic, uses unknown
            operators, or names external data that is missing or outside its folder.
    """
    proto = _read_proto(path)
    check_structure(proto, where=path.name)
    data_files = _confine_external(proto, path)
    model = ir.from_proto(proto)
    if model.functions:
        model = stock.InlinePass()(model).model
        stock.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    stock.RemoveInitializersFromInputsPass()(model)
    stock.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _adopt_weights(model, data_files)
    del proto
    model.ir_version = max(model.ir_version, 8)
    stock.NameFixPass()(model)  # decisions refer to nodes by name: none may be empty or double
    drop_metadata(model)
    files = {path.name: file_digest(path)}
    files |= {name: file_digest(source.path) for name, source in sorted(data_files.items())}
    return Model(model, origin=Origin(kind="onnx", name=path.name, files=files), task=task)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's contents, as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def drop_metadata(model: ir.Model) -> None:
    """Remove doc strings and per-node metadata; they carry paths of the exporting machine."""
    stock.ClearMetadataAndDocStringPass()(model)
    for graph in (model.graph, *model.graph.subgraphs()):
        graph.metadata_props.clear()
        graph.doc_string = None
        values = [*graph.inputs, *graph.initializers.values()]
        values += [value for node in graph for value in node.outputs]
        for value in values:
            value.metadata_props.clear()
            value.doc_string = None
    model.doc_string = None


def require_no_nan(model: Model) -> None:
    """Refuse weights that hold NaN: every later figure would be meaningless.

    Raises:
        ModelError: naming the first such tensor.
    """
    for graph in model.all_graphs():
        for name, value in sorted(graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 16:
                continue
            if np.isnan(tensor.numpy()).any():
                raise ModelError(
                    "the model has NaN weights",
                    where=f"initializer {name!r} in {model.origin.name}",
                    why="training diverged, or the file was damaged",
                    remedy="re-export from a checkpoint whose weights are finite",
                )
            if isinstance(tensor, MappedTensor):
                tensor.release()


def check_structure(proto: onnx.ModelProto, *, where: str) -> None:
    """Run onnx's checker on the structure (without weight data, so that size does not matter).

    Raises:
        ModelError: with the checker's own words.
    """
    if not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(
            "the file is not an ONNX model",
            where=where,
            why="it has no graph or no operator-set version",
            remedy="check that the file is complete; export it again",
        )
    skeleton = onnx.ModelProto(ir_version=max(proto.ir_version, 4))
    skeleton.opset_import.extend(proto.opset_import)
    skeleton.functions.extend(proto.functions)
    graph, source = skeleton.graph, proto.graph
    graph.name = source.name or "graph"
    graph.node.extend(source.node)
    graph.output.extend(source.output)
    graph.sparse_initializer.extend(source.sparse_initializer)
    listed = {value.name for value in source.input}
    graph.input.extend(source.input)
    for tensor in source.initializer:
        if tensor.name in listed:
            continue
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.ByteSize() > _SKELETON_LIMIT_BYTES:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            graph.initializer.append(tensor)
    try:
        onnx.checker.check_model(skeleton)
    except onnx.checker.ValidationError as error:
        raise _checker_error(error, where) from error


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
    if "topologically sorted" in text or "Graph must be in single static assignment" in text:
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


def _read_proto(path: Path) -> onnx.ModelProto:
    if not path.exists():
        raise ModelError(
            "the model file does not exist", where=str(path), remedy="check the path and its spelling"
        )
    if not path.is_file():
        raise ModelError("the model is not a file", where=str(path), remedy="name the .onnx file itself")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError("the model file cannot be read", where=str(path), why=str(error)) from error
    if not data:
        raise ModelError("the model file is empty", where=str(path), remedy="export or copy it again")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        kind = next((text for magic, text in _SIGNATURES.items() if data.startswith(magic)), None)
        raise ModelError(
            "the file is not a readable ONNX model",
            where=str(path),
            why=f"it looks like {kind}" if kind else "it is truncated, damaged or of another format",
            remedy="pass the .onnx file; if it is one, copy or export it again",
        ) from error
    return proto


def _graphs(proto: onnx.GraphProto) -> list[onnx.GraphProto]:
    found, queue = [], [proto]
    while queue:
        graph = queue.pop()
        found.append(graph)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    queue.append(attribute.g)
                elif attribute.type == onnx.AttributeProto.GRAPHS:
                    queue.extend(attribute.graphs)
    return found


def _confine_external(proto: onnx.ModelProto, path: Path) -> dict[str, SharedMap]:
    """Open every external data file once, inside the model's folder, and check every extent."""
    folder = path.parent
    # A hub cache keeps the model as a link to a blob; its data files are links beside it.
    blob_folder = path.resolve().parent
    roots = (folder.resolve(), blob_folder)
    maps: dict[str, SharedMap] = {}
    for graph in _graphs(proto.graph):
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.t.data_location == onnx.TensorProto.EXTERNAL:
                    raise ModelError(
                        "a node attribute has external data",
                        where=f"node {node.name or node.op_type!r}, attribute {attribute.name!r}",
                        why="only initializers may be stored outside of the file",
                        remedy="store the constant as an initializer, or inline",
                    )
        for tensor in graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                _check_inline_size(tensor)
                continue
            entries = {entry.key: entry.value for entry in tensor.external_data}
            location = entries.get("location", "")
            if location not in maps:
                file = require_inside(
                    confine(folder, location, tensor=tensor.name), roots, tensor=tensor.name
                )
                if file.stat().st_size == 0:
                    raise ModelError("external data file is empty", where=location, remedy="copy it again")
                maps[location] = SharedMap(file)
            _check_extent(tensor, entries, len(maps[location]), location)
    return maps


def _stored_bytes(tensor: onnx.TensorProto) -> int:
    count = 1
    for size in tensor.dims:
        count *= size
    return -(-count * ir.DataType(tensor.data_type).bitwidth // 8)


def _check_inline_size(tensor: onnx.TensorProto) -> None:
    if tensor.HasField("raw_data") and len(tensor.raw_data) != _stored_bytes(tensor):
        raise ModelError(
            "a weight's data does not fit its shape",
            where=f"initializer {tensor.name!r}",
            why=f"shape {list(tensor.dims)} needs {_stored_bytes(tensor)} bytes, "
            f"the file holds {len(tensor.raw_data)}",
            remedy="the file is damaged: copy or export it again",
        )


def _check_extent(tensor: onnx.TensorProto, entries: dict[str, str], size_bytes: int, location: str) -> None:
    needed = _stored_bytes(tensor)
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", str(needed)))
    except ValueError:
        offset, length = -1, -1
    if offset < 0 or length != needed or offset + needed > size_bytes:
        raise ModelError(
            "external data does not fit its tensor",
            where=f"initializer {tensor.name!r}, file {location!r}",
            why=f"needs {needed} bytes at offset {entries.get('offset', '0')}, "
            f"declares length {entries.get('length', 'none')}, the file has {size_bytes}",
            remedy="the data file is truncated or belongs to another model: copy or export both again",
        )


def _adopt_weights(model: ir.Model, data_files: dict[str, SharedMap]) -> None:
    """Replace tensors that lean on the protobuf or on onnx_ir's per-tensor maps by our own."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                source = data_files[str(tensor.location)]
                value.const_value = MappedTensor(name, tensor.dtype, tensor.shape, source, tensor.offset or 0)
            elif tensor is not None and tensor.dtype != ir.DataType.STRING and tensor.dtype.bitwidth >= 8:
                value.const_value = ir.tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=name)
