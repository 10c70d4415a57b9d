"""`edgepress benchmark` with scenarios, sweeps, cores and energy: the words, the path taken, the tables."""

import argparse
import io
import json
import os
import sys
from importlib.util import find_spec

import export_case as case
import pytest
import ssh_case
from edgepress.driver.cli import main
from edgepress.driver.devices import scenario_options
from edgepress.driver.devices.scenario_tables import further_tables
from edgepress.driver.options import parse_arguments
from edgepress.driver.output import render
from edgepress.driver.timing_tables import format_interval
from edgepress.export.runs import read_runs
from edgepress.graph.errors import RecipeError
from edgepress.runtimes import device_runner as runner


def asked(words):
    return parse_arguments(["benchmark", "out", *words.split()])


def test_scenarios_are_those_of_the_device_runner():
    assert scenario_options.SCENARIOS == runner.SCENARIOS


def test_every_option_is_one_of_the_device_runner():
    parser = runner._parser()
    known = {flag for action in parser._actions for flag in action.option_strings}
    assert {item.option.flags[0] for item in scenario_options.RUNNER_OPTIONS} <= known
    words = (
        "--scenario Server --scenario SingleStream --scenario-seconds 2.5 --queries 70 --samples-per-query 4 "
        "--qps 20 --bound-ms 100 --loadgen light --batch-sweep 1,8 --thread-sweep 1,2 --affinity 0-1 "
        "--affinity-sweep 0 --affinity-sweep 0,1 --energy-seconds 0 --rounds 3 --runs 40"
    )
    arguments = asked(words)
    assert scenario_options.asks_for_runner(arguments)
    given = parser.parse_args(["scenario", *scenario_options.runner_words(arguments)])
    assert (given.scenario, given.scenario_seconds) == (["Server", "SingleStream"], 2.5)
    assert (given.queries, given.samples_per_query, given.qps, given.bound_ms) == (70, 4, 20.0, 100.0)
    assert (given.loadgen, given.batch_sweep, given.thread_sweep) == ("light", [1, 8], [1, 2])
    assert (given.affinity, given.affinity_sweep) == ([0, 1], [[0], [0, 1]])
    assert (given.energy_seconds, given.pairs, given.runs) == (0.0, 3, 40)


@pytest.mark.parametrize(
    ("words", "commands"),
    [
        ("--batch-sweep 1,2", ("verify", "benchmark")),
        ("--scenario Offline", ("verify", "scenario")),
        ("--scenario Offline --affinity-sweep 0", ("verify", "benchmark", "scenario")),
        ("--scenario Offline --baseline m.onnx", ("verify", "benchmark", "scenario")),
    ],
)
def test_which_of_the_device_runners_commands_are_run(words, commands):
    assert scenario_options.runner_commands(asked(words)) == commands


def test_plain_benchmarks_need_no_device_runner():
    assert not scenario_options.asks_for_runner(asked("--rounds 3 --runs 9 --threads 2"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--scenario Server", "--qps and --bound-ms"),
        ("--scenario Server --qps 20", "--qps and --bound-ms"),
        ("--qps 20 --bound-ms 3", "add --scenario"),
        ("--scenario Offline --scenario-seconds soon", "a number of seconds"),
        ("--scenario Offline --scenario-seconds -1", "a number of seconds"),
        ("--scenario Server --qps 0 --bound-ms 3", "a number above 0"),
        ("--scenario Server --qps nan --bound-ms 3", "a number above 0"),
        ("--batch-sweep 0,1", "numbers such as"),
        ("--thread-sweep 1,,2", "numbers such as"),
        ("--affinity 0-", "cores such as"),
        ("--affinity-sweep x", "cores such as"),
    ],
)
def test_options_that_are_not_of_their_form(words, said):
    with pytest.raises(RecipeError) as caught:
        scenario_options.runner_words(asked(words))
    assert said in str(caught.value)


def test_long_scenarios_are_waited_for():
    def limit_s(words):
        return scenario_options.least_limit_s(asked(words))

    assert limit_s("--scenario Offline --scenario-seconds 600") >= limit_s("--scenario Offline") + 600
    assert limit_s("--scenario Offline --scenario SingleStream --scenario-seconds 3600") > 2 * 2 * 3600


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return case.make_bundle(tmp_path_factory.mktemp("scenarios"), quantized=True)


def told(words, capsys):
    capsys.readouterr()
    code = main([*words, "--json", "-q"])
    return code, json.loads(capsys.readouterr().out)


def test_a_scenario_and_sweeps_on_this_machine(bundle, capsys):
    words = "--scenario SingleStream --scenario-seconds 0 --loadgen light --batch-sweep 2 --rounds 2 --runs 3"
    core = str(min(os.sched_getaffinity(0)))
    words = [*words.split(), "--energy-seconds", "0", "--affinity", core, "--affinity-sweep", core]
    code, document = told(["benchmark", str(bundle), *words], capsys)
    assert code == 0
    (device,) = document["devices"]
    result = device["results"][0]["result"]
    assert (device["url"], device["error"]) == ("local", None)
    assert [item["scenario"] for item in result["scenarios"]] == ["SingleStream"]
    assert result["device"]["affinity"] == [int(core)]
    assert [item["batch"] for item in result["benchmark"]["batch_sweep"]] == [2]
    assert [item["affinity"] for item in result["benchmark"]["affinity_sweep"]] == [[int(core)]]
    assert result["benchmark"]["energy"] is None
    assert len(os.sched_getaffinity(0)) >= 1  # this process itself was not pinned
    code = main(["benchmark", str(bundle), *words, "-q"])
    text = capsys.readouterr().out
    assert code == 0
    assert "MLPerf scenarios" in text
    assert "light implementation" in text
    assert f"cores {core}" in text


