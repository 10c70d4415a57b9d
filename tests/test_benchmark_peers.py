"""Peers in environments of their own: the protocol of workers and their turns, with a peer of a few lines."""

import ast
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from edgepress.benchmarks import minilm_peers
from edgepress.benchmarks.peer_environments import (
    PEERS,
    PROGRAMS,
    Peer,
    PeerForm,
    last_words,
    make_environment,
    packages_of,
    prepare,
)
from edgepress.benchmarks.peer_workers import (
    Rounds,
    WorkerProcess,
    against_form,
    hidden_states,
    speed_of,
    time_workers,
    write_feeds,
)
from edgepress.graph.errors import RuntimeUnavailable

# Multiplies `input_ids` by the number in its file; `trace` collects what happened.
FAKE = """
import json, time
from pathlib import Path
import numpy as np

def prepare(request, samples):
    print("a library prints what it likes")
    file = Path(request["output"]) / "factor.txt"
    file.write_text(str(sum(int(feeds["input_ids"].sum()) for feeds in samples)))
    return [{"name": "fake", "program": __file__, "files": [str(file)], "options": {"seen": sorted(request)}}]

class Session:
    input_names = ["input_ids"]

    def __init__(self, file, threads, options):
        print("and when it loads, too")
        self.factor, self.threads, self.options = float(Path(file).read_text()), threads, options
        self.note("open")

    def note(self, event):
        if "trace" in self.options:
            with open(self.options["trace"], "a") as trace:
                trace.write(f"{self.options['name']} {event} {self.threads}\\n")

    def run(self, feeds):
        assert list(feeds) == self.input_names
        self.note("run")
        if self.options.get("fail"):
            raise ValueError("this machine lacks a feature")
        time.sleep(self.options.get("sleep_s", 0.0))
        self.note("ran")
        return {"hidden": feeds["input_ids"] * self.factor, "other": np.zeros(1)}

def load(file, threads, options):
    return Session(file, threads, options)
"""


@pytest.fixture
def fake(tmp_path):
    program = tmp_path / "fake_peer.py"
    program.write_text(FAKE, encoding="utf-8")
    return program


def form(fake, name="fake", factor=3.0, **options):
    file = fake.parent / f"{name}.txt"
    file.write_text(str(factor), encoding="utf-8")
    return PeerForm(
        name=name,
        python=Path(sys.executable),
        program=str(fake),
        files=(file,),
        options={"name": name, **options},
    )


def sets_of(*lengths):
    return [
        {"input_ids": np.arange(1, length + 1)[None], "attention_mask": np.ones((1, length), np.int64)}
        for length in lengths
    ]


def test_a_peer_is_given_the_samples_and_says_what_it_made(tmp_path, fake):
    peer = Peer(name="fake", program=str(fake), requirements=(), calibrated=True)
    calibration = write_feeds(tmp_path / "calibration.npz", sets_of(3, 4))
    stale = tmp_path / "out" / "stale.txt"
    stale.parent.mkdir()
    stale.touch()
    (made,) = prepare(peer, Path(sys.executable), tmp_path / "out", {"calibration": calibration})
    assert made.files[0].read_text() == str(6 + 10)
    assert made.size_bytes == 2
    assert made.options == {"seen": ["calibration", "output"]}
    assert not stale.exists()


def test_a_peer_that_cannot_quantize_says_why(tmp_path, fake):
    fake.write_text("def prepare(request, samples):\n    raise ImportError('no module named peer')\n")
    peer = Peer(name="fake", program=str(fake), requirements=(), calibrated=True)
    calibration = write_feeds(tmp_path / "calibration.npz", sets_of(3))
    with pytest.raises(RuntimeUnavailable) as caught:
        prepare(peer, Path(sys.executable), tmp_path / "out", {"calibration": calibration})
    assert caught.value.why == "ImportError: no module named peer"
    assert caught.value.where == "the quantization by fake"


def test_a_worker_answers(tmp_path, fake):
    sets = sets_of(2, 12, 5)
    feeds = write_feeds(tmp_path / "feeds.npz", sets)
    with WorkerProcess(form(fake), tmp_path / "workers") as worker:
        opened = worker.ask("open", threads=1)
        assert opened["inputs"] == ["input_ids"]
        assert opened["load_ms"] > 0
        assert 5 <= worker.ask("warm", feeds=str(feeds), least_runs=5)["runs"] <= 50
        times = worker.ask("time", feeds=str(feeds), runs=7)["ns"]
        assert len(times) == 7
        assert min(times) >= 1
        found = list(hidden_states(worker, feeds, tmp_path / "hidden.npz", "hidden"))
    assert len(found) == len(sets)
    for got, given in zip(found, sets, strict=True):
        np.testing.assert_array_equal(got, given["input_ids"] * 3.0)
    assert not (tmp_path / "hidden.npz").exists()


