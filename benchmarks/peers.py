"""onnxruntime's own quantizers, as its documentation says to use them."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Feeds = Mapping[str, npt.NDArray[Any]]
# The quantizers take a model from this opset on; older ones have to be converted first.
_OLDEST_OPSET = 13
_CONVERTED_OPSET = 17


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep the quantizers' advice and progress off the screen; errors still come through."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def quantize_dynamic(model: Path, output: Path) -> Path:
    """`quantize_dynamic`: signed 8-bit weights per channel, everything else at its default."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantize

    output.parent.mkdir(parents=True, exist_ok=True)
    with quietly():
        quantize(model, output, per_channel=True, weight_type=QuantType.QInt8)
    return output


class _Reader:
    """The calibration data reader that `quantize_static` takes: feeds one after another."""

    def __init__(self, samples: Sequence[Feeds]) -> None:
        self._samples = samples
        self._next = iter(samples)

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        """The next set of inputs, None at the end."""
        feeds = next(self._next, None)
        return None if feeds is None else dict(feeds)

    def __len__(self) -> int:
        return len(self._samples)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Only these samples, for the calibrators that go in strides."""
        self._next = iter(self._samples[start_index:end_index])


def preprocess(model: Path, output: Path) -> Path:
    """`quant_pre_process`, without the symbolic shape inference that fails on current exports."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    output.parent.mkdir(parents=True, exist_ok=True)
    header = onnx.load(model, load_external_data=False)
    if max(item.version for item in header.opset_import if item.domain in ("", "ai.onnx")) < _OLDEST_OPSET:
        from onnx import version_converter

        newer = output.with_suffix(".converted.onnx")
        onnx.save(version_converter.convert_version(onnx.load(model), _CONVERTED_OPSET), newer)
        model = newer
    elif any(tensor.data_location for tensor in header.graph.initializer):
        # The step links external data into a folder of its own, where onnx refuses links.
        inline = output.with_suffix(".inline.onnx")
        onnx.save(onnx.load(model), inline)
        model = inline
    with quietly():
        quant_pre_process(model, output, skip_symbolic_shape=True)
    return output


def quantize_static(
    model: Path,
    output: Path,
    samples: Sequence[Feeds],
    *,
    unsigned_activations: bool = False,
    per_channel: bool = False,
    method: str = "MinMax",
    op_types: Sequence[str] | None = None,
) -> Path:
    """`quant_pre_process` and `quantize_static`; what is not named stays at its default.

    Args:
        model: the FP32 model.
        output: the file to write; the preprocessed model is kept beside it.
        samples: calibration inputs.
        unsigned_activations: QUInt8 in place of the default QInt8.
        per_channel: weights per channel.
        method: MinMax, Entropy or Percentile.
        op_types: only these operators.
    """
    import onnxruntime.quantization as ort_quantization

    prepared = preprocess(model, output.with_suffix(".prepared.onnx"))
    types = ort_quantization.QuantType
    with quietly():
        ort_quantization.quantize_static(
            prepared,
            output,
            _reader(samples),
            op_types_to_quantize=None if op_types is None else list(op_types),
            per_channel=per_channel,
            activation_type=types.QUInt8 if unsigned_activations else types.QInt8,
            calibrate_method=ort_quantization.CalibrationMethod[method],
        )
    return output


def _reader(samples: Sequence[Feeds]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    return type("_SampleReader", (_Reader, CalibrationDataReader), {})(samples)


def stacked(samples: Mapping[str, npt.NDArray[np.generic]]) -> list[dict[str, npt.NDArray[Any]]]:
    """Arrays of shape (samples, …) as one set of inputs a sample, each with a batch axis of 1."""
    count = len(next(iter(samples.values())))
    return [{name: values[index : index + 1] for name, values in samples.items()} for index in range(count)]
