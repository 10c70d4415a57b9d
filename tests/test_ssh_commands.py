"""The commands on devices by ssh: one board, several side by side, and boards that fail."""

import json
import sys
import threading

import export_case
import pytest
import ssh_case
from edgepress.driver.cli import main
from edgepress.driver.devices.fleet import exit_code_of, run_on_devices
from edgepress.export.runs import read_runs
from edgepress.graph.errors import RuntimeUnavailable, VerifyFailed
from edgepress.runtimes.device_file import DeviceEntry
from edgepress.targets.host import read_host
from edgepress.targets.registry import load_target

QUICK = ["--rounds", "1"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return export_case.make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    with ssh_case.running_board(tmp_path_factory.mktemp("board")) as made:
        yield made


def on(board):
    return ["--device", board.url, "--ssh-config", str(board.config), "--device-python", sys.executable]


def lab(board):
    """A devices file: this board, one that is switched off, and one that is no pi."""
    path = board.folder / "lab.toml"
    common = f'ssh_config = "{board.config}"\npython = "{sys.executable}"\n'
    path.write_text(
        f'[devices.up]\nurl = "{board.url}"\ngroups = ["pi", "good"]\n{common}'
        f'[devices.down]\nurl = "ssh://board:{ssh_case.free_port()}"\ngroups = ["pi"]\n{common}'
        '[devices.here]\nurl = "local"\ngroups = ["good"]\n'
    )
    return path


def told(words, capsys, code=0):
    got = main([*words, "--json"])
    out, err = capsys.readouterr()
    assert got == code, err
    return json.loads(out) if out else err


def test_verify_on_a_board(board, bundle, capsys):
    assert main(["verify", str(bundle), *on(board)]) == 0
    out = capsys.readouterr().out
    assert "within tolerance" in out
    assert board.url in out


def test_benchmark_on_a_board_keeps_the_result_in_the_bundle(board, bundle, capsys):
    model = bundle / "model.onnx"
    words = ["benchmark", str(bundle), "--baseline", str(model), *QUICK, *on(board)]
    (device,) = told(words, capsys)["devices"]
    assert device["url"] == board.url
    assert device["error"] is None
    (item,) = device["results"]
    latency = item["result"]["benchmark"]["latency"]
    assert len(latency) == 2
    assert all(entry["p50_ms"] > 0 for entry in latency.values())
    runs, problems = read_runs(bundle)
    assert problems == []
    assert runs["device.json"].payload["benchmark"]["latency"] == latency
    assert board.left() == []


def test_a_group_is_worked_with_side_by_side_and_one_that_is_off_stops_nobody(board, bundle, capsys):
    words = ["verify", str(bundle), "--devices", str(lab(board))]
    document = told([*words, "--group", "pi"], capsys, code=4)
    up, down = document["devices"]
    assert up["results"][0]["result"]["outputs"]["within_tolerance"]
    assert (down["results"], down["error"]["exit_code"]) == ([], 4)
    assert "no ssh server answers" in down["error"]["what"]
    document = told([*words, "--group", "good"], capsys)
    assert [device["name"] for device in document["devices"]] == ["up", "here"]
    assert all(device["results"] for device in document["devices"])


def test_a_board_that_is_off(board, bundle, capsys):
    port = ssh_case.free_port()
    words = ["verify", str(bundle), "--device", f"ssh://board:{port}", "--ssh-config", str(board.config)]
    assert main(words) == 4
    err = capsys.readouterr().err
    assert "no ssh server answers" in err
    assert "do:" in err


def test_a_corrupted_bundle_fails_the_check(board, tmp_path, capsys):
    bundle = export_case.make_bundle(tmp_path)
    with (bundle / "model.onnx").open("ab") as file:
        file.write(b"x")
    assert main(["verify", str(bundle), *on(board)]) == 3
    assert "model.onnx" in capsys.readouterr().err


def test_doctor_looks_at_a_board_and_installs_nothing(board, capsys):
    document = told(["doctor", *on(board)], capsys)
    checks = {check["name"]: check for check in document["devices"][0]["checks"]}
    assert set(checks) == {"reached", "processor", "memory", "disk", "python", "onnxruntime"}
    assert checks["onnxruntime"]["detail"].startswith("onnxruntime ")
    assert not (board.root / "python").exists()
    document = told(["doctor", "--devices", str(lab(board)), "--group", "down"], capsys, code=4)
    assert not document["healthy"]


def test_a_probed_profile_is_a_target(board, tmp_path, capsys):
    assert main(["targets", "probe", *on(board)]) == 0
    path = tmp_path / "board.toml"
    path.write_text(capsys.readouterr().out)
    profile, here = load_target(path), load_target("host")
    assert profile.device.core == read_host().core
    assert profile.device.isa_features == here.device.isa_features
    assert profile.runtime.version == here.runtime.version
    assert profile.name.startswith("ssh---board")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "telnet://x"], "is not a device"),
        (["--device", "ssh://pi:secret@x"], "carries a password"),
        (["--device", "emulated:raspberry-pi-9"], "did you mean emulated:raspberry-pi-"),
        (["--device", "emulated:raspberry-pi-4", "--wheels", "."], "leave --wheels out"),
        (["--group", "pi"], "--devices FILE"),
        (["--wheels", "."], "about devices by ssh"),
        (["--device", "ssh://x", "--wheels", "absent"], "no such folder"),
        (["--device", "ssh://x", "--ssh-config", "absent"], "no such file"),
    ],
)
def test_options_that_do_not_fit_are_refused(bundle, words, said, capsys):
    assert main(["verify", str(bundle), *words]) in (2, 4)
    err = capsys.readouterr().err
    assert said in err
    assert "secret" not in err


def test_a_device_runs_bundles_with_their_own_inputs(board, bundle, capsys):
    assert main(["benchmark", str(bundle / "model.onnx"), *on(board)]) == 2
    assert "a device runs bundles" in capsys.readouterr().err
    assert main(["benchmark", str(bundle), "--shape", "input_ids:1x8", *on(board)]) == 2
    assert "--shape is for this machine" in capsys.readouterr().err


def test_device_local_is_this_machine(bundle, capsys):
    assert told(["verify", str(bundle), "--device", "local"], capsys)["verified"]


def test_work_on_several_devices_keeps_their_order_and_their_errors():
    entries = [DeviceEntry(name=name, url="local") for name in ("a", "b", "c")]

    def work(entry, told):
        told(entry)
        if entry.name == "b":
            raise VerifyFailed("b is broken")
        return entry.name.upper()

    outcomes = run_on_devices(entries, work)
    assert [outcome.value for outcome in outcomes] == ["A", None, "C"]
    assert exit_code_of(outcomes) == 3
    assert str(outcomes[1].error) == "b is broken"


def test_an_interrupt_ends_the_work_on_all_devices():
    closed = []

    class Device:
        def __init__(self):
            self.over = threading.Event()

        def close(self):
            closed.append(self)
            self.over.set()

    def work(entry, told):
        device = Device()
        told(device)
        if entry.name == "b":
            raise KeyboardInterrupt
        device.over.wait(10)
        raise RuntimeUnavailable("closed here")

    entries = [DeviceEntry(name=name, url="local") for name in ("b", "a")]
    with pytest.raises(KeyboardInterrupt):
        run_on_devices(entries, work)
    assert closed
