"""Loading, merging, overriding and writing target profiles; the messages for what is wrong."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from edgepress.graph.errors import TargetError
from edgepress.targets.registry import list_targets, load_target, to_toml

NAMES = [summary.name for summary in list_targets()]


def _write(folder: Path, text: str, name: str = "board.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", NAMES)
def test_toml_round_trip(name: str, tmp_path: Path) -> None:
    profile = load_target(name)
    again = load_target(_write(tmp_path, to_toml(profile)))
    assert again == profile


def test_listing_starts_with_the_host_and_names_no_bases() -> None:
    summaries = list_targets()
    assert summaries[0].name == "host"
    assert not [summary for summary in summaries if summary.name.startswith("_")]
    assert all(summary.description for summary in summaries)


def test_aliases_are_unique_and_load() -> None:
    aliases = [alias for summary in list_targets() for alias in summary.aliases]
    assert len(set(aliases)) == len(aliases)
    assert not set(aliases) & set(NAMES)
    for summary in list_targets():
        for alias in summary.aliases:
            assert load_target(alias).name == summary.name
    assert load_target("Raspberry_Pi_5").name == "raspberry-pi-5"


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("rasberry-pi-5", "raspberry-pi-5"), ("x86-64-avx512-vni", "x86-64-avx512-vnni"), ("hots", "host")],
)
def test_a_misspelt_name_gets_near_names(wrong: str, near: str) -> None:
    with pytest.raises(TargetError) as caught:
        load_target(wrong)
    assert near in (caught.value.remedy or "")


def test_a_name_like_nothing_points_to_the_list() -> None:
    with pytest.raises(TargetError) as caught:
        load_target("zzzzzz")
    assert "targets list" in (caught.value.remedy or "")


def test_bases_are_no_targets() -> None:
    with pytest.raises(TargetError):
        load_target("_onnxruntime-cpu")


def test_own_file_builds_on_a_base(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        'base = "raspberry-pi-5"\nname = "my-board"\n'
        "[device.memory_bytes]\nvalue = 8589934592\n"
        '[kernels.conv-static-s8s8]\ngrade = "refused"\nreason = "measured slower here"\n',
    )
    mine, base = load_target(path), load_target("raspberry-pi-5")
    assert mine.name == "my-board"
    assert mine.derived_from == ("raspberry-pi-5", "aarch64-dotprod", "aarch64", "_onnxruntime-cpu")
    assert mine.device.memory_bytes is not None
    assert mine.device.memory_bytes.value == 8589934592
    # the base's source speaks of the base's figure only
    assert (mine.device.memory_bytes.evidence, mine.device.memory_bytes.source) == ("none", "")
    assert mine.device.cores == base.device.cores
    assert mine.static_activation_type == "uint8"
    assert not mine.aliases


def test_own_file_without_a_name_is_called_like_the_file(tmp_path: Path) -> None:
    assert load_target(_write(tmp_path, 'base = "aarch64"\n', "kitchen.toml")).name == "kitchen"


def test_own_file_on_own_file(tmp_path: Path) -> None:
    _write(tmp_path, 'base = "aarch64"\ndefault_threads = 3\n', "under.toml")
    over = load_target(_write(tmp_path, 'base = "under.toml"\n', "over.toml"))
    assert over.default_threads == 3
    assert over.derived_from[:2] == ("under", "aarch64")


def test_a_figure_may_be_a_bare_number(tmp_path: Path) -> None:
    profile = load_target(
        _write(tmp_path, 'base = "aarch64"\nalignment_channels = 4\n[device]\nclock_hz = 1.2e9\n')
    )
    assert profile.device.clock_hz is not None
    assert (profile.device.clock_hz.value, profile.device.clock_hz.evidence) == (1.2e9, "none")
    assert profile.alignment_channels.value == 4


@pytest.mark.parametrize(
    ("text", "where", "remedy"),
    [
        ('base = "aarch64"\ndefault_thread = 2\n', "default_thread", "default_threads"),
        ('base = "aarch64"\n[device]\nmemory = 1\n', "device.memory", "memory_bytes"),
        (
            'base = "aarch64"\n[kernels.matmul-float]\nspeed = 2\n',
            "kernels.matmul-float.speed",
            "speedup_over_float",
        ),
        (
            'base = "aarch64"\n[kernels.matmul-float]\ngrade = "quick"\n',
            "kernels.matmul-float.grade",
            "targets show",
        ),
        ('base = "aarch64"\n[kernels.mine]\nop = "Conv"\n', "kernels.mine", "targets show"),
        ('base = "aarch64"\n[device.clock_hz]\nvalue = "fast"\n', "device.clock_hz.value", "targets show"),
        ('base = "aarch64"\n[device.clock_hz]\nvalue = 1\nunit = "Hz"\n', "device.clock_hz.unit", ""),
        ('base = "aarch64"\n[device.clock_hz]\nvalue = 1\nevidence = "documented"\n', "device.clock_hz", ""),
        ('base = "aarch64"\nschema_version = 9\n', "", ""),
        ('name = "bare"\n', "", ""),
        ('base = "aarch64"\nkernels = 3\n', "kernels", ""),
        ('base = "aarch64"\n[runtime_ops]\nGelu = 3\n', "runtime_ops", ""),
        ('base = "no-such-base"\n', "", ""),
        ('base = "_no-such-base"\n', "base", ""),
        ("base = 3\n", "base", ""),
        ('base = "board.toml"\n', "base", ""),
        ('base = "gone.toml"\n', "gone.toml", "check the path"),
        ("this is = = not toml", "board.toml", "targets show"),
    ],
)
def test_wrong_profiles_name_the_key(tmp_path: Path, text: str, where: str, remedy: str) -> None:
    with pytest.raises(TargetError) as caught:
        load_target(_write(tmp_path, text))
    assert where in (caught.value.where or "")
    assert remedy in (caught.value.remedy or "")


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="cannot be read"):
        load_target(tmp_path / "none.toml")
    with pytest.raises(TargetError, match="cannot be read"):
        load_target(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TargetError, match="not TOML"):
        load_target(binary)


def test_overrides_reach_every_level() -> None:
    profile = load_target(
        "raspberry-pi-5",
        [
            "target.default_threads=2",
            "target.device.memory_bytes=8589934592",
            "target.runtime.max_opset = 17",
            "target.kernels.conv-static-s8s8.speedup_over_float=1.5",
            "target.description=the one under my desk",
            'target.session_config."session.intra_op.allow_spinning"=0',
            "target.alignment_channels=8",
        ],
    )
    assert profile.default_threads == 2
    assert profile.device.memory_bytes is not None
    assert (profile.device.memory_bytes.value, profile.device.memory_bytes.evidence) == (8589934592, "none")
    assert profile.runtime.max_opset == 17
    kernel = next(kernel for kernel in profile.kernels if kernel.name == "conv-static-s8s8")
    assert (kernel.speedup_over_float, kernel.evidence) == (1.5, "none")
    assert kernel.source.startswith("--set")
    assert profile.description == "the one under my desk"
    assert profile.session_config == {"session.intra_op.allow_spinning": "0"}
    assert (profile.alignment_channels.value, profile.alignment_channels.evidence) == (8, "none")
    assert load_target("raspberry-pi-5").default_threads == 4


def test_an_override_of_a_figures_value_drops_its_source() -> None:
    profile = load_target("raspberry-pi-5", ["target.device.clock_hz.value=3000000000"])
    assert profile.device.clock_hz is not None
    assert profile.device.clock_hz.evidence == "none"
    assert "documentation" not in profile.device.clock_hz.source


@pytest.mark.parametrize(
    ("override", "where", "remedy"),
    [
        ("target.devise.cores=2", "target.devise", "device"),
        ("target.device.memory=2", "device.memory", "memory_bytes"),
        ("target.kernels.conv-static-s8.grade=fast", "conv-static-s8", "conv-static-s8s8"),
        ("target.kernels.conv-static-s8s8.grad=fast", "grad", "grade"),
        ("target.runtime.opset=2", "opset", "max_opset"),
        ("target.device.clock_hz.val=2", "val", "value"),
        ("target.default_threads=many", "default_threads", ""),
        ("target.default_threads=0", "", ""),
        ("target.kernels.conv-static-s8s8.grade=quick", "kernels.conv-static-s8s8.grade", ""),
        ("target.device.memory_bytes=4GB", "device.memory_bytes", ""),
        ("target.derived_from=[]", "derived_from", ""),
        ("default_threads=2", "--set", "target.FIELD=VALUE"),
        ("target.default_threads", "--set", "target.FIELD=VALUE"),
        ("target.default_threads=", "--set", "target.FIELD=VALUE"),
        ("target.a b=2", "--set", ""),
        ("target.default_threads=1\nname='x'", "--set", ""),
    ],
)
def test_wrong_overrides_say_what_is_near(override: str, where: str, remedy: str) -> None:
    with pytest.raises(TargetError) as caught:
        load_target("raspberry-pi-5", [override])
    assert where in (caught.value.where or "")
    assert remedy in (caught.value.remedy or "")


def test_written_profiles_are_plain_toml() -> None:
    tables = tomllib.loads(to_toml(load_target("raspberry-pi-4")))
    assert tables["kernels"]["matmul-dynamic-u8s8"]["evidence"] == "modelled"
    assert "base" not in tables


def test_importing_targets_loads_no_runtime() -> None:
    code = (
        "import sys; from edgepress.targets.registry import load_target; load_target('host');"
        "assert not {'onnxruntime', 'torch', 'numpy', 'onnx_ir'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
