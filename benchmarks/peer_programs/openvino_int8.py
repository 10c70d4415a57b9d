"""OpenVINO INT8: NNCF's post-training quantization of the converted baseline, run by OpenVINO.

It is served twice: what is not INT8 in float32, and in the precision that OpenVINO chooses by itself
(bfloat16 on processors that have it). Shapes stay dynamic, as they do in every other form.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Feeds = dict[str, npt.NDArray[Any]]


def prepare(request: dict[str, str], samples: list[Feeds]) -> list[dict[str, Any]]:
    """`nncf.quantize` for a transformer on the calibration sentences, everything else at its default."""
    import nncf  # type: ignore[import-not-found]
    import openvino  # type: ignore[import-not-found]

    file = Path(request["output"]) / "openvino-int8.xml"
    model = openvino.convert_model(request["baseline"])
    quantized = nncf.quantize(
        model,
        nncf.Dataset(samples),
        subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER,
    )
    openvino.save_model(quantized, file)
    return [
        {
            "name": name,
            "program": "openvino_int8.py",
            "files": [str(file), str(file.with_suffix(".bin"))],
            "options": options,
        }
        for name, options in (
            ("OpenVINO INT8, rest in float32", {"INFERENCE_PRECISION_HINT": "f32"}),
            ("OpenVINO INT8, its default", {}),
        )
    ]


class CompiledModel:
    """One freshly compiled model, optimised for latency."""

    def __init__(self, file: str, threads: int, options: dict[str, Any]) -> None:
        import openvino

        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, **options}
        compiled = openvino.Core().compile_model(file, "CPU", settings)
        self.input_names = [item.get_any_name() for item in compiled.inputs]
        self._outputs = [(item.get_any_name(), item) for item in compiled.outputs]
        self._request = compiled.create_infer_request()

    def run(self, feeds: Feeds) -> Feeds:
        """Outputs by name, in OpenVINO's own memory: the next run overwrites them."""
        found = self._request.infer(feeds, share_inputs=True, share_outputs=True)
        return {name: np.asarray(found[output]) for name, output in self._outputs}


def load(file: str, threads: int, options: dict[str, Any]) -> CompiledModel:
    """A freshly compiled model."""
    return CompiledModel(file, threads, options)
