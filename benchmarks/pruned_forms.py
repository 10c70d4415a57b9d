"""Forms of a model that pruning makes: what they are called, how they are compiled, what they hold."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from edgepress.benchmarks.compiling import compile_bundle
from edgepress.benchmarks.report import Report
from edgepress.benchmarks.sessions import Form

BASELINE, PRUNED, THOROUGH, BOTH = (
    "FP32",
    "edgepress pruned",
    "edgepress pruned, thorough",
    "edgepress pruned, INT8",
)
ROWS = ("thorough", "int8", "peers")
"""Rows that may be left out."""
SKIPPED = "benchmark,golden"
"""Stages of a compile that say nothing here: all forms are timed in one run."""


def variants(options: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """Name of a form -> words for the command line."""
    found: dict[str, tuple[str, ...]] = {PRUNED: ("--precision", "fp32")}
    if "thorough" not in options.without:
        found[THOROUGH] = ("--precision", "fp32", "--prune-repair", "thorough")
    if "int8" not in options.without:
        found[BOTH] = ("--precision", "int8")
    return found


def compiled(
    label: str, model: Path, bundle: Path, *, words: Sequence[str], threads: int, report: Report
) -> dict[str, Any]:
    """Compile for this machine; the form, what was cut, and how long it took."""
    report.progress(f"{bundle.name}: compiling")
    started = time.monotonic()
    document = compile_bundle(model, bundle, "host", *words, "--threads", str(threads))
    took_s = time.monotonic() - started
    form = Form.of_bundle(label, bundle)
    plan = json.loads((bundle / "plan.json").read_text(encoding="utf-8"))
    pruning = plan.get("pruning") or {}
    return {
        "form": form,
        "macs": pruning.get("macs_after"),
        "macs_before": pruning.get("macs_before"),
        "parameters": parameters(form.file),
        "widths": {group["name"]: [group["units"], group["left"]] for group in pruning.get("groups", ())},
        "output_error": pruning.get("output_error"),
        "notes": document.get("notes"),
        "compile_s": took_s,
    }


def parameters(file: Path) -> int:
    """Elements of all tensors that a file holds."""
    import onnx

    graph = onnx.load(str(file), load_external_data=False).graph
    return sum(int(np.prod(item.dims)) for item in graph.initializer)


def without_forms(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures as JSON can hold them."""
    return {
        label: {key: value for key, value in item.items() if key != "form"} for label, item in found.items()
    }
