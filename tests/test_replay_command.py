"""`edgepress verify --kernels`: host against host, a device that is wrong in one value, and one by ssh."""

import json
import sys

import export_case
import numpy as np
import pytest
import replay_case
import ssh_case
from edgepress.driver.cli import main
from edgepress.driver.devices import kernel_replay
from edgepress.driver.devices.end_to_end import apart, end_to_end
from edgepress.export.replay_record import golden_feeds
from edgepress.export.verify import read_manifest
from edgepress.graph.errors import DataError, RuntimeUnavailable
from edgepress.runtimes.replay import Played

PI = ["--device", "ssh://pi"]


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    folder = tmp_path_factory.mktemp("static")
    return replay_case.bundle_of(replay_case.static_net(folder), folder)


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dynamic")
    return replay_case.bundle_of(replay_case.dynamic_net(folder), folder)


@pytest.fixture
def fake(monkeypatch):
    """Put a device of the given kind in the place of any by ssh."""

    def make(bundle, *change, **more):
        device = replay_case.FakeDevice(bundle, *change, **more)
        monkeypatch.setattr(kernel_replay, "open_entry", lambda *_: device)
        return device

    return make


def told(words, capsys, code=0):
    got = main([*words, "--json"])
    out, err = capsys.readouterr()
    assert got == code, err or out
    return json.loads(out)


def report(words, capsys, code=0):
    return told(words, capsys, code)["devices"][0]["report"]


def one_unit(number, change):
    """Alters the first sample of one unit."""
    return lambda name, array: change(array) if name == f"u{number}_s0_o0" else array


def step(array):
    """The first element one step further."""
    moved = array.copy()
    moved.flat[0] += 1 if moved.flat[0] < 255 else -1
    return moved


def test_host_against_host_is_identical(static, capsys):
    document = told(["verify", str(static), "--kernels"], capsys)
    assert (document["units"], document["replayed"], document["left_out"]) == (5, 5, {})
    found = document["devices"][0]["report"]
    assert found["passed"]
    rows = {row["kernel"]: (row["units"], row["identical"]) for row in found["kernels"]}
    assert rows["QLinearConv"] == (2, 2)
    assert rows["QLinearAdd"] == rows["MatMulIntegerToFloat"] == rows["QuantizeLinear"] == (1, 1)
    assert all(row["integer"] for row in found["kernels"])
    assert found["end_to_end"]["verdict"] == "identical"
    assert found["end_to_end"]["kernels"]["QLinearConv"] == 2


def test_the_table_for_people(dynamic, capsys):
    assert main(["verify", str(dynamic), "--kernels"]) == 0
    out = capsys.readouterr().out
    assert "4 of 4 kernels replayed" in out
    assert "MatMulIntegerToFloat" in out
    assert "this machine from itself: no graph optimizations" in out


def test_one_integer_that_differs_is_found_by_name(static, fake, capsys):
    fake(static, one_unit(2, step))
    found = report(["verify", str(static), "--kernels", *PI], capsys, code=3)
    assert not found["passed"]
    wrong = [unit for unit in found["units"] if unit["state"] != "identical"]
    assert [unit["unit"] for unit in wrong] == ["e/Conv"]
    assert wrong[0]["kernel"] == "QLinearConv"
    assert wrong[0]["difference"]["steps"] == wrong[0]["difference"]["differing"] == 1
    assert wrong[0]["judgement"]["wrong"] == "neither"


def test_the_device_is_wrong_where_the_definition_says_so(static, fake, capsys):
    fake(static, one_unit(2, lambda array: array ^ np.uint8(128)))
    found = report(["verify", str(static), "--kernels", *PI], capsys, code=3)
    wrong = next(unit for unit in found["units"] if unit["state"] != "identical")
    assert (wrong["state"], wrong["judgement"]["wrong"]) == ("differs", "device")


def test_a_float_result_that_differs_is_told_and_is_no_failure(static, fake, capsys):
    fake(static, one_unit(4, lambda array: np.nextafter(array, np.float32(np.inf))))
    found = report(["verify", str(static), "--kernels", *PI], capsys)
    wrong = [unit for unit in found["units"] if unit["state"] != "identical"]
    assert [(unit["kernel"], unit["difference"]["ulps"]) for unit in wrong] == [("MatMulIntegerToFloat", 1)]
    assert found["passed"]


