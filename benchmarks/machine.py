"""What the figures were measured on, and how much else the machine was doing meanwhile."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

from edgepress.benchmarks import amx
from edgepress.targets.host import read_host

# Features by which onnxruntime chooses its kernels.
_FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
_PACKAGES = ("onnxruntime", "torch", "onnx", "numpy")
# Of one core: above this the figures are orientation only.
_BUSY_CORES = 0.1
_GLANCE_S = 1.0


def describe() -> dict[str, Any]:
    """The machine and the packages that decide about speed, without importing any of them."""
    host = read_host()
    return {
        "cpu": host.core,
        "cores": host.cores,
        "features": [name for name in _FEATURES if name in host.features],
        "amx": amx.state(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def lines(machine: dict[str, Any]) -> list[str]:
    """The description for people."""
    load = machine["load_average"]
    shown = " ".join(f"{value:.2f}" for value in load) if load else "not known"
    return [
        f"{machine['cpu']}, {machine['cores']} cores, {' '.join(machine['features'])}; AMX {machine['amx']}",
        f"{machine['system']}, Python {machine['python']}, "
        + ", ".join(f"{name} {version}" for name, version in machine["packages"].items()),
        f"load average {shown}",
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Times:
    """Seconds of processor time since the machine started, and of this process with ended children."""

    wall_s: float
    busy_s: float
    stolen_s: float
    own_s: float


def _times() -> _Times | None:
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
    except OSError:
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal
    values = [int(word) / os.sysconf("SC_CLK_TCK") for word in first.split()[1:9]]
    own = os.times()
    return _Times(
        wall_s=time.monotonic(),
        busy_s=sum(values[:3]) + sum(values[5:7]),
        stolen_s=values[7],
        own_s=own.user + own.system + own.children_user + own.children_system,
    )


class Watch:
    """How many cores other processes (and other virtual machines) kept busy since it was made."""

    def __init__(self) -> None:
        self._start = _times()

    def others(self) -> dict[str, float] | None:
        """`cores`: by other processes here; `stolen_cores`: by the hypervisor. None where not known."""
        now = _times()
        if self._start is None or now is None:
            return None
        wall_s = max(now.wall_s - self._start.wall_s, 1e-3)
        own_s = now.own_s - self._start.own_s
        return {
            "cores": max(0.0, (now.busy_s - self._start.busy_s - own_s) / wall_s),
            "stolen_cores": (now.stolen_s - self._start.stolen_s) / wall_s,
        }


def warning(others: dict[str, float] | None, when: str) -> str | None:
    """A warning where the machine was not quiet."""
    if others is None:
        return f"warning: it is not known how busy the machine was {when}"
    if sum(others.values()) <= _BUSY_CORES:
        return None
    return (
        f"warning: {when} other processes kept {others['cores']:.2f} cores busy and the hypervisor took "
        f"{others['stolen_cores']:.2f}: the speeds are for orientation only"
    )


def glance() -> dict[str, float] | None:
    """How busy the machine is, looked at for one second."""
    watch = Watch()
    time.sleep(_GLANCE_S)
    return watch.others()
