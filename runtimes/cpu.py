"""The memory of this process, as the operating system accounts for it."""

from __future__ import annotations

import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_memory_bytes() -> int | None:
    """The largest resident memory this process itself has had, in bytes; None where unknown.

    On Linux VmHWM: `ru_maxrss` is inherited from the process that started this one, so that a
    small child of a large parent would report the parent's.
    """
    return _status_bytes("VmHWM")


def resident_memory_bytes() -> int | None:
    """The resident memory of this process now, in bytes; None where unknown."""
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int | None:
    try:
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "darwin" and field == "VmHWM":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
