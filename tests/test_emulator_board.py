"""Emulated boards as they run: the instruction set, exact counts, bundles end to end, nothing left behind."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import driver_case
import pytest
from edgepress.driver.cli import main
from edgepress.export.runs import read_runs
from edgepress.runtimes.emulator.counts import instructions_of, read_counts
from edgepress.runtimes.emulator.device import EmulatedDevice
from edgepress.runtimes.emulator.folders import is_on
from edgepress.runtimes.emulator.instance import BoardInstance
from edgepress.runtimes.remote import parse_device_url
from emulator_case import PI_4, PI_5, ready, shared_cache
from test_device_runner_bundle import SCHEMA, faults

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("emulator")]
MACS = 48 * 256 * 96  # of each product in check.py
# SDOT and FMLA.8H of vector registers, then a return: one instruction as a function of its own.
OPCODES = {"dot": 0x4E829420, "half": 0x4E420C20, "float": 0x4E22CC20, "matrix": 0x4E82A420}
TRIAL = """
import ctypes, mmap, sys
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(int(sys.argv[1]).to_bytes(4, "little") + (0xD65F03C0).to_bytes(4, "little"))
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
print("executed")
"""


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEPRESS_CACHE", str(shared_cache(tmp_path_factory)))
        yield ready(PI_4, PI_5)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Products of 8-bit integers, for a Raspberry Pi 5."""
    folder = tmp_path_factory.mktemp("bundle")
    model, data = driver_case.mlp(folder / "mlp.onnx"), driver_case.vectors(folder / "x.npz")
    words = ["compile", str(model), "--target", "raspberry-pi-5", "--quantization", "static", "--calib", data]
    assert main([*words, "-o", str(folder / "bundle"), "-q"]) == 0
    return folder / "bundle"


@pytest.fixture
def whole(place):
    """Skip where the host allows no whole boards."""
    emulator, site = place
    with BoardInstance(emulator, PI_4, site) as instance:
        if instance.why_not_whole is not None:
            pytest.skip(instance.why_not_whole)


@pytest.fixture(params=["whole", "one by one"])
def kind(request, monkeypatch):
    """A whole board, and what a host gives that allows no namespaces."""
    if request.param == "whole":
        request.getfixturevalue("whole")
    else:
        monkeypatch.setattr(BoardInstance, "_obstacle", lambda _: "this test asks for it")
    return request.param


@pytest.mark.parametrize("board", [PI_4, PI_5], ids=lambda board: board.name)
def test_products_are_exact_and_counted_to_the_instruction(place, board, kind):
    emulator, site = place
    with BoardInstance(emulator, board, site) as instance:
        assert (instance.why_not_whole is None) is (kind == "whole")
        variables, path = instance.counting("check")
        script = "/opt/emulator/check.py"
        script = script if instance.why_not_whole is None else str(emulator.root / script[1:])
        seen = json.loads(instance.output([instance.python, script], environment=variables))
        counted = [instructions_of(region, 1) for _, region in sorted(read_counts(path).items())]
    assert [item["difference"] for item in seen["products"][:2]] == [0, 0]
    assert seen["products"][2]["difference"] < 1e-4
    dot = board is PI_5
    assert seen["features"] == {"dot_product": dot, "float16": dot, "int8_matrix": 0, "sve": 0}
    assert [item["dot"] for item in counted] == ([MACS / 16, MACS / 16, 0] if dot else [0, 0, 0])
    assert [item["widening"] for item in counted] == ([0, 0, 0] if dot else [MACS / 8, MACS / 8, 0])
    assert [item["fma"] for item in counted] == [0, 0, MACS / 4]
    assert all(item["total"] > item["dot"] + item["widening"] + item["fma"] for item in counted)
    assert not instance.folder.exists()


def test_instructions_that_a_processor_lacks_end_the_program(place, tmp_path, kind):
    emulator, site = place
    (tmp_path / "trial.py").write_text(TRIAL)

    def ends(instance, name):
        return instance.run(["python3", "trial.py", str(OPCODES[name])], bind=tmp_path)

    assert kind
    illegal = 128 + signal.SIGILL
    with BoardInstance(emulator, PI_4, site) as instance:
        assert [ends(instance, name) for name in ("float", "dot", "half")] == [0, illegal, illegal]
    with BoardInstance(emulator, PI_5, site) as instance:
        assert [ends(instance, name) for name in ("dot", "half", "matrix")] == [0, 0, illegal]


def keys_of(value):
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from keys_of(item)


