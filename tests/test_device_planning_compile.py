"""A whole compile whose choices are made by times of a device: a folder here, or ssh's loopback."""

import dataclasses
import json
import sys

import driver_case
import msgspec
import numpy as np
import pytest
import ssh_case
from device_planning_case import Board
from edgepress.compress.drift_limit import DriftLimit
from edgepress.compress.recipe import Recipe
from edgepress.driver.cli import main
from edgepress.driver.compile import compile_model
from edgepress.driver.history.store import History, history_file
from edgepress.driver.reporter import SilentReporter
from edgepress.driver.summary import summary_blocks
from edgepress.graph.errors import NotSupported, RuntimeUnavailable, TargetError
from edgepress.runtimes.device import LocalDevice
from edgepress.runtimes.ssh_jobs import SshTimer
from edgepress.runtimes.timing_cache import TimingCache

LOOSE = (DriftLimit(metric="l2", limit=0.9),)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EDGEPRESS_HISTORY", str(tmp_path / "history"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path):
    np.savez(
        tmp_path / "calib.npz", x=np.random.default_rng(0).standard_normal((12, 8, 64)).astype(np.float32)
    )
    return driver_case.mlp(tmp_path / "mlp.onnx")


class Told(SilentReporter):
    def __init__(self):
        self.notes, self.warnings = [], []

    def note(self, text):
        self.notes.append(text)

    def warn(self, text):
        self.warnings.append(text)


def compiled(model, board, reporter=None, out="out", **fields):
    recipe = Recipe(
        target="host", max_drift=LOOSE, benchmark_rounds=2, shapes={"x": (1, 8, 64)}, seed=1,
        **{"measure_seconds": 10, **fields},
    )  # fmt: skip
    with SshTimer(board) as timer:
        return compile_model(
            model,
            target=recipe.target,
            output=model.parent / out,
            calib=str(model.parent / "calib.npz"),
            recipe=recipe,
            device=timer,
            reporter=reporter,
        )


def timings(cache):
    return TimingCache(cache, LocalDevice().features()).timings()


def test_what_the_device_says_decides_and_is_kept(tmp_path, model, cache):
    board = Board(tmp_path / "board")
    result = compiled(model, board)
    name = LocalDevice().features().core
    assert result.evidence == "measured-on-target"
    assert (result.device.name, result.device.decides) == (name, True)
    timed = [item for item in result.plan.decisions if f"timed on {name}" in item.reason]
    assert timed
    assert any(f"timed on {name}, 0 known" in note for note in result.notes)
    assert result.benchmark.method.endswith("on the device")
    assert f"3 golden samples within tolerance on {name}" in result.notes
    assert board.bundles == [(("verify", "benchmark"), ("--threads", "1", "--pairs", "2"))]
    runs = {path.name: json.loads(path.read_text()) for path in (result.bundle / "runs").glob("*.json")}
    assert runs["benchmark.json"]["payload"]["where"] == name
    assert runs["device.json"]["payload"]["outputs"]["samples"] == 3
    assert (
        "ssh://" not in (result.bundle / "plan.json").read_text()
    )  # where it is reached is nobody's concern
    assert "--device ssh://board" in result.next_commands[1]
    assert any("Speed on the target" in str(block) for block in summary_blocks(result))
    # Its copies are gone, all but the programs; its times are known to the next compile.
    assert not list((tmp_path / "board").rglob("*.onnx"))
    kept = {item.key: item for item in timings(cache)}
    assert {key.operator for key in kept} == {"MatMul"}
    assert all(item.date for item in kept.values())
    programs = len(board.programs)
    again = compiled(model, board, out="again", skip=("benchmark",))
    assert board.bundles[-1][0] == ("verify",)
    assert len(board.programs) == programs  # nothing is timed where the benchmark is skipped
    assert again.benchmark is None


def test_a_second_attempt_goes_on_after_a_cut(tmp_path, model, cache):
    told = Told()
    with pytest.raises(RuntimeUnavailable, match="cut"):
        compiled(model, Board(tmp_path / "first", cut_after=1), told)
    known = len(timings(cache))
    assert known
    assert not (model.parent / "out").exists()
    result = compiled(model, Board(tmp_path / "second"))
    assert any("0 timed on" in note and "1 known from earlier" in note for note in result.notes)


