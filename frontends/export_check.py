"""Whether an exported file computes what the torch model computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..graph.errors import ModelError, NotSupported

# Relative to the largest output; float32 through a dozen layers leaves about 2e-6.
TOLERANCE = 1e-4

Arrays = dict[str, npt.NDArray[Any]]


def run_torch(module: Callable[..., Any], inputs: Arrays) -> dict[str, Any]:
    """The module's tensor outputs by name, in order.

    Raises:
        NotSupported: if it also gives a KV cache, which one pass cannot carry on.
    """
    import torch

    outputs = module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    cached = [name for name, value in outputs.items() if name == "past_key_values" and value is not None]
    if cached:
        raise NotSupported(
            "decoders with a KV cache are not supported",
            where=f"{type(module).__name__}, output {cached[0]}",
            why="one pass over a whole sequence is compiled; a cache is carried from step to step",
            remedy="export the model without its cache (use_cache=False)",
        )
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def compare_with_torch(
    path: Path, module: Callable[..., Any], checked: Sequence[Arrays], names: list[str]
) -> float:
    """The worst relative difference between the file in onnxruntime and the module in torch.

    onnxruntime is used directly: frontends stand below runtimes/, and an export that was never
    run is not handed on.

    Args:
        path: the exported file.
        module: the model it was made from, in evaluation mode; call under `torch.no_grad`.
        checked: batches of inputs, name -> array, batch first.
        names: the outputs to compare, in the file's order.

    Returns:
        max |onnxruntime - torch| / max |torch|, the worst of all outputs and batches.

    Raises:
        ModelError: if onnxruntime refuses the file, the difference exceeds `TOLERANCE`, or the
            model's own outputs are not finite.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Weights stay mapped from the file instead of being copied into packed buffers.
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        worst = 0.0
        for inputs in checked:
            results = session.run(names, inputs)
            reference = run_torch(module, inputs)
            for name, result in zip(names, results, strict=True):
                expected = reference[name].numpy()
                error = _relative_error(result, expected, name)
                if not error <= TOLERANCE:
                    raise _differs(name, error, inputs)
                worst = max(worst, error)
    except _session_errors() as error:
        raise ModelError(
            "onnxruntime cannot run the exported model",
            where=type(module).__name__,
            why=" ".join(str(error).split())[:300],
            remedy="export the model to .onnx yourself (another opset may do) and pass that file",
        ) from error
    return worst


def _relative_error(result: npt.NDArray[Any], expected: npt.NDArray[Any], name: str) -> float:
    if not np.isfinite(expected).all():
        raise ModelError(
            "the model's own outputs are not finite",
            where=f"output {name!r} in torch",
            why="its weights hold NaN or infinity, or overflow",
            remedy="pass a checkpoint whose weights are finite",
        )
    if result.shape != expected.shape:
        return float("inf")
    if expected.dtype.kind == "b":
        return float((result != expected).any())
    scale = float(np.abs(expected).max(initial=0.0)) or 1.0
    return float(np.abs(result - expected).max(initial=0.0)) / scale


def _differs(name: str, error: float, inputs: Arrays) -> ModelError:
    shapes = ", ".join(f"{key} {'x'.join(map(str, array.shape))}" for key, array in inputs.items())
    return ModelError(
        "the export does not compute what the torch model computes",
        where=f"output {name!r} at {shapes}",
        why=f"relative difference {error:.3g}, limit {TOLERANCE:g} (inf: another shape)",
        remedy="export the model to .onnx yourself (another opset may do) and pass that file",
    )


def _session_errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = (
        "Fail",
        "InvalidArgument",
        "InvalidGraph",
        "InvalidProtobuf",
        "NotImplemented",
        "RuntimeException",
    )
    return (*(getattr(state, name) for name in names), ValueError)