def test_this_machine_is_blamed_where_it_is_the_one_that_is_wrong(static, fake, capsys, monkeypatch):
    right = fake(static)
    broken = replay_case.wrong_device(one_unit(1, lambda array: array // 2))
    monkeypatch.setattr(kernel_replay, "on_this_machine", broken)
    found = report(["verify", str(static), "--kernels", *PI], capsys)
    assert len(right.requests) == 1
    wrong = next(unit for unit in found["units"] if unit["unit"] == "c/Conv")
    assert (wrong["state"], wrong["judgement"]["wrong"]) == ("this machine is wrong", "host")
    assert any("this machine is wrong" in note for note in found["notes"])


def test_the_whole_model_beyond_all_spread_fails(static, fake, capsys):
    fake(static, lambda name, array: array * 2 if name.startswith("u5_") else array)
    found = report(["verify", str(static), "--kernels", *PI], capsys, code=3)
    whole = found["end_to_end"]
    assert whole["verdict"] == "beyond the spread"
    assert not whole["within_tolerance"]
    assert whole["from_here"]["relative_l2"] == pytest.approx(1.0)


def test_drift_from_a_baseline_is_stated_for_both(dynamic, capsys):
    baseline = dynamic.parent / "source.onnx"
    found = report(["verify", str(dynamic), "--kernels", "--baseline", str(baseline)], capsys)
    whole = found["end_to_end"]
    assert whole["drift_here"] == whole["drift_there"]
    assert whole["drift_here"]["relative_l2"] < 1e-5


def test_a_model_without_integers_is_compared_as_a_whole(tmp_path, capsys):
    bundle = export_case.make_bundle(tmp_path)
    document = told(["verify", str(bundle), "--kernels"], capsys)
    assert document["units"] == 0
    assert document["devices"][0]["report"]["end_to_end"]["verdict"] == "identical"


def test_what_cannot_be_replayed_says_so(tmp_path, static, fake, capsys, monkeypatch):
    bare = export_case.make_bundle(tmp_path, golden=False)
    assert main(["verify", str(bare), "--kernels"]) == 4
    assert "no golden samples" in capsys.readouterr().err
    assert main(["verify", str(static), "--baseline", "model.onnx"]) == 2
    assert "--kernels" in capsys.readouterr().err
    device = fake(static)

    def away(*_, **__):
        raise RuntimeUnavailable("the device went away", where="ssh://pi")

    monkeypatch.setattr(device, "run_program", away)
    assert main(["verify", str(static), "--kernels", *PI]) == 4
    assert "went away" in capsys.readouterr().err


def test_a_unit_that_does_not_run_there_fails_and_is_named(static, fake, capsys, monkeypatch):
    device = fake(static)
    genuine = device.run_program

    def dies(files, *words, **more):
        if any(unit["index"] == 3 for unit in replay_case.request_of(files)["units"]):
            raise RuntimeUnavailable("it died with SIGILL", why="its last line: replaying unit 3")
        return genuine(files, *words, **more)

    monkeypatch.setattr(device, "run_program", dies)
    found = report(["verify", str(static), "--kernels", *PI], capsys, code=3)
    dead = [unit for unit in found["units"] if unit["state"] == "not run"]
    assert [unit["unit"] for unit in dead] == ["a/Add"]
    assert "SIGILL" in dead[0]["why"]


def test_a_board_by_ssh(static, tmp_path, capsys):
    with ssh_case.running_board(tmp_path) as board:
        device = ["--device", board.url, "--ssh-config", str(board.config), "--device-python", sys.executable]
        found = report(["verify", str(static), "--kernels", *device], capsys)
        assert found["passed"]
        assert all(unit["state"] == "identical" for unit in found["units"])
        assert found["end_to_end"]["verdict"] == "identical"
        assert board.left() == []


def test_what_is_not_finite_or_of_another_type_is_no_small_difference():
    ones = [{"y": np.ones((2, 3), np.float32)}]
    for bad in (np.nan, np.inf):
        found = apart(ones, [{"y": np.full((2, 3), bad, np.float32)}])
        assert (found.identical, found.max_abs, found.far) == (False, np.inf, np.inf)
    half = np.ones((2, 3), np.float32)
    half[0, 0] = np.nan
    assert apart([{"y": half}], [{"y": half.copy()}]).max_abs == 0
    with pytest.raises(DataError, match="another type"):
        apart(ones, [{"y": np.ones((2, 3), np.int64)}])


def test_a_form_that_overflows_here_widens_no_spread(static):
    manifest = read_manifest(static)
    recorded = [outputs for _, outputs in golden_feeds(static, manifest)]

    def played(change):
        outputs = tuple(tuple(change(array) for array in feeds.values()) for feeds in recorded)
        return Played(outputs=outputs)

    whole = end_to_end(
        manifest,
        recorded,
        here=played(lambda array: array),
        there=played(lambda array: array + 100),
        variants={"overflows": played(lambda array: array * np.inf)},
        baseline=None,
    )
    assert whole.verdict == "beyond the spread"
    assert np.isfinite(whole.widest)
    assert whole.failed
