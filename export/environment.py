"""What decides, besides the model file and its inputs, about the last bit of an output."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

from ..runtimes.ort_runtime import runtime_version
from .manifest import SessionSettings, to_json

GOLDEN_RUN = "golden"
# The lines of /proc/cpuinfo (x86-64, then aarch64) by which a runtime picks its kernels.
_CPU_LINES = (
    "vendor_id",
    "cpu family",
    "model",
    "model name",
    "stepping",
    "flags",
    "CPU implementer",
    "CPU architecture",
    "CPU variant",
    "CPU part",
    "CPU revision",
    "Features",
)


def numeric_environment(settings: SessionSettings, threads: int) -> dict[str, str]:
    """Runtime version, CPU and its features, threads and session options, as comparable text.

    Two runs of one file on one input with equal environments give equal bits.
    """
    cpu = _cpu_lines()
    return {
        "runtime": f"onnxruntime {runtime_version()}",
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu.get("model name") or cpu.get("CPU part") or platform.processor() or "unknown",
        "cpu_digest": hashlib.sha256(to_json(cpu)).hexdigest(),
        "threads": str(threads),
        "session_options": to_json(settings).decode(),
    }


def _cpu_lines(source: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """The distinct values of each line over all cores (a chip may have cores of two kinds)."""
    try:
        text = source.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() in _CPU_LINES:
            found.setdefault(key.strip(), set()).add(value.strip())
    return {key: " | ".join(sorted(values)) for key, values in sorted(found.items())}
