"""optimum (optimum-onnx): its own export, then ORTQuantizer, dynamic, avx512_vnni, per channel.

The result is run by the onnxruntime of optimum's environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt

Feeds = dict[str, npt.NDArray[Any]]


def prepare(request: dict[str, str], _samples: list[Feeds]) -> list[dict[str, Any]]:
    """Export and quantize as optimum's documentation does."""
    from optimum.onnxruntime import (  # type: ignore[import-not-found]
        ORTModelForFeatureExtraction,
        ORTQuantizer,
    )
    from optimum.onnxruntime.configuration import AutoQuantizationConfig  # type: ignore[import-not-found]

    output = Path(request["output"])
    exported = ORTModelForFeatureExtraction.from_pretrained(request["model"], export=True)
    exported.save_pretrained(output / "exported")
    quantizer = ORTQuantizer.from_pretrained(output / "exported", file_name="model.onnx")
    settings = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    quantizer.quantize(save_dir=output / "quantized", quantization_config=settings)
    (file,) = (output / "quantized").glob("*.onnx")
    return [
        {
            "name": "optimum, dynamic avx512_vnni",
            "program": "onnxruntime_file.py",
            "files": [str(file)],
            "options": {},
        }
    ]
