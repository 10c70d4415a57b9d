"""Bundles on several devices: what was measured survives a failure, and a device may say anything."""

import copy
import json
import shutil
import sys
import threading
import time

import export_case
import pytest
from edgepress.driver.cli import main
from edgepress.driver.devices import emulated, running
from edgepress.driver.devices.commands import _check, devices_of
from edgepress.driver.devices.running import LocalRunner
from edgepress.driver.history.documents import bundle_facts
from edgepress.driver.history.store import History, history_file
from edgepress.driver.options import parse_arguments
from edgepress.export.runs import read_runs
from edgepress.graph.errors import RecipeError, RuntimeUnavailable
from history_case import device_document


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return export_case.make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def bundles(original, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRESS_HISTORY", str(tmp_path / "history"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab.toml").write_text('[devices.desk]\nurl = "local"\n[devices.shelf]\nurl = "local"\n')
    return [shutil.copytree(original, tmp_path / name) for name in ("a", "b")]


def results_in(bundle):
    return [record for record in read_runs(bundle)[0].values() if record.name == "device"]


def history_rows():
    with History(history_file()) as history:
        return history.rows()


def test_what_was_measured_before_a_device_failed_is_kept(bundles, monkeypatch, capsys):
    first, second = bundles

    def run(_self, bundle, *_):
        if bundle == second:
            raise RuntimeUnavailable("the board went away", where="board")
        return device_document(bundle_facts(bundle).digest, scenarios=[], started=time.strftime("%FT%TZ"))

    monkeypatch.setattr(LocalRunner, "run", run)
    assert main(["benchmark", str(first), str(second), "--devices", "lab.toml", "--json"]) == 4
    document = json.loads(capsys.readouterr().out)
    assert [len(device["results"]) for device in document["devices"]] == [1, 1]
    assert [device["error"]["what"] for device in document["devices"]] == ["the board went away"] * 2
    assert len(results_in(first)) == 2
    assert any(row.role == "bundle" for row in history_rows())
    # Of one device alone, too.
    words = ["benchmark", str(first), str(second), "--thread-sweep", "1"]
    assert main(words) == 4
    out = capsys.readouterr().out
    assert "the board went away" in out
    assert "10.0 ms" in out


def test_an_interrupt_leaves_what_was_measured_in_the_bundle(bundles, monkeypatch):
    first, second = bundles

    def run(_self, bundle, *_):
        if bundle == second:
            raise KeyboardInterrupt
        return device_document(bundle_facts(bundle).digest)

    monkeypatch.setattr(LocalRunner, "run", run)
    assert main(["benchmark", str(first), str(second), "--thread-sweep", "1"]) == 130
    assert len(results_in(first)) == 1


OPTIONAL = {
    "latency": ("load_ms", "session_ms", "sessions", "throughput_per_s", "warm_up_runs"),
    "energy": ("idle_watts", "joules_per_inference_above_idle", "watts"),
}


def test_what_the_schema_leaves_optional_may_be_absent():
    document = device_document()
    document["scenarios"] += [
        {"scenario": "Server", "valid": False, "official": True},
        {"scenario": "Offline", "valid": True, "official": True, "throughput_per_s": None},
    ]
    found = document["benchmark"]
    for name in ("latency", "energy"):
        found[name] = copy.deepcopy(found[name])
    for name in OPTIONAL["latency"]:
        for item in found["latency"].values():
            item.pop(name, None)
    for name in OPTIONAL["energy"]:
        found["energy"][0].pop(name)
    for name in ("p50_ms", "p90_ms", "p99_ms"):
        found["latency"]["bundle"][name] = None
    found["batch_sweep"] = [{"batch": 1, "latency": found["latency"]["bundle"]}]
    _check(document)


def liars():
    for path in (["benchmark", "latency", "bundle"], ["outputs"], ["notes"], ["void_reasons"], ["scenarios"]):
        for value in (3, "text", [None]):
            document = copy.deepcopy(device_document(void=True))
            place = document
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = value
            yield pytest.param(document, id=f"{'.'.join(path)}={value!r}")
    for name in ("benchmark", "outputs", "notes", "void", "emulated"):
        yield pytest.param({k: v for k, v in device_document().items() if k != name}, id=f"no {name}")


