"""What this machine is: its processor's features, cores, caches and memory, read without side effects."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

Tables = dict[str, Any]

# Tried in order: the first whose features are all present is the class that fits.
_CLASSES: dict[str, tuple[tuple[str, frozenset[str]], ...]] = {
    "x86-64": (
        ("x86-64-amx", frozenset({"amx_int8", "amx_tile", "avx512_vnni", "avx512bw", "avx512vl"})),
        ("x86-64-avx512-vnni", frozenset({"avx512_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl"})),
        ("x86-64-avx-vnni", frozenset({"avx_vnni", "avx2", "fma"})),
        ("x86-64-avx512", frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})),
        ("x86-64-avx2", frozenset({"avx2", "fma"})),
        ("x86-64", frozenset()),
    ),
    "aarch64": (
        ("aarch64-i8mm", frozenset({"i8mm", "asimddp"})),
        ("aarch64-dotprod", frozenset({"asimddp"})),
        ("aarch64", frozenset()),
    ),
}
_BOARDS = {
    "Raspberry Pi Zero 2 W": "raspberry-pi-zero-2w",
    "Raspberry Pi 3 Model B Plus": "raspberry-pi-3b-plus",
    "Raspberry Pi 4": "raspberry-pi-4",
    "Raspberry Pi 5": "raspberry-pi-5",
}
# The flags of /proc/cpuinfo that decide which kernels run; the others are noise in a profile.
_KERNEL_FEATURES = frozenset(
    {
        *("sse2", "sse4_1", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx_vnni_int8"),
        *("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
        *("amx_tile", "amx_int8", "amx_bf16"),
        *("fp", "asimd", "crc32", "asimddp", "fphp", "asimdhp", "i8mm", "bf16", "sve", "sve2", "sme"),
    }
)
# macOS names of the features that Linux calls as on the right.
_DARWIN_FEATURES = {
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_FP16": "asimdhp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_SME": "sme",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.fma": "fma",
    "hw.optional.avx512f": "avx512f",
}
_SYSCTL_SECONDS = 5
# Releases before the one that was tried load at least this; opset 22 came with 1.22.
_SAFE_OPSET, _SAFE_IR = 21, 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostFacts:
    """What was read off this machine; None where it could not be read.

    `cores` are physical cores that this process may use. Caches are those of the first core.
    """

    architecture: Literal["x86-64", "aarch64"]
    core: str
    board: str | None
    features: frozenset[str]
    cores: int
    caches_bytes: dict[str, int]
    l2_shared: bool
    clock_hz: int | None
    memory_bytes: int | None
    feature_source: str
    runtime_version: str | None


def read_host(root: Path = Path("/")) -> HostFacts:
    """Read /proc and /sys below `root`, or sysctl on macOS.

    An architecture that is neither x86-64 nor 64-bit Arm counts as x86-64 without features: the
    kernels that every machine has.
    """
    if sys.platform == "darwin" and root == Path("/"):
        return _read_darwin()
    cpuinfo = _text(root / "proc/cpuinfo")
    entries = _cpuinfo_entries(cpuinfo)
    first = entries[0] if entries else {}
    flags = frozenset((first.get("flags") or first.get("Features") or "").split())
    machine = platform.machine().lower()
    if "Features" in first or "CPU architecture" in first:
        architecture: Literal["x86-64", "aarch64"] = "aarch64"
    elif "flags" in first or machine not in ("aarch64", "arm64"):
        architecture = "x86-64"
    else:
        architecture = "aarch64"
    board = _text(root / "proc/device-tree/model") or _text(root / "sys/firmware/devicetree/base/model")
    caches, shared = _caches(root)
    return HostFacts(
        architecture=architecture,
        core=first.get("model name") or _arm_core(first) or platform.processor() or machine,
        board=board.strip("\0\n ") or None,
        features=flags & _KERNEL_FEATURES,
        cores=_usable_cores(entries, root),
        caches_bytes=caches,
        l2_shared=shared,
        clock_hz=_clock_hz(root),
        memory_bytes=_memory_bytes(root),
        feature_source="/proc/cpuinfo",
        runtime_version=runtime_version(),
    )


def runtime_version() -> str | None:
    """The installed onnxruntime's version from its metadata (nothing is imported), or None."""
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def base_profile(facts: HostFacts) -> str:
    """The name of the built-in profile that fits: the board's own, or the processor class."""
    for prefix, name in _BOARDS.items():
        if facts.board and facts.board.startswith(prefix):
            return name
    for name, needed in _CLASSES[facts.architecture]:
        if needed <= facts.features:
            return name
    raise AssertionError("the last class of an architecture needs no feature")


def host_overlay(facts: HostFacts, base: Tables) -> Tables:
    """What goes over the base profile's tables: the probed device, runtime version and a mark.

    Args:
        facts: what was read.
        base: the base profile's merged tables, for its runtime limits and notes.
    """
    device: Tables = {
        "core": facts.core,
        "isa_features": sorted(facts.features),
        "isa_source": facts.feature_source,
        "cores": _probed(facts.cores, "physical cores this process may use"),
        "l2_shared": facts.l2_shared,
    }
    device |= {
        name: _probed(size, "the operating system's cache table") for name, size in facts.caches_bytes.items()
    }
    if facts.board:
        device["board"] = facts.board
    if facts.clock_hz:
        device["clock_hz"] = _probed(facts.clock_hz, "cpufreq: the highest clock")
    if facts.memory_bytes:
        device["memory_bytes"] = _probed(facts.memory_bytes, "total memory, or the control group's limit")
    return {
        "name": "host",
        "kind": "host",
        "description": f"this machine ({facts.core}), probed live over {base['name']}",
        "device": device,
        "runtime": _runtime_overlay(facts.runtime_version, base["runtime"]),
        "default_threads": facts.cores,
        "notes": [
            f"probed live: device, threads, runtime version; kernel figures are those of {base['name']}",
            *base.get("notes", ()),
        ],
    }


