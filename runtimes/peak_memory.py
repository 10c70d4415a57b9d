"""Cold start and peak memory of loading and running a model once, measured in processes of their own.

The process is the device runner's child: it imports NumPy and onnxruntime and nothing else that is large.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..graph.errors import EdgepressError, ModelError, RuntimeUnavailable
from . import device_runner

if TYPE_CHECKING:
    from .base import Array, SessionOptions


class ColdStart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Medians over fresh processes that load a model and run it once, its files being in the page cache.

    Attributes:
        cold_start_ms: from starting the process to the first result; `import_ms`, `load_ms` and
            `first_run_ms` of it for imports, the session and the first run.
        peak_memory_bytes: the largest that a process has had, with Python, NumPy and onnxruntime in it; None
            where the system does not account memory.
        imports_bytes: of it before the model was opened.
        each_ms: the cold start of each process.
        processes: how many there were.
    """

    cold_start_ms: float
    import_ms: float
    load_ms: float
    first_run_ms: float
    peak_memory_bytes: int | None
    imports_bytes: int | None
    each_ms: tuple[float, ...]
    processes: int


def measure_cold_start(
    model_path: Path,
    feeds: Mapping[str, Array],
    options: SessionOptions,
    *,
    repeats: int = 3,
    timeout_s: float = 600.0,
) -> ColdStart:
    """Process start → first result, and the memory that it takes.

    Args:
        model_path: the .onnx file.
        feeds: one array per input.
        options: as for a session.
        repeats: how many processes, one after another.
        timeout_s: a process is ended after so many seconds.

    Raises:
        ModelError: if the model fails to load or run there.
        RuntimeUnavailable: if a process is killed or takes too long.
    """
    settings = device_runner.SessionSettings(options.threads, options.level_name, dict(options.config))
    try:
        found = device_runner.cold_starts(model_path, feeds, settings, repeats=repeats, timeout_s=timeout_s)
    except device_runner.ChildFailed as error:
        raise _failure(error.end, model_path.name, timeout_s) from error
    return msgspec.convert(found, ColdStart)


def measure_peak_memory(
    model_path: Path,
    feeds: Mapping[str, Array],
    options: SessionOptions,
    *,
    timeout_s: float = 600.0,
) -> dict[str, int]:
    """Peak resident memory of a fresh process that loads `model_path` and runs it once.

    Returns:
        `peak_bytes`: the process's own peak, with Python, NumPy and onnxruntime in it;
        `imports_bytes`: what it had before the model was opened.

    Raises:
        ModelError: if the model fails to load or run there.
        RuntimeUnavailable: if the system does not account memory, or the process is killed.
    """
    found = measure_cold_start(model_path, feeds, options, repeats=1, timeout_s=timeout_s)
    if found.peak_memory_bytes is None or found.imports_bytes is None:
        raise RuntimeUnavailable(
            "this system does not say how much memory a process used", remedy="measure on Linux"
        )
    return {"peak_bytes": found.peak_memory_bytes, "imports_bytes": found.imports_bytes}


def _failure(end: device_runner.ChildEnd, model: str, timeout_s: float) -> EdgepressError:
    if end.code is None:
        return RuntimeUnavailable(
            "running the model in a process of its own took too long",
            where=model,
            why=f"more than {timeout_s:g} s",
            remedy="use a smaller batch or shorter inputs",
        )
    if end.signal_name is not None:
        return RuntimeUnavailable(
            "a process that loads and runs the model was killed",
            where=model,
            why=end.signal_name,
            remedy="use a smaller batch, or a machine with more memory",
        )
    return ModelError(
        "the model does not run in a process of its own",
        where=model,
        why=end.message or "no message",
        remedy="check that the inputs fit the model: `edgepress inspect`",
    )
