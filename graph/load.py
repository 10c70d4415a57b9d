"""Read an .onnx file that nobody vouches for into a `Model`."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as stock
from google.protobuf.message import DecodeError

from .checks import check_structure, check_text, graphs_of, nodes_of, open_weights
from .edit import name_nodes
from .errors import ModelError
from .metadata import strip_metadata
from .model import Model, Origin, Task
from .shapes import quiet
from .weights import MappedTensor, SharedMap, is_file

# (position, magic bytes, what it is)
_SIGNATURES = (
    (0, b"PK\x03\x04", "a zip archive (a PyTorch .pt/.pt2 or a saved archive)"),
    (0, b"\x89HDF", "an HDF5 file (Keras)"),
    (0, b"\x1f\x8b", "a gzip archive: unpack it first"),
    (0, b"version https://git-lfs", "a git-lfs pointer, not the file itself: run git lfs pull"),
    (0, b"\x80\x02", "a Python pickle"),
    (0, b"\x80\x03", "a Python pickle"),
    (0, b"\x80\x04", "a Python pickle"),
    (0, b"\x80\x05", "a Python pickle"),
    (0, b"<", "a web page or an XML file"),
    (0, b"{", "a JSON file"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (4, b"ORTM", "onnxruntime's own .ort format"),
    (8, b"{", "a safetensors file"),
)
_NAN_CHUNK_ELEMENTS = 1 << 22


def load_model(path: Path, *, task: Task | None = None) -> Model:
    """Load, check and normalise an ONNX model; weights of external data stay in the file.

    Functions are inlined. Initializers that are also listed as inputs become plain constants: old
    exporters list all of them, and a default that a caller could override would bar every fusion.
    Every node gets a name of its own. Doc strings, exporters' notes and metadata that names a local
    path are dropped; other model-level metadata (labels, authors) is kept.

    Args:
        path: the .onnx file.
        task: what its outputs mean, if known.

    Raises:
        ModelError: if the file is missing, not ONNX, truncated, malformed, cyclic, uses unknown
            operators, or names external data that is missing or outside its folder.
        NotSupported: for sparse tensors and values that are maps.
    """
    proto = _read_proto(path)
    check_text(proto, where=path.name)
    _normalise(proto)
    check_structure(proto, where=path.name)
    data_files = open_weights(proto, path)
    try:
        with quiet("onnx_ir"):
            model = ir.from_proto(proto)
            if model.functions:
                model = stock.InlinePass()(model).model
                stock.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
            stock.RemoveInitializersFromInputsPass()(model)
            stock.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    except (RuntimeError, ValueError, TypeError) as error:  # onnx_ir's own errors are RuntimeErrors
        raise _not_understood(path, error) from error
    _adopt_weights(model, data_files)
    del proto
    model.ir_version = max(model.ir_version, 8)
    name_nodes(model)
    files = {path.name: file_digest(path)}
    files |= {name: file_digest(source.path) for name, source in sorted(data_files.items())}
    return Model(model, origin=Origin(kind="onnx", name=path.name, files=files), task=task)


def _not_understood(path: Path, error: Exception) -> ModelError:
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return ModelError(
        "the model's graph cannot be built",
        where=path.name,
        why=re.sub(r"\s+", " ", str(error))[:300] or type(error).__name__,
        remedy="export the model again, or repair what is named",
    )


def file_digest(path: Path) -> str:
    """SHA-256 of a file's contents, as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_no_nan(model: Model) -> None:
    """Refuse weights that hold NaN: every later figure would be meaningless.

    Raises:
        ModelError: naming the first such tensor.
    """
    for graph in model.all_graphs():
        for name, value in sorted(graph.initializers.items()):
            tensor = value.const_value
            if tensor is not None and tensor.dtype.is_floating_point() and _holds_nan(tensor):
                raise ModelError(
                    "the model has NaN weights",
                    where=f"initializer {name!r} in {model.origin.name}",
                    why="training diverged, or the file was damaged",
                    remedy="re-export from a checkpoint whose weights are finite",
                )


