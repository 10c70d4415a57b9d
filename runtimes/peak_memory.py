"""Peak memory of loading and running a model once, measured in a process of its own.

Run as a program (`python -m edgepress.runtimes.peak_memory REQUEST.json`) this module is that
process: it imports NumPy and onnxruntime and nothing else that is large, loads and runs the model
named in the request, and prints what it needed as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..graph.errors import ModelError, RuntimeUnavailable
from .cpu import peak_memory_bytes

if TYPE_CHECKING:
    from .base import Array, SessionOptions

_REPORT = "edgepress-peak-memory "


def measure_peak_memory(
    model_path: Path,
    feeds: Mapping[str, Array],
    options: SessionOptions,
    *,
    timeout_s: float = 600.0,
) -> dict[str, int]:
    """Peak resident memory of a fresh process that loads `model_path` and runs it once.

    Args:
        model_path: the .onnx file.
        feeds: one array per input.
        options: as for a session.
        timeout_s: the process is ended after so many seconds.

    Returns:
        `peak_bytes`: the process's own peak, with Python, NumPy and onnxruntime in it;
        `imports_bytes`: what it had before the model was opened.

    Raises:
        ModelError: if the model fails to load or run there.
        RuntimeUnavailable: if the system does not account memory, or the process is killed.
    """
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="edgepress-peak-") as folder:
        arrays = Path(folder) / "feeds.npz"
        names = list(feeds)
        np.savez(arrays, allow_pickle=False, **{f"input_{i}": _plain(feeds[n]) for i, n in enumerate(names)})
        request = Path(folder) / "request.json"
        request.write_text(
            json.dumps(
                {
                    "model": str(model_path.resolve()),
                    "feeds": str(arrays),
                    "names": names,
                    "threads": options.threads,
                    "level": options.level_name,
                    "config": options.config,
                }
            ),
            encoding="utf-8",
        )
        report = _run_child(request, model_path, timeout_s)
    return {"peak_bytes": int(report["peak_bytes"]), "imports_bytes": int(report["imports_bytes"])}


def _plain(array: Array) -> Array:
    """Text as fixed-width characters: objects could only be stored by pickling them."""
    return array.astype(str) if array.dtype.kind == "O" else array


def _run_child(request: Path, model_path: Path, timeout_s: float) -> dict[str, Any]:
    # The child finds the package where this process found it, and nothing in the current folder.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "edgepress.runtimes.peak_memory", str(request)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeUnavailable(
            "measuring peak memory took too long",
            where=model_path.name,
            why=f"more than {timeout_s:g} s",
            remedy="use a smaller batch or shorter inputs",
        ) from error
    for line in done.stdout.splitlines():
        if line.startswith(_REPORT):
            report: dict[str, Any] = json.loads(line.removeprefix(_REPORT))
            if report.get("peak_bytes") is None:
                raise RuntimeUnavailable(
                    "this system does not say how much memory a process used",
                    remedy="measure on Linux or macOS",
                )
            return report
    if done.returncode < 0:
        raise RuntimeUnavailable(
            "the process that measures peak memory was killed",
            where=model_path.name,
            why=f"signal {-done.returncode}",
            remedy="use a smaller batch, or a machine with more memory",
        )
    raise ModelError(
        "the model does not run in a process of its own",
        where=model_path.name,
        why=(done.stderr.strip().splitlines() or ["no message"])[-1],
        remedy="check that the inputs fit the model: `edgepress inspect`",
    )


def main(arguments: list[str]) -> int:
    """The child process: load, run once, report on stdout."""
    import numpy as np
    import onnxruntime as ort

    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    with np.load(request["feeds"], allow_pickle=False) as stored:
        feeds = {name: stored[f"input_{index}"] for index, name in enumerate(request["names"])}
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = request["threads"]
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4
    if request["level"]:
        settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, request["level"])
    for key, value in request["config"].items():
        settings.add_session_config_entry(key, value)
    imports_bytes = peak_memory_bytes()
    started = time.perf_counter_ns()
    session = ort.InferenceSession(
        request["model"], settings, providers=["CPUExecutionProvider"], enable_fallback=0
    )
    load_ms = (time.perf_counter_ns() - started) / 1e6
    session.run(None, feeds)
    report = {"peak_bytes": peak_memory_bytes(), "imports_bytes": imports_bytes, "load_ms": load_ms}
    sys.stdout.write(f"{_REPORT}{json.dumps(report)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