@pytest.mark.parametrize("document", list(liars()))
def test_a_result_that_lies_is_an_error_of_that_device(document, bundles, monkeypatch, capsys):
    monkeypatch.setattr(LocalRunner, "run", lambda *_: document)
    code = main(["benchmark", str(bundles[0]), "--thread-sweep", "1"])
    told = capsys.readouterr()
    assert code == 4, told
    assert "is not of the form" in told.err
    assert "bug" not in told.err


def test_one_thing_timed_twice_is_kept_twice(bundles, monkeypatch, capsys):
    document = device_document(bundle_facts(bundles[0]).digest)
    document["benchmark"]["affinity_sweep"] *= 2
    document["scenarios"] *= 2
    monkeypatch.setattr(LocalRunner, "run", lambda *_: document)
    assert main(["benchmark", str(bundles[0]), "--thread-sweep", "1"]) == 0
    assert "not in the history" not in capsys.readouterr().err
    things = [row.thing for row in history_rows()]
    assert {"cores 0,1", "cores 0,1 (2)", "SingleStream", "SingleStream (2)"} <= set(things)


def test_the_local_runner_can_be_ended_from_another_thread(tmp_path, monkeypatch):
    program = tmp_path / "slow.py"
    program.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(running.device_runner, "__file__", str(program))
    runner = LocalRunner()
    threading.Timer(0.5, runner.close).start()
    begun = time.monotonic()
    with pytest.raises(RuntimeUnavailable, match="no result"):
        runner.run(tmp_path, ["verify"], [], 60)
    assert time.monotonic() - begun < 20
    with pytest.raises(RuntimeUnavailable, match="no result"):
        runner.run(tmp_path, ["verify"], [], 60)
    slow = LocalRunner()
    with pytest.raises(RuntimeUnavailable, match=r"within 0\.2 s") as caught:
        slow.run(tmp_path, ["verify"], [], 0.2)
    assert caught.value.remedy


def asked(*words):
    return parse_arguments(["benchmark", "out", *words])


def test_what_a_devices_file_says_of_this_machine_counts_or_is_refused(tmp_path):
    file = tmp_path / "lab.toml"
    file.write_text('[devices.desk]\nurl = "local"\nthreads = 3\n')
    arguments = asked("--devices", str(file))
    assert devices_of(arguments) == ()
    assert arguments.threads == 3
    assert devices_of(one := asked("--devices", str(file), "--threads", "2")) == ()
    assert one.threads == 2
    file.write_text(f'[devices.desk]\nurl = "local"\npython = "{sys.executable}"\n')
    with pytest.raises(RecipeError, match="python is about devices by ssh") as caught:
        devices_of(asked("--devices", str(file)))
    assert caught.value.where == "desk"


def test_options_about_ssh_go_to_devices_by_ssh_alone(tmp_path):
    words = ["--device", "ssh://pi", "--device", "emulated:raspberry-pi-4", "--device", "local"]
    found = devices_of(asked(*words, "--wheels", str(tmp_path)))
    assert [entry.wheels for entry in found] == [str(tmp_path), None, None]


def test_an_emulator_that_cannot_be_set_up_stops_no_other_device(bundles, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeUnavailable("no emulator here", remedy="install it")

    monkeypatch.setattr(emulated, "_install", broken)
    monkeypatch.setattr(LocalRunner, "run", lambda *_: device_document(bundle_facts(bundles[0]).digest))
    words = ["benchmark", str(bundles[0]), "--device", "local", "--device", "emulated:raspberry-pi-4"]
    assert main([*words, "--json"]) == 4
    local, board = json.loads(capsys.readouterr().out)["devices"]
    assert local["error"] is None
    assert len(local["results"]) == 1
    assert board["error"]["what"] == "no emulator here"


def test_emulated_boards_are_not_timed_without_a_word(bundles, monkeypatch, capsys):
    words = ["benchmark", str(bundles[0]), "--device", "emulated:raspberry-pi-4", "--thread-sweep", "1,2"]
    assert main([*words, "--rounds", "3", "--threads", "2"]) == 2
    err = capsys.readouterr().err
    assert "an emulated board has no use for --thread-sweep, --rounds, --threads" in err
    assert "do:" in err
    monkeypatch.setattr(emulated, "_install", lambda *_: (_ for _ in ()).throw(RuntimeUnavailable("none")))
    monkeypatch.setattr(LocalRunner, "run", lambda *_: device_document(bundle_facts(bundles[0]).digest))
    assert main([*words, "--device", "local"]) == 4
    assert "--thread-sweep: not on emulated:raspberry-pi-4" in capsys.readouterr().err