def _holds_nan(tensor: ir.TensorProtocol) -> bool:
    """Whether any element is NaN, read piece by piece."""
    flat = tensor.numpy().reshape(-1)
    found = False
    for start in range(0, flat.size, _NAN_CHUNK_ELEMENTS):
        found = bool(np.isnan(flat[start : start + _NAN_CHUNK_ELEMENTS]).any())
        if isinstance(tensor, MappedTensor):
            tensor.release()
        if found:
            break
    return found


def _read_proto(path: Path) -> onnx.ModelProto:
    if not is_file(path):
        if os.path.lexists(path):
            remedy = "name the .onnx file itself"
            raise ModelError("the model is not a file", where=str(path), remedy=remedy)
        remedy = "check the path and its spelling"
        raise ModelError("the model file does not exist", where=str(path), remedy=remedy)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(
            "the model file cannot be read",
            where=str(path),
            why=error.strerror or str(error),
            remedy="check the file's permissions; copy it again",
        ) from error
    if not data:
        raise ModelError("the model file is empty", where=str(path), remedy="export or copy it again")
    proto = onnx.ModelProto()
    cause: DecodeError | None = None
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        cause = error
    kind = _foreign_kind(data)
    if cause is None and (kind is None or proto.HasField("graph")):
        return proto
    raise ModelError(
        "the file is not a readable ONNX model",
        where=str(path),
        why=f"it looks like {kind}" if kind else "it is truncated, damaged or of another format",
        remedy="pass the .onnx file; if it is one, copy or export it again",
    ) from cause


def _foreign_kind(data: bytes) -> str | None:
    head = data[:64].lstrip() if data[:1].isspace() else data[:64]
    return next((text for place, magic, text in _SIGNATURES if head[place:].startswith(magic)), None)


def _normalise(proto: onnx.ModelProto) -> None:
    """Spell in one way what ONNX lets exporters spell in several; drop their notes."""
    strip_metadata(proto)
    for container in (proto, *proto.functions):
        for entry in container.opset_import:
            entry.domain = "" if entry.domain == "ai.onnx" else entry.domain
    for body in (proto.graph, *proto.functions):
        for node in nodes_of(body):
            node.domain = "" if node.domain == "ai.onnx" else node.domain
            if node.op_type == "Constant" and not node.domain:
                _spell_out_strings(node)
    for graph in graphs_of(proto.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_value < 0:  # some exporters write -1 for an unknown size
                    dim.ClearField("dim_value")


def _spell_out_strings(node: onnx.NodeProto) -> None:
    """Give a Constant of strings its value as a tensor (onnx_ir lifts only ASCII text otherwise)."""
    for attribute in node.attribute:
        if attribute.name not in ("value_string", "value_strings"):
            continue
        single = attribute.name == "value_string"
        items = [attribute.s] if single else list(attribute.strings)
        tensor = onnx.TensorProto(data_type=onnx.TensorProto.STRING, string_data=items)
        tensor.dims.extend([] if single else [len(items)])
        attribute.CopyFrom(onnx.helper.make_attribute("value", tensor))


def _adopt_weights(model: ir.Model, data_files: dict[str, SharedMap]) -> None:
    """Replace tensors that lean on the protobuf or on onnx_ir's per-tensor maps by our own."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None:
                continue
            if value.dtype not in (None, tensor.dtype):
                raise ModelError(
                    "a weight's declared type is not that of its data",
                    where=f"initializer {name!r}",
                    why=f"declared {value.dtype}, stored {tensor.dtype}",
                    remedy="export the model again",
                )
            if isinstance(tensor, ir.ExternalTensor):
                source = data_files[str(tensor.location)]
                tensor = MappedTensor(name, tensor.dtype, tensor.shape, source, tensor.offset or 0)
            elif tensor.dtype != ir.DataType.STRING and tensor.dtype.bitwidth >= 8:
                tensor = ir.tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=name)
            value.const_value = tensor
            value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