def test_a_bundle_is_checked_and_counted_in_one_command(place, bundle, tmp_path, capsys, kind):
    emulator, _ = place
    assert kind
    before = {path.name for path in emulator.instances.glob("*/")}
    mine = shutil.copytree(bundle, tmp_path / "bundle")
    words = ["benchmark", str(mine), "--device", "emulated:raspberry-pi-5", "--baseline", str(mine), "--json"]
    code = main(words)
    out, err = capsys.readouterr()
    assert code == 0, err
    [device] = json.loads(out)["devices"]
    result = device["results"][0]["result"]
    assert faults(result, SCHEMA) == []
    assert result["emulated"] is True
    assert result["device"]["board"] == PI_5.model
    assert result["outputs"]["within_tolerance"] is True
    assert result["outputs"]["max_abs_diff"] is not None
    instructions = result["instructions"]
    assert instructions["total"] > instructions["dot"] > 0
    assert instructions["widening"] == 0
    both = result["benchmark"]["instructions"]
    assert set(both) == {"bundle", "baseline"}
    # The same file twice: what multiplies is the same to the instruction, all together to one in a hundred.
    assert both["baseline"]["dot"] == instructions["dot"]
    assert both["baseline"]["total"] == pytest.approx(instructions["total"], rel=0.01)
    assert not [key for key in keys_of(result) if key.endswith("_ms")]
    runs, problems = read_runs(mine)
    assert [name for name in runs if name.startswith("device")] == ["device.json"]
    assert problems == []
    assert {path.name for path in emulator.instances.glob("*/")} <= before


def test_a_board_says_what_it_is_under_its_own_name(place, kind):
    emulator, _ = place
    assert kind
    with EmulatedDevice(parse_device_url("emulated:raspberry-pi-4"), home=emulator.home) as device:
        assert (device.name, device.where) == ("emulated:raspberry-pi-4", "emulated:raspberry-pi-4")
        assert device.host_facts().core == "Arm Cortex-A72"
        assert device.facts()["machine"] == "aarch64"
        assert device.python().runtime_version == device.facts()["packages"]["onnxruntime"]


def test_a_broken_bundle_is_refused(bundle, tmp_path, capsys):
    mine = shutil.copytree(bundle, tmp_path / "bundle")
    data = bytearray((mine / "model.onnx").read_bytes())
    data[-1] ^= 1
    (mine / "model.onnx").write_bytes(data)
    assert main(["verify", str(mine), "--device", "emulated:raspberry-pi-4"]) == 3
    assert "model.onnx" in capsys.readouterr().err


def processes_of(mark):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it may be gone
            if mark.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


def test_a_killed_command_leaves_no_process_and_no_file_for_long(place, tmp_path):
    emulator, site = place
    mark = f"edgepress-test-{os.getpid()}"
    program = f"import sys, time; print('{mark}', flush=True); time.sleep(600)"
    words = [sys.executable, "-m", "edgepress", "emulator", "run", "raspberry-pi-4", "--"]
    words += ["python3", "-c", program]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, cwd=tmp_path)
    try:
        assert mark.encode() in process.stdout.readline()
        left = [folder for folder in emulator.instances.glob("*/") if folder.name.startswith(PI_4.name)]
        assert left
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    deadline = time.monotonic() + 20
    while (processes_of(mark) or any(map(is_on, left))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(mark) == []
    with BoardInstance(emulator, PI_4, site) as instance:
        mine = {instance.folder}
    assert not {folder for folder in left if folder.exists()} - mine


@pytest.mark.usefixtures("whole")
def test_the_exit_status_is_the_program_s(capfd):
    words = ["emulator", "run", "raspberry-pi-4", "-q", "--"]
    assert main([*words, "uname", "-m"]) == 0
    assert capfd.readouterr().out.strip() == "aarch64"
    assert main([*words, "bash", "-c", "exit 7"]) == 7
    assert main([*words, "absent-program"]) == 127


@pytest.mark.usefixtures("whole")
def test_a_board_that_stays_on(place):
    try:
        assert main(["emulator", "up", "raspberry-pi-4"]) == 0
        config = place[0].instances / "raspberry-pi-4" / "ssh_config"
        words = ["ssh", "-F", str(config), "-o", "BatchMode=yes", "raspberry-pi-4-emulated", "uname", "-m"]
        told = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
        assert told.stdout.strip() == "aarch64"
        assert main(["emulator", "remove"]) == 2  # not while a board is on
    finally:
        assert main(["emulator", "down", "raspberry-pi-4"]) == 0
    assert not config.exists()