def _runtime_overlay(version: str | None, base: Tables) -> Tables:
    if version is None or version == base["version"]:
        return {}
    if _release(version) > _release(base["version"]):
        return {"version": version, "limits_source": f"those of {base['version']}, which newer releases keep"}
    return {
        "version": version,
        "max_opset": _SAFE_OPSET,
        "max_ir": _SAFE_IR,
        "limits_source": f"not tried with {version}: what releases from 1.22 on load at least",
    }


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _probed(value: int, source: str) -> Tables:
    return {"value": value, "evidence": "measured-on-target", "source": source}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpuinfo_entries(text: str) -> list[dict[str, str]]:
    """One mapping per processor of /proc/cpuinfo; blocks without a processor number are dropped."""
    entries = []
    for block in re.split(r"\n\s*\n", text):
        pairs = (line.partition(":") for line in block.splitlines())
        entry = {key.strip(): value.strip() for key, colon, value in pairs if colon}
        if "processor" in entry:
            entries.append(entry)
    return entries


def _arm_core(entry: dict[str, str]) -> str | None:
    known = {"0xd03": "A53", "0xd08": "A72", "0xd0b": "A76", "0xd42": "A78AE", "0xd41": "A78"}
    part = entry.get("CPU part")
    if part is None:
        return None
    return f"Arm Cortex-{known[part]}" if part in known else f"Arm core (part {part})"


def _usable_cores(entries: list[dict[str, str]], root: Path) -> int:
    """Physical cores, not above what the scheduler and the control group grant; at least 1."""
    cores = {(entry.get("physical id", "0"), entry.get("core id", entry["processor"])) for entry in entries}
    limits = [len(cores) or os.cpu_count() or 1]
    if root == Path("/") and hasattr(os, "sched_getaffinity"):
        limits.append(len(os.sched_getaffinity(0)))
    quota = _text(root / "sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        limits.append(int(quota[0]) // int(quota[1]))
    return max(1, min(limits))


def _caches(root: Path) -> tuple[dict[str, int], bool]:
    """Cache sizes in bytes by field name, and whether level 2 serves more than one core."""
    names = {("1", "Data"): "l1d_bytes", ("1", "Instruction"): "l1i_bytes", ("2", "Unified"): "l2_bytes"}
    names[("3", "Unified")] = "l3_bytes"
    found: dict[str, int] = {}
    shared = False
    for index in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind = _text(index / "level").strip(), _text(index / "type").strip()
        size = re.fullmatch(r"(\d+)([KM]?)", _text(index / "size").strip())
        name = names.get((level, kind))
        if name is None or size is None:
            continue
        found[name] = int(size[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20}[size[2]]
        if name == "l2_bytes":
            shared = bool(re.search(r"[,-]", _text(index / "shared_cpu_list")))
    return {name: size for name, size in found.items() if size > 0}, shared


def _clock_hz(root: Path) -> int | None:
    text = _text(root / "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").strip()
    return int(text) * 1000 if text.isdigit() and int(text) else None


def _memory_bytes(root: Path) -> int | None:
    total = re.search(r"^MemTotal:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    limits = [int(total[1]) * 1024] if total else []
    group = _text(root / "sys/fs/cgroup/memory.max").strip()
    if group.isdigit():
        limits.append(int(group))
    return min(limits, default=None)


def _read_darwin() -> HostFacts:
    names = ["machdep.cpu.brand_string", "hw.physicalcpu", "hw.memsize", "hw.l1dcachesize", "hw.l1icachesize"]
    values = _sysctl([*names, "hw.l2cachesize", "hw.l3cachesize", *_DARWIN_FEATURES])
    arm = platform.machine() == "arm64"
    features = {linux for name, linux in _DARWIN_FEATURES.items() if values.get(name) == "1"}
    caches = {
        f"{level}_bytes": int(values[f"hw.{level}cachesize"])
        for level in ("l1d", "l1i", "l2", "l3")
        if values.get(f"hw.{level}cachesize", "0") not in ("", "0")
    }
    return HostFacts(
        architecture="aarch64" if arm else "x86-64",
        core=values.get("machdep.cpu.brand_string") or platform.machine(),
        board=None,
        features=frozenset(features | ({"fp", "asimd"} if arm else set())),
        cores=max(1, int(values.get("hw.physicalcpu") or os.cpu_count() or 1)),
        caches_bytes=caches,
        l2_shared=arm,
        clock_hz=None,
        memory_bytes=int(values["hw.memsize"]) if values.get("hw.memsize") else None,
        feature_source="sysctl",
        runtime_version=runtime_version(),
    )


def _sysctl(names: list[str]) -> dict[str, str]:
    """Values of macOS's sysctl by name; names that this system does not know are left out."""
    try:
        done = subprocess.run(
            ["/usr/sbin/sysctl", *names],
            capture_output=True,
            text=True,
            timeout=_SYSCTL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    pairs = (line.partition(": ") for line in done.stdout.splitlines())
    return {name: value.strip() for name, colon, value in pairs if colon}
