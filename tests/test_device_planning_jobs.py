"""Many jobs timed on a device in one go: groups, budgets, what the runtime refuses, crashes and cuts."""

import ast
import io
import json
from pathlib import Path

import compress_case as case
import numpy as np
import onnx
import pytest
from device_planning_case import Board
from edgepress.graph.errors import DataError, ModelError, RuntimeUnavailable
from edgepress.graph.save import to_bytes
from edgepress.runtimes import remote_jobs
from edgepress.runtimes.base import SessionOptions
from edgepress.runtimes.device import Device, Form, LocalDevice
from edgepress.runtimes.ssh_forms import outputs_of
from edgepress.runtimes.ssh_jobs import SshTimer
from edgepress.runtimes.ssh_session import ProgramEnd
from edgepress.runtimes.timing import Schedule
from edgepress.runtimes.timing_jobs import JobTimer, TimingJob, time_jobs

SHORT = Schedule(pairs=2, runs=3, warm_up_runs=1, most_pair_s=0.5, warm_up_limit_s=0.1)
FEEDS = {"x": np.ones((4, 64), np.float32)}
MODEL = to_bytes(
    case.parse("(float[N,64] x) => (float[N,64] y) { y = MatMul(x, w) }", {"w": case.random(0, 64, 64)})
)


def form(name="float", model=MODEL, **fields):
    return Form(name=name, model=model, options=SessionOptions(), **fields)


def job(*forms, estimate_s=0.0, feeds=FEEDS, asked=None):
    def build():
        if asked is not None:
            asked.append(forms[0].name)
        return forms or (form(),), feeds

    return TimingJob(build=build, schedule=SHORT, estimate_s=estimate_s)


def test_jobs_share_a_program_and_come_back_in_order(tmp_path):
    board = Board(tmp_path)
    timer = SshTimer(board)
    device: Device = timer
    assert isinstance(timer, JobTimer)
    half = {"x": np.ones((2, 64), np.float32)}
    jobs = [job(form(), form("other", feeds=FEEDS)), job(form("wide"), form("narrow"), feeds=half)]
    outcomes = list(time_jobs(device, jobs, budget_s=60))
    assert board.programs == ["remote_jobs.py"]
    assert [item.index for item in outcomes] == [0, 1]
    assert [timing.name for timing in outcomes[0].result.timings] == ["float", "other"]
    assert [timing.name for timing in outcomes[1].result.timings] == ["wide", "narrow"]
    assert outcomes[0].result.pairs == 2
    assert all(timing.p50_ms > 0 for item in outcomes for timing in item.result.timings)
    # Of all that was copied the programs alone are still there, for the next group.
    assert ["jobs.npz"] in board.copies
    assert len(board.removed) == 1
    assert not list(tmp_path.rglob("*.npz"))
    assert not list(tmp_path.rglob("*.onnx"))


def test_what_the_runtime_refuses_or_dies_of_costs_its_own_times_only(tmp_path):
    jobs = [job(), job(form("no model", b"not a model")), job(form("kills")), job(form("after"))]
    outcomes = list(SshTimer(Board(tmp_path)).time_jobs(jobs, budget_s=60))
    assert [item.index for item in outcomes] == [0, 1, 2, 3]
    assert [item.result is not None for item in outcomes] == [True, False, False, True]
    assert outcomes[1].reason
    assert outcomes[2].reason == "the runtime died of SIGSEGV"


def test_nothing_is_begun_when_the_time_is_over(tmp_path):
    asked = []
    jobs = [job(form("short"), estimate_s=0.1, asked=asked), job(form("long"), estimate_s=100.0, asked=asked)]
    for device in (SshTimer(Board(tmp_path)), LocalDevice()):
        assert [item.index for item in time_jobs(device, jobs, budget_s=20)] == [0]
        assert [item.index for item in time_jobs(device, [jobs[1], jobs[0]], budget_s=20)] == [1]
        assert list(time_jobs(device, jobs, budget_s=0)) == []
    assert asked == ["short"] * 4


def test_groups_grow_once_the_board_s_speed_is_known(tmp_path):
    board = Board(tmp_path)
    jobs = [job(form(f"job {place}"), estimate_s=0.5) for place in range(8)]
    outcomes = list(SshTimer(board).time_jobs(jobs, budget_s=1000))
    assert [item.index for item in outcomes] == list(range(8))
    # Two in the first group (three times the estimates are over 2 s); the board is fast: all others at once.
    assert len(board.programs) == 2


def test_a_cut_connection_leaves_what_was_told(tmp_path):
    board, told = Board(tmp_path, cut_after=1), []
    jobs = [job(form(f"job {place}"), estimate_s=1.0) for place in range(3)]
    with SshTimer(board) as timer:
        outcomes = timer.time_jobs(jobs, budget_s=1000)
        told.append(next(outcomes).index)
        with pytest.raises(RuntimeUnavailable, match="cut"):
            told.append(next(outcomes).index)
    assert told == [0]


def test_an_interrupt_leaves_nothing_big_behind(tmp_path):
    board = Board(tmp_path)
    board.interrupted = True
    with pytest.raises(KeyboardInterrupt), SshTimer(board) as timer:
        list(timer.time_jobs([job()], budget_s=60))
    assert not list(tmp_path.rglob("*.npz"))