def test_operators_that_were_timed_before_the_cut_are_told(tmp_path, model):
    told = Told()
    with pytest.raises(RuntimeUnavailable):
        compiled(model, Board(tmp_path / "board", cut_after=0), told)
    assert "0 of 1 operators are timed and kept: the next attempt goes on" in told.notes


def test_another_device_is_refused_before_anything_is_installed_there(tmp_path, model):
    board = Board(tmp_path / "board")
    board.host = dataclasses.replace(board.host, core="another core", features=frozenset({"sse2"}))
    board.installed = False
    with pytest.raises(TargetError, match="does not fit the target host"):
        compiled(model, board)
    assert board.copies == []


def test_an_emulator_s_times_are_taken_in_no_way(tmp_path, model):
    board = Board(tmp_path / "board")
    board.evidence, board.installed = "modelled", False
    with pytest.raises(NotSupported, match="an emulated board is not timed"):
        compiled(model, board, allow_unmeasured=True)


def test_times_of_another_device_decide_nothing(tmp_path, model, cache):
    board = Board(tmp_path / "board")
    real = board.features
    board.host = dataclasses.replace(board.host, core="another core")
    board.features = lambda: msgspec.structs.replace(real(), core="another core")
    result = compiled(model, board, allow_unmeasured=True)
    assert not result.device.decides
    assert result.evidence != "measured-on-target"
    assert any("its times are shown, and decide nothing" in note for note in result.notes)
    assert result.benchmark is not None
    assert not list(cache.glob("timings/*.json"))
    assert not any("timed on" in item.reason for item in result.plan.decisions)


def test_a_device_lost_at_the_very_end_leaves_the_whole_bundle(tmp_path, model):
    board = Board(tmp_path / "board")

    def lost(*_, **__):
        raise RuntimeUnavailable("the device went away", where="ssh://board")

    board.run_bundle = lost
    with pytest.raises(RuntimeUnavailable, match="went away") as caught:
        compiled(model, board)
    assert f"edgepress verify {model.parent / 'out'} --device ssh://board" in caught.value.remedy
    assert main(["verify", str(model.parent / "out")]) == 0


@pytest.fixture(scope="module")
def loopback(tmp_path_factory):
    with ssh_case.running_board(tmp_path_factory.mktemp("board")) as made:
        yield made


def command(board, *words):
    return main([
        *words, "--device", board.url, "--ssh-config", str(board.config),
        "--device-python", sys.executable,
    ])  # fmt: skip


def test_the_command_compiles_by_a_device_s_times(tmp_path, model, loopback, capsys, cache):
    words = [
        "compile", str(model), "--calib", str(tmp_path / "calib.npz"), "--max-drift", "l2=90%",
        "--rounds", "2", "--shape", "x:1x8x64", "-o",
    ]  # fmt: skip
    assert command(loopback, *words, str(tmp_path / "wrong"), "--target", "raspberry-pi-5") == 2
    assert "does not fit the target raspberry-pi-5" in capsys.readouterr().err
    assert command(loopback, *words, str(tmp_path / "out"), "--target", "host", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["evidence"] == "measured-on-target"
    assert document["device"]["features"]["core"] == LocalDevice().features().core
    run = json.loads((tmp_path / "out" / "runs" / "device.json").read_text())["payload"]
    assert run["outputs"]["within_tolerance"]
    assert run["benchmark"]["latency"]
    with History(history_file()) as history:
        kept = [row for row in history.rows() if row.role == "bundle"]
    assert [(row.url, row.kind, row.bundle_path) for row in kept] == [
        (loopback.url, "benchmark", str(tmp_path / "out"))
    ]
    assert timings(cache)
    assert loopback.left() == []


def test_times_are_of_one_device(capsys):
    words = ["targets", "probe", "--measure", "--device", "ssh://one", "--device", "ssh://two"]
    assert main(words) == 2
    assert "times are of one device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["compile", "m.onnx", "--target", "host", "-o", "o"], ["targets", "probe", "--measure"]]
)
def test_an_emulated_board_is_not_timed(words, capsys):
    assert main([*words, "--device", "emulated:raspberry-pi-5"]) == 4
    told = capsys.readouterr().err
    assert "the times of an emulator say nothing about the board" in told
    assert "edgepress benchmark BUNDLE --device emulated:raspberry-pi-5" in told