def test_times_are_those_of_the_runs(tmp_path, fake):
    feeds = write_feeds(tmp_path / "feeds.npz", sets_of(2))
    with WorkerProcess(form(fake, sleep_s=0.02), tmp_path / "workers") as worker:
        worker.ask("open", threads=1)
        times = worker.ask("time", feeds=str(feeds), runs=3)["ns"]
    assert min(times) >= 20e6


def test_workers_take_turns_one_at_a_time(tmp_path, fake):
    trace = tmp_path / "trace.txt"
    feeds = write_feeds(tmp_path / "feeds.npz", sets_of(2))
    rounds = Rounds(pairs=2, runs=5, turn_runs=3, warm_up_runs=1)
    names = ("a", "b", "c")
    workers = [WorkerProcess(form(fake, name, trace=str(trace)), tmp_path / "workers") for name in names]
    try:
        series, failures = time_workers(workers, feeds, threads=2, rounds=rounds)
    finally:
        for worker in workers:
            worker.close()
    assert not failures
    assert {name: [len(one) for one in found] for name, found in series.items()} == {
        name: [5, 5] for name in names
    }
    lines = [line.split() for line in trace.read_text().splitlines()]
    assert {threads for *_, threads in lines} == {"2"}
    events = [(name, event) for name, event, _ in lines]
    for (name, event), following in itertools.pairwise(events):
        assert event != "run" or following == (name, "ran")
    turns = [name for name, _ in itertools.groupby(name for name, _ in events)]
    # Each round: sessions and warm-up, then turns of 3 and of 2 runs; every pass in the other order. Where
    # two passes meet at one worker they are one group.
    passes = ["abc", "abc", "cba", "cba", "cba", "abc"]
    assert turns == [name for name, _ in itertools.groupby("".join(passes))]


def test_a_worker_that_fails_is_out_and_the_others_go_on(tmp_path, fake):
    feeds = write_feeds(tmp_path / "feeds.npz", sets_of(2))
    forms = [form(fake, "good"), form(fake, "bad", fail=True), form(fake, "absent")]
    forms[2].files[0].unlink()
    workers = [WorkerProcess(one, tmp_path / "workers") for one in forms]
    rounds = Rounds(pairs=2, runs=2, warm_up_runs=1)
    try:
        series, failures = time_workers(workers, feeds, threads=1, rounds=rounds)
        again, still = time_workers(workers, feeds, threads=1, rounds=rounds)
    finally:
        for worker in workers:
            worker.close()
    assert list(series) == list(again) == ["good"]
    assert failures["bad"] == still["bad"] == "ValueError: this machine lacks a feature"
    assert failures["absent"].startswith("FileNotFoundError")


def test_a_worker_that_hangs_is_ended(tmp_path, fake):
    feeds = write_feeds(tmp_path / "feeds.npz", sets_of(2))
    with WorkerProcess(form(fake, sleep_s=60), tmp_path / "workers", limit_s=1.5) as worker:
        worker.ask("open", threads=1)
        with pytest.raises(RuntimeUnavailable) as caught:
            worker.ask("time", feeds=str(feeds), runs=1)
    assert caught.value.why == "no answer within 1.5 s"


def test_a_worker_refuses_what_is_no_command(tmp_path, fake):
    with (
        WorkerProcess(form(fake), tmp_path / "workers") as worker,
        pytest.raises(RuntimeUnavailable, match="cannot be used") as caught,
    ):
        worker.ask("_timed", inputs={})
    assert caught.value.why == "ValueError: '_timed' is no command"


def test_an_environment_is_made_once(tmp_path):
    peer = Peer(name="empty", program="none.py", requirements=(), calibrated=False)
    python = make_environment(peer, tmp_path / "environments")
    assert python.is_file()
    # Nothing that this environment holds can be seen from there.
    assert packages_of(python) == {}
    python.parents[1].joinpath("kept").touch()
    assert make_environment(peer, tmp_path / "environments") == python
    assert python.parents[1].joinpath("kept").exists()
    python.parents[1].joinpath("installed.json").unlink()
    make_environment(peer, tmp_path / "environments")
    assert not python.parents[1].joinpath("kept").exists()


