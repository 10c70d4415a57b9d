"""Write a `Model` as ONNX: the same bytes for the same graph, in every process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

from .checks import graphs_of
from .metadata import strip_metadata
from .model import Model
from .shapes import quiet

INLINE_LIMIT_BYTES = 1 << 26
"""Weights of more bytes go to a data file: writing them inline takes several times their memory."""
_EXTERNAL_TENSOR_BYTES = 1024
_ALIGNMENT_BYTES = 64
_PRODUCER = "edgepress"


def to_bytes(model: Model, *, with_shapes: bool = True) -> bytes:
    """The model with all weights as one ONNX protobuf (for models below 2 GB)."""
    with quiet("onnx_ir"):
        proto = ir.to_proto(model.ir)
    return _finished(proto, with_shapes)


def save_model(
    model: Model,
    path: Path,
    *,
    external_threshold_bytes: int = INLINE_LIMIT_BYTES,
    with_shapes: bool = True,
) -> list[Path]:
    """Write `path`, and `path`.data beside it when the weights exceed the threshold.

    Weights are streamed tensor by tensor into the data file, so that memory stays bounded by the
    largest tensor. Each file is written beside its place and moved there once it is whole: the file
    that weights are mapped from may be replaced so, and a failure leaves the old files as they were.

    Args:
        model: what to write.
        path: the .onnx file to create.
        external_threshold_bytes: weights of more bytes than this in total go to the data file.
        with_shapes: also write the shapes of values in between. A file that ships has none: the
            runtime infers what it needs, and with them onnxruntime 1.31.1 fuses residual Add and
            LayerNormalization into a kernel that takes four times as long, and reuses buffers worse.

    Returns:
        The files written.

    Raises:
        OSError: as the file system reports it (no space, not writable).
    """
    if model.weight_bytes <= external_threshold_bytes:
        data = to_bytes(model, with_shapes=with_shapes)
        with _moved_into_place(path) as file:
            file.write(data)
        return [path]
    data_path = path.with_name(f"{path.name}.data")
    # Both are written before either is moved, so that the two always belong together.
    with _moved_into_place(path) as file, _moved_into_place(data_path) as data_file:
        file.write(_finished(_with_external_data(model, data_file, data_path.name), with_shapes))
        file.flush()
        data_file.flush()
    return [path, data_path]


@contextlib.contextmanager
def _moved_into_place(path: Path) -> Iterator[BinaryIO]:
    """An open file that takes the name `path` when it is complete, and vanishes on failure."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _with_external_data(model: Model, file: BinaryIO, location: str) -> onnx.ModelProto:
    """The model's protobuf; every larger tensor is written to `file` and referred to there."""
    kept: list[tuple[ir.Value, ir.TensorProtocol]] = []
    places: dict[int, int] = {}
    try:
        for graph in model.all_graphs():
            for name, value in graph.initializers.items():
                tensor = value.const_value
                if tensor is None or tensor.dtype == ir.DataType.STRING:
                    continue
                if tensor.nbytes < _EXTERNAL_TENSOR_BYTES:
                    continue
                if id(tensor) not in places:
                    places[id(tensor)] = _append(tensor, file)
                kept.append((value, tensor))
                value.const_value = ir.ExternalTensor(
                    location,
                    places[id(tensor)],
                    tensor.nbytes,
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name=name,
                )
        with quiet("onnx_ir"):
            return ir.to_proto(model.ir)
    finally:
        for value, tensor in kept:
            value.const_value = tensor


def _append(tensor: ir.TensorProtocol, file: BinaryIO) -> int:
    """Write a tensor's bytes at the next aligned place; returns the offset."""
    file.write(b"\0" * (-file.tell() % _ALIGNMENT_BYTES))
    offset = file.tell()
    if hasattr(tensor, "tofile"):
        tensor.tofile(file)
    else:
        file.write(tensor.tobytes())
    return offset


def _finished(proto: onnx.ModelProto, with_shapes: bool) -> bytes:
    """Sign the model as ours and serialise it."""
    strip_metadata(proto)
    proto.producer_name = _PRODUCER
    proto.ClearField("producer_version")
    if not with_shapes:
        for graph in graphs_of(proto.graph):
            del graph.value_info[:]
    data: bytes = proto.SerializeToString(deterministic=True)
    return data
