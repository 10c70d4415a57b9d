"""Emulated boards, without running one: what they say of themselves, counts, what setting up needs."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from edgepress.graph.errors import NotSupported, OutputError, RecipeError, RuntimeUnavailable
from edgepress.runtimes.emulator import debian, device, folders, install, instance, users
from edgepress.runtimes.emulator.boards import BOARDS, board_named, write_identity
from edgepress.runtimes.emulator.counts import instructions_of, read_counts
from edgepress.runtimes.emulator.device import EmulatedDevice
from edgepress.runtimes.emulator.install import Emulator
from edgepress.runtimes.emulator.instance import BoardInstance
from edgepress.runtimes.remote import parse_device_url
from edgepress.targets.host import read_host
from edgepress.targets.registry import load_target

TARGETS = {name: "jetson-orin-nano" if name == "jetson-orin" else name for name in BOARDS}


def silent(_name):
    return contextlib.nullcontext()


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_says_of_itself_what_its_target_knows(name, tmp_path):
    board, profile = BOARDS[name], load_target(TARGETS[name])
    write_identity(board, tmp_path)
    (tmp_path / "proc").mkdir()
    (tmp_path / "cpuinfo").rename(tmp_path / "proc/cpuinfo")
    host = read_host(tmp_path)
    assert host.core == profile.device.core
    assert host.core.lower() == f"arm {board.cpu}"
    assert host.board == board.model
    assert "emulated" in board.model  # what the device runner goes by
    assert host.cores == board.cores
    assert host.features == set(profile.device.isa_features)
    assert host.caches_bytes["l1d_bytes"] == board.caches[0].size_kib * 1024


def test_boards_that_there_are_not():
    with pytest.raises(RecipeError) as caught:
        board_named("raspberry-pi-3")
    assert "raspberry-pi-4" in caught.value.remedy
    with pytest.raises(RecipeError) as caught:
        board_named("zzz")
    assert "jetson-orin" in caught.value.remedy


def test_counts_are_summed_by_what_they_mean(tmp_path):
    path = tmp_path / "counts"
    row = {
        "tag": 1,
        "total": 100,
        "sdot": 10,
        "udot": 4,
        "usdot": 0,
        "mmla": 2,
        "widening_8": 6,
        "widening_16": 2,
    }
    row |= {"fmla_32": 8, "fmla_16": 3, "bfloat": 1, "load": 20}
    path.write_text(json.dumps({**row, "tag": 0}) + "\n" + json.dumps(row) + "\n")
    regions = read_counts(path)
    assert set(regions) == {0, 1}
    found = instructions_of(regions[1], 2)
    assert {key: found[key] for key in ("total", "dot", "widening", "fma")} == {
        "total": 50,
        "dot": 8,
        "widening": 4,
        "fma": 6,
    }
    assert found["by_kind"]["load"] == 10
    assert "usdot" not in found["by_kind"]


@pytest.mark.parametrize("text", ["{", "[1]\n", '{"total": 1}\n', '{"tag": 0, "total": 1}\n', "\xff"])
def test_counts_that_are_none(tmp_path, text):
    path = tmp_path / "counts"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RuntimeUnavailable, match="no instruction counts"):
        read_counts(path)
    with pytest.raises(RuntimeUnavailable):
        read_counts(tmp_path / "absent")


def test_an_emulated_board_refuses_to_be_timed(tmp_path):
    device = EmulatedDevice(parse_device_url("emulated:raspberry-pi-5"), home=tmp_path)
    with pytest.raises(NotSupported, match="no times") as caught:
        device.time([], {"x": np.zeros(1)}, None)
    assert "ssh://" in caught.value.remedy
    assert device.evidence == "modelled"
    assert not list(tmp_path.iterdir())


def stages(monkeypatch, fails=()):
    """An emulator whose stages only note that they were made."""
    made = []

    def make(name):
        def run(*_):
            made.append(name)
            if name in fails:
                raise RuntimeUnavailable(f"{name} failed")

        return run

    for name in ("guest", "emulator", "new_emulator", "programs"):
        monkeypatch.setattr(Emulator, f"_make_{name}", make(name))
    monkeypatch.setattr(install, "_need_host", lambda: None)
    return made


def test_setting_up_makes_what_is_missing_and_nothing_twice(monkeypatch, tmp_path):
    made, boards = stages(monkeypatch), [BOARDS["raspberry-pi-4"]]
    place = Emulator(tmp_path / "emulator")
    assert not place.is_ready(boards[0])
    told = []

    @contextlib.contextmanager
    def step(name):
        told.append(name)
        yield

    place.install(boards, step)
    assert made == ["guest", "emulator", "programs"]
    assert len(told) == 3
    assert place.is_ready(boards[0])
    place.install(boards, step)
    assert made == ["guest", "emulator", "programs"]
    assert not place.is_ready(BOARDS["jetson-orin"])
    place.install([BOARDS["jetson-orin"]], step)
    assert made[3:] == ["new_emulator"]


def test_setting_up_goes_on_where_it_was_stopped(monkeypatch, tmp_path):
    place, boards = Emulator(tmp_path / "emulator"), [BOARDS["raspberry-pi-4"]]
    stages(monkeypatch, fails=("emulator",))
    with pytest.raises(RuntimeUnavailable, match="emulator failed"):
        place.install(boards, silent)
    made = stages(monkeypatch)
    place.install(boards, silent)
    assert made == ["emulator", "programs"]


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    stages(monkeypatch)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        Emulator(tmp_path / "file" / "emulator").install([BOARDS["raspberry-pi-4"]], silent)


def test_hosts_that_cannot(monkeypatch, tmp_path):
    monkeypatch.setattr(install.platform, "machine", lambda: "arm64")
    with pytest.raises(RuntimeUnavailable, match="Linux on x86-64") as caught:
        Emulator(tmp_path).install([BOARDS["raspberry-pi-4"]], silent)
    assert "ssh://" in caught.value.remedy


def test_tools_that_are_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(debian.shutil, "which", lambda name: None if name == "dpkg-deb" else f"/bin/{name}")
    with pytest.raises(RuntimeUnavailable, match="needs dpkg-deb"):
        debian.DebianPackages(tmp_path, "bookworm", "arm64").fetch(["bash"])
    monkeypatch.setattr(debian.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(debian, "_KEYRING", tmp_path / "absent.gpg")
    with pytest.raises(RuntimeUnavailable, match="keyring") as caught:
        debian.DebianPackages(tmp_path, "bookworm", "arm64").fetch(["bash"])
    assert "apt install" in caught.value.remedy


def answer(stdout="", stderr="", code=0):
    return lambda *_, **__: subprocess.CompletedProcess([], code, stdout, stderr)


def test_mirrors(monkeypatch):
    for name in ("EDGEPRESS_DEBIAN_MIRROR", "EDGEPRESS_DEBIAN_SECURITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(debian, "run_tool", answer("http://a.example/ubuntu/ jammy\n"))
    assert debian._mirrors() == ("http://deb.debian.org/debian", "http://deb.debian.org/debian-security")
    own = "http://m.example/debian/ bookworm\nhttp://m.example/debian-security/ bookworm-security\n"
    monkeypatch.setattr(debian, "run_tool", answer(own))
    assert debian._mirrors() == ("http://m.example/debian", "http://m.example/debian-security")
    monkeypatch.setenv("EDGEPRESS_DEBIAN_MIRROR", "http://n.example/debian/")
    assert debian._mirrors()[0] == "http://n.example/debian"


def test_what_apt_says_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(debian, "_need_tools", lambda: None)
    monkeypatch.setattr(
        debian, "run_tool", answer(stderr="W: x\nE: Could not resolve 'm.example'\n", code=100)
    )
    with pytest.raises(RuntimeUnavailable, match="cannot be fetched") as caught:
        debian.DebianPackages(tmp_path, "bookworm", "arm64").fetch(["bash"])
    assert "Could not resolve" in caught.value.why
    assert "W: x" not in caught.value.why
    assert "EDGEPRESS_DEBIAN_MIRROR" in caught.value.remedy


def test_what_only_maintainer_scripts_use_is_left_out(monkeypatch, tmp_path):
    told = "Inst libperl5.36 (5)\nInst bash (5.2)\nInst perl-base (5)\nConf bash (5.2)\nInst libc6 (2.36)\n"
    monkeypatch.setattr(debian, "run_tool", answer(told))
    assert debian.DebianPackages(tmp_path, "bookworm", "arm64")._closure(["bash"]) == ["bash", "libc6"]


def test_the_runtime_s_wheels_that_there_are_not(monkeypatch, tmp_path):
    from edgepress.runtimes.emulator import wheels

    told = "ERROR: No matching distribution found for onnxruntime==0.0.1\n"
    monkeypatch.setattr(wheels.subprocess, "run", answer(stderr=told, code=1))
    with pytest.raises(RuntimeUnavailable, match=r"onnxruntime 0\.0\.1") as caught:
        wheels.fetch_site(tmp_path / "site", "0.0.1")
    assert "No matching distribution" in caught.value.why
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(wheels.subprocess, "run", answer(stderr="python: No module named pip\n", code=1))
    with pytest.raises(RuntimeUnavailable) as caught:
        wheels.fetch_site(tmp_path / "site", None)
    assert "ensurepip" in caught.value.remedy


def test_folders_of_boards_that_were_killed_are_swept(tmp_path):
    (tmp_path / "dead").mkdir()
    (tmp_path / "dead/file").write_text("")
    held = folders.new_folder(tmp_path / "alive")
    assert sorted(folder.name for folder in tmp_path.glob("*/")) == ["alive"]
    assert folders.is_on(tmp_path / "alive")
    assert not folders.is_on(tmp_path / "absent")
    with pytest.raises(FileExistsError):
        folders.new_folder(tmp_path / "alive")
    os.close(held)
    assert not folders.is_on(tmp_path / "alive")
    assert not folders.switch_off(tmp_path / "alive")


def test_without_rights_or_a_compiler_programs_run_one_by_one(monkeypatch, tmp_path):
    board = BoardInstance(Emulator(tmp_path), BOARDS["raspberry-pi-4"], tmp_path / "site")
    assert "no C compiler" in board._obstacle()
    with pytest.raises(RuntimeUnavailable, match="cannot be counted"):
        board.counting("x")
    launcher = board.emulator.launcher(board.board)
    launcher.parent.mkdir(parents=True)
    launcher.write_text("")
    monkeypatch.setattr(instance.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(instance.shutil, "which", lambda _: None)
    assert "newuidmap" in board._obstacle()
    board.why_not_whole = "asked for"
    assert board.python == str(board.folder / "python3")
    assert board.variables["PYTHONPATH"] == str(tmp_path / "site")
    with pytest.raises(RuntimeUnavailable, match="no ssh"):
        board.start_server()


def test_an_entrance_without_permission_says_so(tmp_path):
    """The program that enters ends by itself when its parent never maps the users."""
    request = json.dumps({"stays": False, "root": str(tmp_path)})
    ready, go = os.pipe(), os.pipe()
    words = [sys.executable, "-I", "-S", str(Path(instance.__file__).with_name("enter.py")), request]
    process = subprocess.Popen([*words, str(ready[1]), str(go[0])], pass_fds=(ready[1], go[0]))
    os.close(ready[1])
    os.read(ready[0], 1)
    os.close(go[1])
    os.close(go[0])
    started = time.monotonic()
    assert process.wait(10) in (instance.NO_NAMESPACE, 1)
    assert time.monotonic() - started < 10
    os.close(ready[0])


def test_nothing_is_removed_under_a_board_that_is_on(monkeypatch, tmp_path):
    made, place, boards = stages(monkeypatch), Emulator(tmp_path / "emulator"), [BOARDS["raspberry-pi-4"]]
    place.install(boards, silent)
    held = folders.new_folder(place.instances / "raspberry-pi-4")
    with pytest.raises(OutputError, match="switched on"):
        place.remove()
    monkeypatch.setattr(install, "_FORMAT", "another")
    with pytest.raises(OutputError, match="switched on"):
        place.install(boards, silent)
    assert made == ["guest", "emulator", "programs"]
    os.close(held)
    place.install(boards, silent)
    assert len(made) == 6
    place.remove()
    assert not place.home.exists()


@pytest.mark.parametrize("name", ["boards.py", "check.py", "insnmix.c", "pin.c"])
def test_another_version_of_a_part_is_made_anew(monkeypatch, tmp_path, name):
    place, boards, own = Emulator(tmp_path / "emulator"), [BOARDS["raspberry-pi-4"]], install._own
    stages(monkeypatch)
    place.install(boards, silent)
    changed = tmp_path / name
    changed.write_text(own(name).read_text() + "\n")
    monkeypatch.setattr(install, "_own", lambda asked: changed if asked == name else own(asked))
    assert not place.is_ready(boards[0])


def test_switching_off_spares_other_programs_and_boards_that_others_have(monkeypatch, tmp_path):
    monkeypatch.setattr(folders, "_OFF_S", 0.2)
    folder = tmp_path / "raspberry-pi-4"
    held = folders.new_folder(folder)
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (folder / "pid").write_text(str(bystander.pid))
        with pytest.raises(OutputError, match="does not go off"):
            folders.switch_off(folder)
        assert folder.is_dir()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.communicate()
        os.close(held)


def test_a_board_that_cannot_be_tried_leaves_no_folder(monkeypatch, tmp_path):
    board = BoardInstance(Emulator(tmp_path), BOARDS["raspberry-pi-4"], None)

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(board, "_obstacle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        board.open()
    assert not board.folder.exists()
    assert board._lock is None


def test_a_tool_for_users_that_is_missing(monkeypatch):
    run = users.subprocess.run

    def without(words, **options):
        if words[0].startswith("new"):
            raise FileNotFoundError(words[0])
        return run(words, **options)

    monkeypatch.setattr(users.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(users, "_first_of", lambda *_: 100000)
    monkeypatch.setattr(users.subprocess, "run", without)
    assert users.map_users(os.getpid()) is False


def test_a_region_that_was_never_counted():
    result = {"benchmark": {"counted_inferences": 1, "counted": ["bundle", "baseline"]}}
    with pytest.raises(RuntimeUnavailable, match="counted no instructions"):
        device._fill(result, {0: {}})