def test_a_model_has_no_scenarios_and_wrong_cores_are_said(bundle, capsys):
    assert main(["benchmark", str(bundle / "model.onnx"), "--scenario", "Offline", "-q"]) == 2
    assert "a device runs bundles" in capsys.readouterr().err
    assert main(["benchmark", str(bundle), "--affinity", "4000", "-q"]) == 2
    assert "no cores 4000" in capsys.readouterr().err


LATENCY = {
    "runs": 300,
    "p50_ms": 2.0,
    "p90_ms": 3.0,
    "throughput_per_s": 480.0,
    "intervals_ms": {"p50": [1.9, 2.1], "p90": [2.8, None], "p99": [None, None]},
}
RESULT = {
    "benchmark": {
        "latency": {"bundle": LATENCY},
        "comparisons": {"baseline": {"ratio": 1.5, "low": 1.4, "high": 1.6, "pair_ratios": [1.5]}},
        "cold_start": {
            **{"cold_start_ms": 300.0, "import_ms": 200.0, "load_ms": 50.0, "first_run_ms": 9.0},
            **{"peak_memory_bytes": 70_000_000, "imports_bytes": 60_000_000, "processes": 5},
        },
        "batch_sweep": [{"batch": 8, "latency": LATENCY}],
        "thread_sweep": [{"threads": 2, "latency": LATENCY}],
        "affinity_sweep": [{"affinity": [0, 3], "latency": LATENCY}],
        "energy": [
            {
                **{"meter": "PMIC", "covers": "all", "readings": 9, "joules_per_inference": 0.25},
                **{"joules_per_inference_above_idle": 0.125, "watts": 5.0, "idle_watts": None},
            },
            {
                "meter": "RAPL",
                "covers": "",
                "readings": 0,
                "joules_per_inference": None,
                "why": "not measured",
            },
        ],
    },
    "scenarios": [
        {
            **{"scenario": "Server", "percentile": 0.99, "percentile_ms": 12.0, "official": True},
            **{"loadgen_version": "6.0.17", "valid": False, "unmet": ["early stopping"]},
            **{"early_stopping": {"met": False, "more_queries": 9}},
        },
        {"scenario": "Offline", "throughput_per_s": 500.0, "official": False, "valid": True},
    ],
}


def test_everything_that_was_measured_is_shown():
    tables = {table.title: table for table in further_tables([("pi", "out", RESULT)])}
    text = render(list(tables.values()), io.StringIO())
    assert all(row[:2] == ("pi", "out") for table in tables.values() for row in table.rows)
    assert tables["95 % intervals of the percentiles"].rows[0][2:] == (
        *("bundle", "1.90 ms to 2.10 ms", "from 2.80 ms", "", ""),
    )
    assert "1.500x (1.400 to 1.600)" in text
    assert [row[2] for row in tables["sweeps"].rows] == ["batch 8", "threads 2", "cores 0,3"]
    assert tables["energy"].rows[0][2:] == ("PMIC", "0.25", "0.125", "5", "")
    assert tables["energy"].rows[1][3] == "not measured"
    server, offline = tables["MLPerf scenarios"].rows
    assert server[2:] == ("Server", "p99", "12.0 ms", "", "", "no, early stopping", "LoadGen 6.0.17")
    assert offline[2:] == ("Offline", "", "", "", "500.0", "yes", "light implementation")


def test_nothing_measured_is_no_table():
    assert further_tables([("pi", "out", {"benchmark": None, "scenarios": []})]) == []


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        (None, ""),
        ((None, None), ""),
        ((1.0, 2.0), "1.00 ms to 2.00 ms"),
        ((None, 2.0), "to 2.00 ms"),
        ((1.0, None), "from 1.00 ms"),
    ],
)
def test_intervals_as_text(bounds, text):
    assert format_interval(bounds) == text


def test_options_that_are_not_given_are_none():
    arguments = asked("")
    assert isinstance(arguments, argparse.Namespace)
    assert scenario_options.runner_words(arguments) == []


def test_scenarios_on_a_board_are_shown_and_kept(bundle, tmp_path_factory, capsys):
    with ssh_case.running_board(tmp_path_factory.mktemp("board")) as board:
        words = ["benchmark", str(bundle), "--device", board.url, "--ssh-config", str(board.config)]
        words += [
            "--device-python",
            sys.executable,
            "--scenario",
            "Server",
            "--qps",
            "500",
            "--bound-ms",
            "1000",
        ]
        words += ["--scenario-seconds", "0", "--loadgen", "light"]
        code, document = told(words, capsys)
        assert code == 0
        (device,) = document["devices"]
        result = device["results"][0]["result"]
        (found,) = result["scenarios"]
        assert (device["url"], found["scenario"], found["bound_ms"]) == (board.url, "Server", 1000.0)
        assert (found["official"], found["valid"], result["benchmark"]) == (False, True, None)
        assert main([*words, "-q"]) == 0
        assert "light implementation" in capsys.readouterr().out
        assert board.left() == []
        words[words.index("light")] = "official"
        assert main([*words, "-q"]) == (0 if find_spec(runner.LOADGEN_MODULE) else 4)
    runs, problems = read_runs(bundle)
    assert problems == []
    assert [item["scenario"] for item in runs["device.json"].payload["scenarios"]]
