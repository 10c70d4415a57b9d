"""NNCF's post-training quantization of the baseline .onnx, run by the onnxruntime of NNCF's environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt

Feeds = dict[str, npt.NDArray[Any]]


def prepare(request: dict[str, str], samples: list[Feeds]) -> list[dict[str, Any]]:
    """`nncf.quantize` for a transformer on the calibration sentences, everything else at its default."""
    import nncf  # type: ignore[import-not-found]
    import onnx

    file = Path(request["output"]) / "nncf.onnx"
    quantized = nncf.quantize(
        onnx.load(request["baseline"]),
        nncf.Dataset(samples),
        subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER,
    )
    onnx.save(quantized, file)
    return [
        {
            "name": "NNCF, run by onnxruntime",
            "program": "onnxruntime_file.py",
            "files": [str(file)],
            "options": {},
        }
    ]
