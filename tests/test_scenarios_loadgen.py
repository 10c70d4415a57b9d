"""Scenarios by the official LoadGen: its summaries read back, its calls answered, its end in a child."""

import json
import sys
import textwrap
import threading
from pathlib import Path

import export_case as case
import pytest
from edgepress.runtimes import device_runner as runner
from loadgen_case import SUMMARIES, FakeLoadGen


def parsed(title):
    record = SUMMARIES[title]
    return runner.parse_loadgen(record["summary"], record["detail"], record["samples"])


def ns_of(title, label):
    """A figure of a summary, found without the parser."""
    line = next(line for line in SUMMARIES[title]["summary"].splitlines() if line.startswith(label))
    return int(line.rpartition(":")[2])


@pytest.mark.parametrize("title", sorted(SUMMARIES))
def test_a_summary_is_read_back(title):
    found = parsed(title)
    text = SUMMARIES[title]["summary"]
    assert found["official"] is True
    assert found["loadgen_version"] == "6.0.17"
    assert found["valid"] is ("Result is : VALID" in text)
    assert bool(found["unmet"]) is not found["valid"]
    if found["scenario"] == "Offline":
        assert found["throughput_per_s"] == 2254.14
        assert found["samples"] == found["throughput_per_s"] * found["seconds"] // 1 + 1 == 7040
        return
    percent = {"SingleStream": "90.00"}.get(found["scenario"], "99.00")
    assert found["percentile_ms"] == ns_of(title, f"{percent} percentile") / 1e6
    latency = found["latency"]
    assert latency["mean_ms"] == ns_of(title, "Mean latency") / 1e6
    assert (latency["min_ms"], latency["max_ms"]) == (
        ns_of(title, "Min latency") / 1e6,
        ns_of(title, "Max latency") / 1e6,
    )
    assert latency["p50_ms"] == ns_of(title, "50.00 percentile") / 1e6
    assert latency["p99_9_ms"] is None  # 700 queries do not show it


def test_early_stopping_and_what_is_not_met():
    assert parsed("SingleStream")["early_stopping"] == {
        "met": True,
        "least_queries": 64,
        "discarded": 50,
        "estimate_ms": 3.315231,
    }
    few = parsed("SingleStream, few")
    assert (few["latency"]["runs"], few["latency"]["p99_ms"]) == (64, None)
    assert parsed("MultiStream")["early_stopping"]["least_queries"] == 662
    assert parsed("MultiStream")["samples_per_query"] == 8
    tight = parsed("Server, tight")
    assert tight["early_stopping"] == {"met": False, "more_queries": 41004}
    assert tight["unmet"] == ["performance constraints", "early stopping"]
    assert (tight["qps"], tight["bound_ms"]) == (800.0, 1.0)
    assert parsed("MultiStream, ended early")["unmet"] == ["min duration"]


@pytest.mark.parametrize("text", ["", "Scenario : Offline\n", "Scenario : Other\nResult is : VALID\n"])
def test_a_summary_without_a_result(text):
    with pytest.raises(runner.RuntimeUnusable, match="no result"):
        runner.parse_loadgen(text, "", 1)


PLAN = runner.ScenarioPlan(seconds=2.0, queries=100, samples_per_query=4, qps=20.0, bound_ms=50.0, seed=7)


@pytest.mark.parametrize(
    ("scenario", "queries", "size", "expected"),
    [
        ("SingleStream", 3, 1, [[0], [1], [2]]),
        ("MultiStream", 2, 4, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("Offline", 1, 10, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]),  # batch after batch of one large query
        ("Server", 3, 1, [[0], [1], [2]]),
    ],
)
def test_every_sample_is_answered_once_and_in_order(scenario, queries, size, expected, tmp_path):
    lg, answered, threads = FakeLoadGen(queries=queries, size=size), [], set()

    def query():
        answered.append(len(lg.completed))
        threads.add(threading.current_thread())

    asked = runner.run_loadgen(lg, scenario, query, PLAN, tmp_path, query_ns=1_000_000)
    assert asked == queries * size
    assert lg.completed == expected
    assert answered == list(range(len(expected)))  # each batch is run before it is said to be done
    assert (threading.main_thread() in threads) is (scenario != "Server")
    assert lg.destroyed == ["qsl", "sut"]


