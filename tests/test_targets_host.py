"""The host probe on recorded machines: features, base profile, cores, caches, memory, runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgepress.targets import host, registry
from edgepress.targets.host import HostFacts, base_profile, host_overlay, read_host
from edgepress.targets.registry import load_target

_X86 = """processor\t: {number}
vendor_id\t: GenuineIntel
model name\t: Test CPU @ 2.00GHz
physical id\t: 0
core id\t\t: {core}
flags\t\t: fpu sse2 sse4_1 avx {flags}
"""
_ARM = """processor\t: {number}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid {flags}
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: {part}
"""
_VNNI = "avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_vnni"


def _machine(root: Path, cpuinfo: str, board: str = "", memory_kb: int = 4_000_000) -> Path:
    (root / "proc/device-tree").mkdir(parents=True)
    (root / "proc/cpuinfo").write_text(cpuinfo)
    (root / "proc/meminfo").write_text(f"MemTotal:       {memory_kb} kB\nMemFree: 1 kB\n")
    if board:
        (root / "proc/device-tree/model").write_text(f"{board}\0")
    for index, (level, kind, size, shared) in enumerate(
        [(1, "Data", "32K", "0"), (1, "Instruction", "48K", "0"), (2, "Unified", "1M", "0-3")]
    ):
        cache = root / f"sys/devices/system/cpu/cpu0/cache/index{index}"
        cache.mkdir(parents=True)
        for name, value in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", shared)):
            (cache / name).write_text(f"{value}\n")
    frequency = root / "sys/devices/system/cpu/cpu0/cpufreq"
    frequency.mkdir(parents=True)
    (frequency / "cpuinfo_max_freq").write_text("1500000\n")
    return root


def _x86(flags: str, cores: tuple[int, ...] = (0, 1)) -> str:
    return "\n".join(_X86.format(number=number, core=core, flags=flags) for number, core in enumerate(cores))


def _arm(flags: str, part: str = "0xd08") -> str:
    blocks = "\n".join(_ARM.format(number=number, flags=flags, part=part) for number in range(4))
    return f"{blocks}\nRevision\t: c03114\nModel\t\t: a board\n"


@pytest.mark.parametrize(
    ("cpuinfo", "board", "base"),
    [
        (_x86(""), "", "x86-64"),
        (_x86("avx2"), "", "x86-64"),
        (_x86("avx2 fma f16c"), "", "x86-64-avx2"),
        (_x86("avx2 fma avx_vnni"), "", "x86-64-avx-vnni"),
        (_x86("avx2 fma avx512f avx512bw avx512dq avx512vl"), "", "x86-64-avx512"),
        (_x86(_VNNI), "", "x86-64-avx512-vnni"),
        (_x86(f"{_VNNI} amx_tile amx_int8 avx_vnni"), "", "x86-64-amx"),
        (_arm("aes"), "", "aarch64"),
        (_arm("asimddp fphp asimdhp"), "", "aarch64-dotprod"),
        (_arm("asimddp fphp asimdhp i8mm bf16"), "", "aarch64-i8mm"),
        (_arm(""), "Raspberry Pi 4 Model B Rev 1.4", "raspberry-pi-4"),
        (_arm("asimddp asimdhp", "0xd0b"), "Raspberry Pi 5 Model B Rev 1.0", "raspberry-pi-5"),
        (_arm("asimddp asimdhp"), "Some Other Board", "aarch64-dotprod"),
    ],
)
def test_base_profile_fits_the_features(tmp_path: Path, cpuinfo: str, board: str, base: str) -> None:
    facts = read_host(_machine(tmp_path, cpuinfo, board))
    assert base_profile(facts) == base
    assert load_target(base).device.architecture == facts.architecture


def test_facts_are_read_as_they_stand(tmp_path: Path) -> None:
    facts = read_host(_machine(tmp_path, _x86("avx2 fma some_other_flag", cores=(0, 0, 1, 1))))
    assert facts.core == "Test CPU @ 2.00GHz"
    assert facts.cores == 2  # four hardware threads on two cores
    assert facts.features == {"sse2", "sse4_1", "avx", "avx2", "fma"}
    assert facts.caches_bytes == {"l1d_bytes": 32768, "l1i_bytes": 49152, "l2_bytes": 1 << 20}
    assert facts.l2_shared
    assert facts.clock_hz == 1_500_000_000
    assert facts.memory_bytes == 4_000_000 * 1024
    assert facts.board is None


def test_control_group_limits_count(tmp_path: Path) -> None:
    root = _machine(tmp_path, _x86("avx2 fma", cores=(0, 1, 2, 3)))
    group = root / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text("250000 100000\n")
    (group / "memory.max").write_text("536870912\n")
    facts = read_host(root)
    assert (facts.cores, facts.memory_bytes) == (2, 536870912)
    (group / "cpu.max").write_text("max 100000\n")
    (group / "memory.max").write_text("max\n")
    facts = read_host(root)
    assert (facts.cores, facts.memory_bytes) == (4, 4_000_000 * 1024)


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    facts = read_host(tmp_path)
    assert facts.cores >= 1
    assert facts.memory_bytes is None
    assert facts.caches_bytes == {}
    assert base_profile(facts) in ("x86-64", "aarch64")


def test_arm_core_is_named_by_its_part(tmp_path: Path) -> None:
    assert read_host(_machine(tmp_path, _arm("asimddp", "0xd0b"))).core == "Arm Cortex-A76"


def _facts(version: str | None) -> HostFacts:
    return HostFacts(
        architecture="x86-64",
        core="Test CPU",
        board=None,
        features=frozenset({"avx2", "fma"}),
        cores=3,
        caches_bytes={"l2_bytes": 1 << 20},
        l2_shared=False,
        clock_hz=None,
        memory_bytes=1 << 30,
        feature_source="a test",
        runtime_version=version,
    )


@pytest.mark.parametrize(
    ("version", "opset", "ir_version"),
    [("1.31.1", 26, 13), ("1.40.0", 26, 13), ("1.24.4", 21, 10), (None, 26, 13)],
)
def test_host_is_laid_over_its_class(
    monkeypatch: pytest.MonkeyPatch, version: str | None, opset: int, ir_version: int
) -> None:
    monkeypatch.setattr(registry, "read_host", lambda: _facts(version))
    profile, base = load_target("host"), load_target("x86-64-avx2")
    assert (profile.name, profile.kind, profile.derived_from[0]) == ("host", "host", "x86-64-avx2")
    assert profile.kernels == base.kernels
    assert profile.default_threads == 3
    assert profile.device.cores is not None
    assert (profile.device.cores.value, profile.device.cores.evidence) == (3, "measured-on-target")
    assert profile.device.isa_features == ("avx2", "fma")
    assert (profile.runtime.max_opset, profile.runtime.max_ir) == (opset, ir_version)
    assert profile.runtime.version == (version or base.runtime.version)
    assert "probed live" in profile.description
    assert "probed live" in profile.notes[0]
    assert not profile.aliases


def test_host_takes_overrides() -> None:
    assert load_target("host", ["target.default_threads=7"]).default_threads == 7


def test_this_machine_is_probed() -> None:
    profile = load_target("host")
    assert profile.device.cores is not None
    assert profile.device.cores.value >= 1
    assert profile.runtime.version == host.runtime_version()


def test_macos_is_read_through_sysctl(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "machdep.cpu.brand_string": "Apple M2",
        "hw.physicalcpu": "8",
        "hw.memsize": "8589934592",
        "hw.l1dcachesize": "65536",
        "hw.l2cachesize": "4194304",
        "hw.optional.arm.FEAT_DotProd": "1",
        "hw.optional.arm.FEAT_I8MM": "1",
        "hw.optional.arm.FEAT_SME": "0",
    }
    monkeypatch.setattr(host.sys, "platform", "darwin")
    monkeypatch.setattr(host.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(host, "_sysctl", lambda _names: values)
    facts = read_host()
    assert (facts.core, facts.cores, facts.memory_bytes) == ("Apple M2", 8, 8589934592)
    assert facts.features == {"fp", "asimd", "asimddp", "i8mm"}
    assert facts.caches_bytes == {"l1d_bytes": 65536, "l2_bytes": 4194304}
    assert base_profile(facts) == "aarch64-i8mm"


def test_overlay_leaves_unknown_figures_to_the_base() -> None:
    overlay = host_overlay(_facts("1.31.1"), {"name": "b", "runtime": {"version": "1.31.1"}})
    assert "clock_hz" not in overlay["device"]
    assert overlay["runtime"] == {}
