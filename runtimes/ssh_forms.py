"""Forms of a model for a device: the request that remote_run.py reads, and what its times mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from . import timing
from .base import Array
from .device import Form

_METHOD = "fresh sessions in alternating order, runs interleaved round robin, on the device"


def write_request(
    forms: Sequence[Form],
    feeds: Mapping[str, Array],
    plan: Mapping[str, float],
    folder: Path,
    place: Callable[[Form, Path], str],
) -> dict[str, Path]:
    """Write what remote_run.py needs; the files by the names that they get on the device.

    Args:
        forms: what is to run.
        feeds: inputs by name of the forms that have none of their own.
        plan: how much to measure, as the device runner's `Plan` names it; empty for one run.
        folder: where the files are written here.
        place: brings a form's model onto the device (a free path here is given) and says where it lies.
    """
    files: dict[str, Path] = {}
    entries = []
    for index, form in enumerate(forms):
        own = feeds if form.feeds is None else form.feeds
        name = f"feeds-{index}.npz"
        arrays: dict[str, Any] = {f"input_{number}": values for number, values in enumerate(own.values())}
        files[name] = folder / name
        np.savez(files[name], **arrays)
        entries.append(
            {
                "name": form.name,
                "model": place(form, folder / f"{index}.onnx"),
                "threads": form.options.threads,
                "level": form.options.level_name,
                "config": form.options.config,
                "inputs": list(own),
                "feeds": name,
            }
        )
    files["request.json"] = folder / "request.json"
    files["request.json"].write_bytes(msgspec.json.encode({"forms": entries, "plan": plan}))
    return files


def result_of(found: Mapping[str, Mapping[str, Any]], feeds: Mapping[str, Array]) -> timing.BenchmarkResult:
    """The latencies of the device runner's `time_entries` as a result; the first form is the baseline.

    Args:
        found: by form, in order: `series_ns` and `load_ms` of each session, and `warm_up_runs`.
        feeds: inputs by name; the first axis of the first of them is the batch.
    """
    batch = next((len(values) for values in feeds.values() if values.ndim), 1)
    return timing.result_of(found, dict.fromkeys(found, batch), _METHOD)
