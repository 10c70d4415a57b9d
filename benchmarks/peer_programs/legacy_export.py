"""onnxruntime's dynamic quantization of torch's legacy (TorchScript) export, per channel.

It is served twice, with onnxruntime's defaults and without its SkipLayerNormalization fusion, which is
slower on many processors than what it replaces.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt

Feeds = dict[str, npt.NDArray[Any]]

_OPSET = 17


def prepare(request: dict[str, str], _samples: list[Feeds]) -> list[dict[str, Any]]:
    """Export with `dynamo=False`, then `quantize_dynamic` with signed weights per channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    output = Path(request["output"])
    exported = output / "legacy.onnx"
    quantized = output / "legacy-dynamic.onnx"
    _export(request["model"], exported)
    quantize_dynamic(exported, quantized, per_channel=True, weight_type=QuantType.QInt8)
    forms: tuple[tuple[str, dict[str, Any]], ...] = (
        ("ORT dynamic, legacy export", {}),
        ("ORT dynamic, legacy export, no SkipLN", {"disabled": ["SkipLayerNormFusion"]}),
    )
    return [
        {
            "name": name,
            "program": "onnxruntime_file.py",
            "files": [str(quantized)],
            "options": options,
        }
        for name, options in forms
    ]


def _export(model: str, file: Path) -> None:
    import torch
    from transformers import AutoModel

    network = AutoModel.from_pretrained(model, attn_implementation="eager", local_files_only=True).eval()
    ids = torch.randint(0, 1000, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    outputs = ("last_hidden_state", "pooler_output")
    axes = {name: {0: "batch", 1: "sequence"} for name in (*inputs, outputs[0])} | {outputs[1]: {0: "batch"}}
    with torch.no_grad():
        torch.onnx.export(
            network,
            (ids, mask, torch.zeros_like(ids)),
            str(file),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes=axes,
            opset_version=_OPSET,
            dynamo=False,
        )
