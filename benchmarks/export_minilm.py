"""Export all-MiniLM-L6-v2 as a user of Hugging Face would: eager attention, dynamo exporter, opset 20.

This is the FP32 baseline of the benchmarks; edgepress has no part in it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

OPSET = 20


def export(folder: Path, output: Path) -> None:
    """Write the model in `folder` to `output`, batch and sequence dynamic, weights in the file."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, attn_implementation="eager", local_files_only=True).eval()
    ids = torch.randint(0, 1000, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    program = torch.onnx.export(
        model,
        (),
        kwargs=inputs,
        dynamic_shapes=dict.fromkeys(inputs, axes),
        dynamo=True,
        opset_version=OPSET,
        output_names=["last_hidden_state", "pooler_output"],
        verbose=False,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_suffix(".unfinished")
    assert program is not None
    program.save(unfinished, external_data=False)
    unfinished.rename(output)


def exported(folder: Path, workdir: Path) -> Path:
    """The export in `workdir`, made by a process of its own, so that this one needs no torch."""
    import importlib.metadata

    output = workdir / f"minilm-eager-opset{OPSET}-torch{importlib.metadata.version('torch')}.onnx"
    if not output.is_file():
        done = subprocess.run(
            [sys.executable, __file__, str(folder), str(output)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise SystemExit(f"the baseline cannot be exported:\n{done.stderr}")
    return output


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]))