def test_what_loadgen_is_asked_for():
    settings = runner.loadgen_settings(FakeLoadGen(), "Server", PLAN, 3_000_000)
    assert (settings.scenario, settings.mode) == ("Server", "performance")
    assert (settings.min_duration_ms, settings.min_query_count) == (2000, 459)
    assert (settings.server_target_qps, settings.server_target_latency_ns) == (20.0, 50_000_000)
    assert settings.server_target_latency_percentile == 0.99
    assert settings.schedule_rng_seed == 7
    single = runner.loadgen_settings(FakeLoadGen(), "SingleStream", PLAN, 3_000_000)
    assert (single.min_query_count, single.single_stream_target_latency_percentile) == (100, 0.9)
    # It makes queries ready for twice the rate: one that runs out of them is not valid.
    assert single.single_stream_expected_latency_ns == 1_500_000
    multi = runner.loadgen_settings(FakeLoadGen(), "MultiStream", PLAN, 3_000_000)
    assert (multi.min_query_count, multi.multi_stream_samples_per_query) == (662, 4)
    offline = runner.loadgen_settings(FakeLoadGen(), "Offline", PLAN, 3_000_000)
    assert offline.offline_expected_qps == pytest.approx(1.2 * 4 / 3e-3)
    slow = runner.loadgen_settings(FakeLoadGen(), "Offline", PLAN, 10**12)
    assert slow.offline_expected_qps * 1.1 * 2.0 == pytest.approx(100)  # the least number of samples


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return case.make_bundle(tmp_path_factory.mktemp("bundle"), quantized=True)


def run_scenarios(bundle, folder, *words):
    out = folder / "result.json"
    words = ["scenario", "--bundle", str(bundle), "--out", str(out), "--scenario-seconds", "0.05", *words]
    code = runner.main(words)
    return code, json.loads(out.read_text())


FAKE_MODULE = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from loadgen_case import FakeLoadGen
_fake = FakeLoadGen({title!r}, queries=5)
globals().update({{name: getattr(_fake, name) for name in dir(_fake) if name[0].isupper()}})
{more}
"""


def install(folder, monkeypatch, title="SingleStream", more=""):
    """A module of LoadGen's name where this process and its children find it."""
    text = FAKE_MODULE.format(tests=str(Path(__file__).parent), title=title, more=textwrap.dedent(more))
    (folder / f"{runner.LOADGEN_MODULE}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])


def test_loadgen_is_used_where_it_is_installed(bundle, tmp_path, monkeypatch, capsys):
    install(tmp_path, monkeypatch)
    code, result = run_scenarios(bundle, tmp_path, "--scenario", "SingleStream")
    assert (code, result["notes"]) == (0, [note for note in result["notes"] if "light" not in note])
    (found,) = result["scenarios"]
    assert (found["official"], found["valid"], found["percentile_ms"]) == (True, True, 2.803826)
    assert found["latency"]["runs"] == 5  # what was asked, not what the summary is of
    assert "LoadGen 6.0.17" in capsys.readouterr().out
    _, result = run_scenarios(bundle, tmp_path, "--scenario", "SingleStream", "--loadgen", "light")
    assert result["scenarios"][0]["official"] is False


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGILL)", "SIGILL"),
        ("def StartTestWithLogSettings(*_): raise RuntimeError('no clock')", "no clock"),
        ("def QuerySamplesComplete(_): raise ValueError('no such query')", "no such query"),
    ],
)
def test_loadgen_that_fails_ends_its_own_process_only(bundle, tmp_path, monkeypatch, more, said):
    install(tmp_path, monkeypatch, more=more)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(runner.tempfile, "tempdir", str(scratch))
    monkeypatch.setenv("TMPDIR", str(scratch))
    code, result = run_scenarios(bundle, tmp_path, "--scenario", "SingleStream")
    assert not list(scratch.iterdir())
    assert code == 4
    assert said in result["error"]["what"] + result["error"]["why"]
    assert result["scenarios"] == []


def test_without_loadgen_the_light_form_says_so_and_the_official_one_is_refused(
    bundle, tmp_path, monkeypatch
):
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda _name: None)
    code, result = run_scenarios(bundle, tmp_path, "--scenario", "SingleStream")
    assert code == 0
    assert result["scenarios"][0]["official"] is False
    assert any("mlcommons-loadgen" in note for note in result["notes"])
    code, result = run_scenarios(bundle, tmp_path, "--scenario", "SingleStream", "--loadgen", "official")
    assert code == 4
    assert "mlcommons-loadgen" in result["error"]["remedy"]


@pytest.mark.parametrize("scenario", runner.SCENARIOS)
def test_the_official_one_itself(scenario, bundle, tmp_path):
    pytest.importorskip("mlperf_loadgen", reason="the official LoadGen is not installed")
    words = ["--scenario", scenario, "--qps", "2000", "--bound-ms", "1000", "--loadgen", "official"]
    code, result = run_scenarios(bundle, tmp_path, *words)
    assert code == 0
    (found,) = result["scenarios"]
    assert (found["scenario"], found["official"], found["valid"]) == (scenario, True, True)
    if scenario == "Offline":
        assert found["samples"] == pytest.approx(found["throughput_per_s"] * found["seconds"], rel=1e-3)
    else:
        assert found["latency"]["runs"] >= runner.least_queries(scenario, runner.ScenarioPlan())
        assert found["percentile_ms"] <= found["latency"]["max_ms"]