def test_an_environment_that_cannot_be_installed_says_why_and_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    peer = Peer(name="absent", program="none.py", requirements=("no-such-peer==1.0",), calibrated=False)
    with pytest.raises(RuntimeUnavailable) as caught:
        make_environment(peer, tmp_path / "environments")
    assert "no-such-peer==1.0" in (caught.value.why or "")
    assert caught.value.where == "the environment of absent"
    assert not list((tmp_path / "environments").glob("*/installed.json"))


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("WARNING: slow\nERROR: no such version\nERROR: nothing matches\nnotice", "ERROR: no such version"),
        ("Traceback\n  File …\nValueError: bad\n\n", "ValueError: bad"),
        ("\n", "exit code 3"),
    ],
)
def test_the_line_that_names_a_failure(said, named):
    assert last_words(said, "exit code 3") == named


def test_speeds_are_ratios_of_medians_round_by_round():
    series = {
        "base": [[10_000_000, 30_000_000, 20_000_000], [40_000_000, 40_000_000, 50_000_000]],
        "quick": [[5_000_000, 4_000_000, 100_000_000], [20_000_000, 20_000_000, 20_000_000]],
    }
    found = speed_of(series, "base")
    assert found["base"]["ratio"] == 1.0
    assert found["quick"]["p50_ms"] == 20.0
    assert found["quick"]["min_ms"] == 4.0
    assert found["quick"]["runs"] == 6
    assert found["quick"]["ratio_of_least"] == 2.5
    assert (found["quick"]["ratio_low"], found["quick"]["ratio_high"]) == (2.0, 4.0)
    assert found["quick"]["ratio"] == 3.0
    assert against_form(series, "quick", "base").ratio == pytest.approx((0.25 + 0.5) / 2)


def test_calibration_sentences_are_spread_and_disjoint():
    lines = [f"sentence {index}" for index in range(1000)]
    chosen = minilm_peers.spread(lines)
    assert len(chosen.calibrate) == len(chosen.held_out) == 128
    assert not set(chosen.calibrate) & set(chosen.held_out)
    assert chosen.calibrate[:3] == ("sentence 0", "sentence 6", "sentence 12")
    assert chosen.held_out[0] == "sentence 3"
    with pytest.raises(SystemExit, match="too few"):
        minilm_peers.spread(lines[:200])


def test_the_summary_names_what_is_behind(capsys):
    class Kept:
        def __init__(self):
            self.found = {}

        def add(self, name, figures):
            self.found[name] = figures

        def text(self, text):
            print(text)

    def figures(faster, l2):
        return {"edgepress_faster": faster}, {"one at a time": {"l2": l2}, "size_bytes": 1}

    speeds, accuracies = {}, {}
    for name, faster, l2 in (
        (minilm_peers.BASELINE, 3.0, 0.0),
        (minilm_peers.BUNDLE, 1.0, 0.04),
        ("slower and farther", 1.3, 0.12),
        ("faster and closer", 0.8, 0.03),
    ):
        speeds[name], accuracies[name] = figures(faster, l2)
    report = Kept()
    speed = {"1x16, 1 thread": {"forms": speeds}}
    minilm_peers.print_summary("calib-text", speed, {"forms": accuracies}, report)
    assert report.found["behind, calib-text"] == [
        "faster and closer is 1.25 times as fast at 1x16, 1 thread",
        "faster and closer is as close or closer, one at a time: 0.0300",
    ]
    del speeds["faster and closer"], accuracies["faster and closer"]
    minilm_peers.print_summary("calib-text", speed, {"forms": accuracies}, report)
    assert report.found["behind, calib-text"] == []
    assert "ahead of every peer that ran" in capsys.readouterr().out


def test_the_programs_of_the_peers_need_nothing_of_edgepress():
    assert {peer.program for peer in PEERS.values()} <= {path.name for path in PROGRAMS.glob("*.py")}
    for path in PROGRAMS.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not any(name.split(".")[0] == "edgepress" for name in names), path.name


def test_what_a_worker_is_told_can_be_read(tmp_path, fake):
    with WorkerProcess(form(fake, "two words", sleep_s=0.0), tmp_path / "workers"):
        told = json.loads((tmp_path / "workers" / "two-words.json").read_text(encoding="utf-8"))
    assert told["options"] == {"name": "two words", "sleep_s": 0.0}