def test_what_travels_is_python_38():
    source = Path(remote_jobs.__file__).read_text()
    ast.parse(source, feature_version=(3, 8))


def test_a_runtime_that_does_not_start_is_said_to_be_so(tmp_path):
    board = Board(tmp_path)
    board.runner = "raise SystemExit(1)"
    timer = SshTimer(board)
    with pytest.raises(RuntimeUnavailable, match="nothing can be timed on the device") as caught:
        list(timer.time_jobs([job()], budget_s=60))
    assert "edgepress doctor --device ssh://board" in caught.value.remedy


def test_single_comparisons_go_the_same_way(tmp_path):
    timer, told = SshTimer(Board(tmp_path)), []
    result = timer.time([form(), form("again")], FEEDS, SHORT, progress=lambda *steps: told.append(steps))
    assert [item.candidate for item in result.comparisons] == ["again"]
    assert told == [(2, 2)]
    with pytest.raises(DataError, match="one name"):
        timer.time([form(), form()], FEEDS, SHORT)
    with pytest.raises(ModelError, match="does not run on the device") as caught:
        timer.time([form("broken", b"no model")], FEEDS, SHORT)
    assert caught.value.why


def test_weights_go_with_a_model_once_and_are_removed_at_the_end(tmp_path):
    model = onnx.load_from_string(MODEL)
    home = tmp_path / "home"
    home.mkdir()
    onnx.save(
        model, home / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0,
        convert_attribute=False,
    )  # fmt: skip
    board = Board(tmp_path / "board")
    with SshTimer(board) as timer:
        there = timer.put([home / "m.onnx"])
        assert timer.put([home / "m.onnx"]) == there
        assert board.copies == [["m.data", "m.onnx"]]
        assert timer.run(there, FEEDS, SessionOptions())["y"].shape == (4, 64)
        assert timer.time([form(model=there)], FEEDS, SHORT).timings[0].runs == 6
    assert str(there.parent) in board.removed
    timer = SshTimer(board)
    kept = timer.put([home / "m.onnx"])
    timer.__exit__(RuntimeUnavailable, RuntimeUnavailable("the device went away"), None)
    assert str(kept.parent) not in board.removed  # nobody waits for a device that is away


GOOD = {"series_ns": [[5, 6]], "load_ms": [1.0], "warm_up_runs": 1}


@pytest.mark.parametrize(
    "written",
    [
        "no JSON",
        "{}",
        '[{"index": 7}]',
        '[{"index": -1}]',
        '[{"index": 0}, {"index": 0}]',
        '[{"index": 0, "elapsed_s": -5}]',
        '[{"index": 0, "elapsed_s": NaN}]',
        json.dumps([{"index": 0, "found": {"other": GOOD}}]),
        json.dumps([{"index": 0, "found": {"float": {**GOOD, "series_ns": [[0, 1]]}}}]),
        json.dumps([{"index": 0, "found": {"float": {**GOOD, "series_ns": [[]]}}}]),
        json.dumps([{"index": 0, "found": {"float": {**GOOD, "series_ns": []}}}]),
        json.dumps([{"index": 0, "found": {"float": {**GOOD, "load_ms": []}}}]),
    ],
)
def test_a_device_that_writes_no_times_is_not_believed(tmp_path, written):
    board = Board(tmp_path)
    board.run_program = lambda *_, **__: ProgramEnd(
        status=0, result=written.encode(), told=(), elapsed_s=1.0, clock_jump_s=0.0
    )
    with pytest.raises(RuntimeUnavailable, match="no valid times"):
        list(SshTimer(board).time_jobs([job()], budget_s=60))


def archive_of(save, **arrays):
    out = io.BytesIO()
    save(out, **arrays)
    return out.getvalue()


def test_outputs_that_are_none_are_not_believed():
    names, output = np.array(["y"]), np.zeros(1 << 16, np.float32)
    assert list(outputs_of(archive_of(np.savez, names=names, output_0=output), "board")) == ["y"]
    packed = archive_of(np.savez_compressed, names=names, output_0=output)
    pickled = archive_of(np.savez, names=names, output_0=np.array([{}], object))
    for written in (b"", b"no archive", packed, pickled, archive_of(np.savez, names=names)):
        with pytest.raises(RuntimeUnavailable, match="no valid outputs"):
            outputs_of(written, "board")


def test_what_fails_takes_time_from_the_budget_too(tmp_path):
    board, begun = Board(tmp_path), []
    ended = json.dumps([{"index": 0, "elapsed_s": 50.0, "reason": "no such kernel"}]).encode()

    def run_program(_files, words, **_):
        begun.append(words)
        return ProgramEnd(status=0, result=ended, told=(), elapsed_s=50.0, clock_jump_s=0.0)

    board.run_program = run_program
    jobs = [job(form(f"job {place}"), estimate_s=1.0) for place in range(4)]
    assert len(list(SshTimer(board).time_jobs(jobs, budget_s=52))) == 1
    assert len(begun) == 1
