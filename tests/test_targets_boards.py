"""The profiles of boards and GPUs: what they promise, what they leave out, how a GPU table behaves."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from edgepress.graph.errors import TargetError
from edgepress.targets.host import HostFacts, base_profile
from edgepress.targets.profile import Figure
from edgepress.targets.registry import list_targets, load_target, to_toml

# name: TensorRT, JetPack, compute capability, DLA cores, INT8?, BF16?
JETSONS = {
    "jetson-nano": ("8.2.1", "4.6", "5.3", 0, False, False),
    "jetson-xavier-nx": ("8.5.2", "5.1", "7.2", 2, True, False),
    "jetson-agx-xavier": ("8.5.2", "5.1", "7.2", 2, True, False),
    "jetson-orin-nano": ("10.3.0", "6.2", "8.7", 0, True, False),
    "jetson-orin-nano-super": ("10.3.0", "6.2", "8.7", 0, True, False),
    "jetson-orin-nx": ("10.3.0", "6.2", "8.7", 2, True, False),
    "jetson-agx-orin": ("10.3.0", "6.2", "8.7", 2, True, False),
    "jetson-thor": ("10.16.2", "7.2", "11.0", 0, True, True),
}
GPUS = (*JETSONS, "a100-40gb", "a100-80gb")


@pytest.mark.parametrize("name", JETSONS)
def test_jetsons(name: str) -> None:
    profile = load_target(name)
    assert profile.gpu is not None
    assert (
        profile.runtime.version,
        profile.runtime.jetpack,
        profile.gpu.compute_capability,
        profile.gpu.dla_cores,
        "INT8" in profile.gpu.precisions,
        "BF16" in profile.gpu.precisions,
    ) == JETSONS[name]
    assert profile.kind == "board"
    assert profile.device.architecture == "aarch64"
    assert profile.gpu.memory_shared
    assert profile.device.memory_bytes is not None
    dialect = "weak" if profile.runtime.version.startswith("8.") else "both"
    assert profile.runtime.typing == ("strong" if name == "jetson-thor" else dialect)
    assert ("BF16" in profile.gpu.disputed_precisions) == ("orin" in name)


@pytest.mark.parametrize("name", GPUS)
def test_gpu_facts_have_sources_and_no_figure_is_made_up(name: str) -> None:
    gpu = load_target(name).gpu
    assert gpu is not None
    assert gpu.capability_source
    assert gpu.precisions_source
    assert gpu.dla_source
    for figure in msgspec.structs.astuple(gpu):
        if isinstance(figure, Figure):
            assert figure.source
            assert figure.evidence == "documented"
    # A kernel's grade needs a measurement, and none was made.
    assert not load_target(name).kernels


def test_unsourced_figures_are_absent() -> None:
    thor, xavier = load_target("jetson-thor"), load_target("jetson-xavier-nx")
    assert thor.device.cores is None
    assert thor.gpu is not None
    assert thor.gpu.sm_count is None
    assert xavier.device.clock_hz is None
    assert load_target("raspberry-pi-3b-plus").device.l2_bytes is None
    assert load_target("raspberry-pi-zero-2w").device.l2_bytes is None


def test_the_two_a100_differ_in_memory_only() -> None:
    small, large = load_target("a100-40gb").gpu, load_target("a100-80gb").gpu
    assert small is not None
    assert large is not None
    assert small.memory_bytes is not None
    assert large.memory_bytes is not None
    assert large.memory_bytes.value == 2 * small.memory_bytes.value
    same = msgspec.structs.replace(
        large,
        memory_bytes=small.memory_bytes,
        memory_bandwidth_bytes_per_s=small.memory_bandwidth_bytes_per_s,
    )
    assert same == small
    assert "FP8" not in small.precisions


def test_super_mode_is_faster_than_the_same_module_without() -> None:
    plain, fast = load_target("jetson-orin-nano"), load_target("jetson-orin-nano-super")
    for part, figure in (("gpu", "clock_hz"), ("gpu", "advertised_int8_ops"), ("device", "clock_hz")):
        assert getattr(getattr(fast, part), figure).value > getattr(getattr(plain, part), figure).value
    assert plain.device.memory_bytes == fast.device.memory_bytes


def test_new_arm_profiles_take_their_kernels_from_the_right_class() -> None:
    graviton = load_target("arm64-graviton3")
    assert graviton.derived_from[0] == "aarch64-i8mm"
    assert "bf16" in graviton.device.isa_features
    assert not graviton.session_config
    kernel = graviton.kernel("MatMul", "static", activation="int8")
    assert kernel is not None
    assert "SMMLA" in kernel.reason
    for name in ("raspberry-pi-3b-plus", "raspberry-pi-zero-2w"):
        board = load_target(name)
        assert board.derived_from[0] == "aarch64"
        assert "asimddp" not in board.device.isa_features
        assert board.static_activation_type == "uint8"


@pytest.mark.parametrize(
    ("board", "name"),
    [
        ("Raspberry Pi Zero 2 W Rev 1.0", "raspberry-pi-zero-2w"),
        ("Raspberry Pi 3 Model B Plus Rev 1.3", "raspberry-pi-3b-plus"),
        ("Raspberry Pi 4 Model B Rev 1.4", "raspberry-pi-4"),
        ("Raspberry Pi 3 Model B Rev 1.2", "aarch64"),
    ],
)
def test_a_board_finds_its_own_profile(board: str, name: str) -> None:
    facts = HostFacts(
        architecture="aarch64",
        core="Arm Cortex-A53",
        board=board,
        features=frozenset({"fp", "asimd", "crc32"}),
        cores=4,
        caches_bytes={},
        l2_shared=True,
        clock_hz=None,
        memory_bytes=None,
        feature_source="/proc/cpuinfo",
        runtime_version=None,
    )
    assert base_profile(facts) == name


def test_the_list_has_one_readable_line_for_each() -> None:
    lines = {summary.name: summary for summary in list_targets()}
    assert set(GPUS) | {"raspberry-pi-zero-2w", "raspberry-pi-3b-plus", "arm64-graviton3"} <= set(lines)
    assert all(len(summary.description) <= 100 for summary in lines.values())
    assert lines["a100-40gb"].kind == "gpu"


def test_overrides_reach_the_gpu() -> None:
    profile = load_target(
        "jetson-orin-nx",
        [
            "target.gpu.dla_cores=1",
            "target.gpu.clock_hz=1173000000",
            "target.runtime.typing=strong",
            "target.device.memory_bytes=8589934592",
        ],
    )
    assert profile.gpu is not None
    assert profile.gpu.dla_cores == 1
    assert profile.gpu.clock_hz is not None
    assert (profile.gpu.clock_hz.value, profile.gpu.clock_hz.evidence) == (1173000000, "none")
    assert profile.runtime.typing == "strong"
    with pytest.raises(TargetError) as caught:
        load_target("jetson-orin-nx", ["target.gpu.dla=1"])
    assert "dla_cores" in (caught.value.remedy or "")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('base = "jetson-nano"\n[gpu]\nmemory = 1\n', "gpu.memory"),
        ('base = "jetson-nano"\n[gpu.clock_hz]\nvalue = "fast"\n', "gpu.clock_hz.value"),
        ('base = "jetson-nano"\n[gpu]\ndla_cores = -1\n', "gpu"),
        ('base = "jetson-nano"\n[gpu]\nprecisions = ["FP12"]\n', "gpu.precisions"),
        ('base = "jetson-nano"\n[gpu]\ndisputed_precisions = ["BF16"]\n', "gpu"),
        ('base = "jetson-orin-nx"\n[gpu]\nprecisions = ["BF16"]\n', "gpu"),
        ('base = "aarch64"\n[runtime]\nname = "tensorrt"\n', "runtime"),
        ('base = "jetson-nano"\n[runtime]\nname = "onnxruntime"\n', "runtime"),
        ('base = "_tensorrt"\n', ""),
    ],
)
def test_wrong_gpu_profiles_name_the_key(tmp_path: Path, text: str, where: str) -> None:
    path = tmp_path / "board.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TargetError) as caught:
        load_target(path)
    assert where in (caught.value.where or "")


def test_a_tensorrt_profile_needs_its_gpu(tmp_path: Path) -> None:
    text = to_toml(load_target("a100-40gb"))
    path = tmp_path / "board.toml"
    path.write_text(text.replace('name = "tensorrt"', 'name = "onnxruntime"\nmax_ir = 13'), encoding="utf-8")
    with pytest.raises(TargetError) as caught:
        load_target(path)
    assert "alignment_channels" in str(caught.value)
