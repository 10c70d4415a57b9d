"""Whether a device is the target: exact, another board, a class, or not at all."""

import msgspec
import pytest
from edgepress.driver.measuring.device_planning import Fit, fit_of
from edgepress.graph.errors import NotSupported, TargetError
from edgepress.runtimes.device import DeviceFeatures, LocalDevice
from edgepress.targets.registry import load_target

A76 = ("asimd", "asimddp", "asimdhp", "crc32", "fp", "fphp")


def features(core="Arm Cortex-A76", isa=A76, board=None, *, architecture="aarch64", version="1.31.1"):
    return DeviceFeatures(
        architecture=architecture,
        core=core,
        isa_features=isa,
        runtime="onnxruntime",
        runtime_version=version,
        board=board,
    )


PI5 = features(board="Raspberry Pi 5 Model B Rev 1.0")
PI4 = features("Arm Cortex-A72", ("asimd", "crc32", "fp"), "Raspberry Pi 4 Model B Rev 1.4")
PI3 = features("Arm Cortex-A53", ("asimd", "crc32", "fp"), "Raspberry Pi 3 Model B Plus Rev 1.3")
PI500 = features(board="Raspberry Pi 500 Rev 1.0")
ROCK5 = features(board="Radxa ROCK 5B")
ALTRA = features("Arm core (part 0xd0c)")
A710 = features("Arm core (part 0xd47)", (*A76, "bf16", "i8mm"))


def fit(target, device, **more):
    profile = load_target(target) if isinstance(target, str) else target
    return fit_of(profile, device, where="--device ssh://pi@board", **more)


@pytest.mark.parametrize(
    ("target", "device", "grade"),
    [
        ("raspberry-pi-5", PI5, "measured-on-target"),
        ("raspberry-pi-4", PI4, "measured-on-target"),
        ("raspberry-pi-3b-plus", PI3, "measured-on-target"),
        ("raspberry-pi-5", PI500, "measured-elsewhere"),
        ("raspberry-pi-5", ROCK5, "measured-elsewhere"),
        ("aarch64-dotprod", ALTRA, "measured-elsewhere"),
        ("aarch64-dotprod", PI5, "measured-elsewhere"),
    ],
)
def test_times_of_the_target_or_its_like_decide(target, device, grade):
    found = fit(target, device)
    assert (found.decides, found.evidence) == (True, grade)
    assert bool(found.notes) is (grade != "measured-on-target")


@pytest.mark.parametrize(
    ("target", "device", "why", "near"),
    [
        ("raspberry-pi-5", PI4, "(Arm Cortex-A72) lacks fphp, asimdhp, asimddp", "raspberry-pi-4"),
        (
            "raspberry-pi-4",
            PI5,
            "has asimddp, asimdhp, fphp beyond what raspberry-pi-4",
            "raspberry-pi-5",
        ),
        ("raspberry-pi-5", ALTRA, "is another processor (Arm core (part 0xd0c))", "aarch64-dotprod"),
        ("aarch64-dotprod", A710, "has crc32, bf16, i8mm beyond what aarch64-dotprod has", "aarch64-i8mm"),
        ("x86-64-avx2", PI5, "is aarch64, x86-64-avx2 is x86-64", "raspberry-pi-5"),
    ],
)
def test_another_device_is_refused_unless_its_times_decide_nothing(target, device, why, near):
    with pytest.raises(TargetError, match="does not fit the target") as caught:
        fit(target, device)
    assert why in caught.value.why
    assert f"--target {near}," in caught.value.remedy
    assert "--allow-unmeasured" in caught.value.remedy
    assert caught.value.where == "--device ssh://pi@board"
    found = fit(target, device, allow_unmeasured=True)
    assert found == Fit(decides=False, evidence="none", notes=found.notes)
    assert why in found.notes[0]


def test_this_machine_fits_its_own_profile_and_what_was_exported_of_it():
    host, here = load_target("host"), LocalDevice().features()
    assert fit(host, here).evidence == "measured-on-target"
    exported = msgspec.structs.replace(host, name="mine", kind="cpu-class", derived_from=())
    assert fit(exported, here).evidence == "measured-on-target"
    other = msgspec.structs.replace(here, core="another core")
    with pytest.raises(TargetError):
        fit(exported, other)


def test_another_version_of_the_runtime_is_told():
    found = fit("raspberry-pi-5", msgspec.structs.replace(PI5, runtime_version="1.19.2"))
    assert found.evidence == "measured-on-target"
    assert "runs onnxruntime 1.19.2; the profile raspberry-pi-5 describes 1.31.1" in found.notes[0]
    assert fit("raspberry-pi-5", msgspec.structs.replace(PI5, runtime_version="")).notes == ()


def test_targets_of_another_runtime_are_not_timed():
    with pytest.raises(NotSupported, match="cannot be timed on a device"):
        fit("jetson-orin-nx", PI5, allow_unmeasured=True)
