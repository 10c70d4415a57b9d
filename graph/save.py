"""Write a `Model` as ONNX: the same bytes for the same graph, in every process."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from .load import drop_metadata
from .model import Model

INLINE_LIMIT_BYTES = 1 << 30
_EXTERNAL_TENSOR_BYTES = 1024
_PRODUCER = "edgepress"


def to_bytes(model: Model, *, with_shapes: bool = True) -> bytes:
    """The model with all weights as one ONNX protobuf (for models below 2 GB)."""
    drop_metadata(model.ir)
    return _finished(ir.to_proto(model.ir), with_shapes)


def save_model(
    model: Model,
    path: Path,
    *,
    external_threshold_bytes: int = INLINE_LIMIT_BYTES,
    with_shapes: bool = True,
) -> list[Path]:
    """Write `path`, and `path`.data beside it when the weights exceed the threshold.

    Weights are streamed tensor by tensor into the data file, so that memory stays bounded by the
    largest tensor. A mapped source file is never written over: choose another folder.

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
        path.write_bytes(to_bytes(model, with_shapes=with_shapes))
        return [path]
    drop_metadata(model.ir)
    data_name = f"{path.name}.data"
    ir.save(
        model.ir,
        path,
        external_data=data_name,
        size_threshold_bytes=_EXTERNAL_TENSOR_BYTES,
        max_workers=1,
        max_in_flight_bytes=1 << 26,
    )
    path.write_bytes(_finished(onnx.load(path, load_external_data=False), with_shapes))
    return [path, path.parent / data_name]


def _finished(proto: onnx.ModelProto, with_shapes: bool) -> bytes:
    """Sign the model as ours and serialise it."""
    proto.producer_name = _PRODUCER
    proto.ClearField("producer_version")
    if not with_shapes:
        del proto.graph.value_info[:]
    data: bytes = proto.SerializeToString(deterministic=True)
    return data
