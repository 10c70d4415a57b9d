"""`edgepress history`, and benchmarks that are kept, compared and held to gates."""

import csv
import io
import json
import os
import shutil
from xml.etree import ElementTree

import export_case
import pytest
from edgepress.driver.cli import main
from edgepress.driver.devices.running import LocalRunner
from edgepress.driver.history.after_run import finish, request_of
from edgepress.driver.history.command import since
from edgepress.driver.history.documents import Source, bundle_facts, read_document
from edgepress.driver.history.store import History, history_file
from edgepress.driver.options import parse_arguments
from edgepress.driver.output import Answer
from edgepress.driver.reporter import SilentReporter
from edgepress.graph.errors import RecipeError, RuntimeUnavailable
from history_case import LATENCY, device_document

QUICK = ["--rounds", "2", "--runs", "5"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return export_case.make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a history of its own, which is also where the command works."""
    monkeypatch.setenv("EDGEPRESS_HISTORY", str(tmp_path / "history"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def bundle(original, home):
    return shutil.copytree(original, home / "out")


def told(capsys, *words, code=0):
    """What a command says on stdout and on stderr."""
    got = main([str(word) for word in words])
    found = capsys.readouterr()
    assert got == code, found.err + found.out
    return found.out, found.err


def document_of(capsys, *words, code=0):
    return json.loads(told(capsys, *words, "--json", code=code)[0])


def rows_of_history():
    with History(history_file()) as history:
        return history.rows()


def result(home, name, *, factor=1.0, half=0.001, hour=12, **changes):
    """A JSON result of a device, `factor` times as slow."""
    scaled = {
        key: value * factor
        for key, value in LATENCY.items()
        if key.endswith("_ms") and isinstance(value, float)
    }
    intervals = {
        key: [scaled[f"{key}_ms"] * (1 - half), scaled[f"{key}_ms"] * (1 + half)] for key in ("p50", "p90")
    }
    document = device_document(started=f"2026-01-31T{hour:02}:00:00Z", **changes)
    document["benchmark"]["latency"] = {
        "bundle": {**LATENCY, **scaled, "intervals_ms": intervals, "session_ms": {}}
    }
    for sweep in ("batch_sweep", "thread_sweep", "affinity_sweep"):
        document["benchmark"][sweep] = []
    document["scenarios"] = []
    path = home / name
    path.write_text(json.dumps(document))
    return path


# ----------------------------------------------------------------------------------- real benchmarks


@pytest.fixture
def no_cold_starts(monkeypatch):
    """Fresh processes take longer than all the rest."""

    def refuse(*_):
        raise RuntimeUnavailable("no fresh process in this test")

    monkeypatch.setattr("edgepress.driver.benchmark_command.measure_cold_start", refuse)


def test_benchmarks_are_kept_and_compared(bundle, capsys):
    first, _ = told(capsys, "benchmark", bundle, *QUICK, "--save-baseline", "main", "--compare")
    assert "Nothing to compare with" in first
    assert "Saved as baseline 'main'" in first
    answer = document_of(
        capsys, "benchmark", bundle, *QUICK, "--compare", "main", "--fail-if", "size>1B", code=3
    )
    (pair,) = answer["comparison"]
    assert pair["before"]["run"] != pair["after"]["run"] == answer["run"][0]
    figures = {item["metric"]: item for item in pair["figures"]}
    assert {"p50", "mean", "load", "cold_start", "size", "drift"} <= set(figures)
    assert figures["size"]["verdict"] == "equal"
    assert figures["p50"]["low"] < figures["p50"]["ratio"] < figures["p50"]["high"]
    assert answer["gates"][0]["state"] == "failed"
    rows = rows_of_history()
    assert [row.kind for row in rows] == ["benchmark", "benchmark"]
    assert rows[0].sessions_ms["p50"]
    assert rows[0].model == "tiny"
    # The bundle kept the very same runs.
    text, _ = told(capsys, "history", "import", bundle)
    assert "2 runs found, 0 of them new" in text
    os.unlink(history_file())  # noqa: PTH108
    text, _ = told(capsys, "history", "import", bundle)
    assert "2 runs found, 2 of them new" in text
    assert rows_of_history() == rows


@pytest.mark.usefixtures("no_cold_starts")
def test_a_gate_against_the_baseline_of_the_same_run(bundle, capsys, home):
    model = home / "work" / "model.onnx"
    model.parent.mkdir()
    shutil.copy(bundle / "model.onnx", model)
    words = ["benchmark", bundle, "--baseline", model, *QUICK]
    answer = document_of(capsys, *words, "--fail-if", "p50>+900%", "--fail-if", "size>+0%", "--no-history")
    assert {item["gate"]: item["state"] for item in answer["gates"]} == {
        "p50>+900%": "passed",
        "size>+0%": "passed",
    }
    (pair,) = answer["comparison"]
    assert pair["before"]["run"] == pair["after"]["run"]
    assert pair["differences"] == []
    assert not history_file().exists()  # --no-history


@pytest.mark.usefixtures("no_cold_starts")
def test_a_bundle_that_comes_from_elsewhere_brings_its_runs(bundle, capsys):
    told(capsys, "benchmark", bundle, *QUICK, "--no-history")
    answer = document_of(capsys, "benchmark", bundle, *QUICK, "--compare")
    assert len(answer["comparison"]) == 1
    assert len(rows_of_history()) == 1  # nothing else was added


@pytest.mark.usefixtures("no_cold_starts")
def test_a_history_that_cannot_be_used_breaks_no_benchmark(bundle, capsys):
    history_file().parent.mkdir()
    history_file().write_bytes(b"damaged" * 1000)
    out, err = told(capsys, "benchmark", bundle, *QUICK)
    assert "p50" in out
    assert "warning: this run is not in the history" in err
    assert "history import" in err
    # What needs the history says so; the figures are still shown.
    out, err = told(capsys, "benchmark", bundle, *QUICK, "--fail-if", "p50>+5%", code=2)
    assert "p50" in out
    assert "the history is damaged" in out
    assert history_file().read_bytes() == b"damaged" * 1000
    assert told(capsys, "verify", bundle)[1].count("warning") == 1
    _, err = told(capsys, "history", "list", code=2)
    assert "error: the history is damaged" in err


def test_verifications_are_kept(bundle, capsys):
    told(capsys, "verify", bundle)
    (bundle / "README.md").write_text("changed")
    told(capsys, "verify", bundle, code=3)
    told(capsys, "verify", bundle, "--no-history", code=3)
    assert [(row.kind, row.outputs_ok) for row in rows_of_history()] == [("verify", True), ("verify", False)]
    out, _ = told(capsys, "history", "list")
    assert "outputs differ" in out


def test_devices_are_kept_with_their_names(bundle, capsys, home, monkeypatch):
    good = device_document(bundle_facts(bundle).digest, scenarios=[])
    monkeypatch.setattr(LocalRunner, "run", lambda *_: good)
    (home / "lab.toml").write_text('[devices.desk]\nurl = "local"\n[devices.shelf]\nurl = "local"\n')
    told(capsys, "benchmark", bundle, "--devices", "lab.toml")
    rows = [row for row in rows_of_history() if row.role == "bundle"]
    # Both say the very same here: that is one run.
    assert [(row.device, row.url, row.bundle_path) for row in rows] == [("desk", "local", str(bundle))]
    assert "2 runs found, 0 of them new" in told(capsys, "history", "import", bundle)[0]
    void = {**good, "void": True, "void_reasons": ["throttled"], "started": "2026-01-31T13:00:00Z"}
    monkeypatch.setattr(LocalRunner, "run", lambda *_: void)
    words = ["benchmark", bundle, "--devices", "lab.toml", "--save-baseline", "main"]
    out, _ = told(capsys, *words, "--fail-if", "p90>99s", code=3)
    assert "Not saved as baseline 'main'" in out
    assert "the run does not count: throttled" in out
    verified = device_document(benchmark=None, scenarios=[], started="2026-01-31T14:00:00Z")
    monkeypatch.setattr(LocalRunner, "run", lambda *_: verified)
    told(capsys, "verify", bundle, "--devices", "lab.toml")
    assert [row.kind for row in rows_of_history()].count("verify") == 1


@pytest.mark.usefixtures("home")
def test_gates_do_not_pass_for_want_of_a_run():
    request = request_of(parse_arguments(["benchmark", "out", "--fail-if", "p90>1s"]))
    answer = finish(request, [], Answer(document={}, blocks=()), SilentReporter())
    assert answer.exit_code == 3
    assert "no run could be held to the gates" in answer.blocks[-1]


# ------------------------------------------------------------------------------------ made-up results


def test_two_files_are_compared_without_a_history(home, capsys):
    before, after = result(home, "a.json"), result(home, "b.json", factor=1.2, hour=13)
    history_file().parent.mkdir()
    history_file().write_bytes(b"damaged" * 1000)
    out, _ = told(capsys, "history", "compare", before, after)
    assert "+20.0 %" in out
    assert "higher" in out
    words = ["history", "compare", before, after, "--fail-if"]
    told(capsys, *words, "p90>+5%", code=3)
    told(capsys, *words, "p90>+50%")
    told(capsys, "history", "compare", after, before, "--fail-if", "p90>+5%")


def test_noise_decides_and_strict_gates_are_strict(home, capsys):
    before, after = result(home, "a.json", half=0.1), result(home, "b.json", factor=1.1, half=0.1, hour=13)
    words = ["history", "compare", before, after, "--fail-if", "p90>+5%"]
    out, err = told(capsys, *words)
    assert "undecided: passes" in out
    assert "warning: p90>+5% is undecided" in err
    assert "undecided: fails" in told(capsys, *words, "--strict-gate", code=3)[0]
    text, _ = told(capsys, *words, "--format", "junit")
    suite = ElementTree.fromstring(text)[0]
    assert (suite.get("skipped"), suite.get("failures")) == ("1", "0")
    text, _ = told(capsys, *words, "--strict-gate", "--format", "junit", code=3)
    assert ElementTree.fromstring(text)[0].get("failures") == "1"


def test_a_void_run_passes_no_gate(home, capsys):
    before = result(home, "a.json")
    after = result(home, "b.json", factor=0.5, hour=13, void=True, void_reasons=["throttled"])
    out, _ = told(capsys, "history", "compare", before, after, "--fail-if", "p90>+5%", code=3)
    assert "throttled" in out
    out, _ = told(capsys, "history", "compare", after, before, "--fail-if", "p90>+5%", code=2)
    assert "the earlier run is void" in out


def test_other_conditions_are_told_and_judge_nothing(home, capsys):
    before = result(home, "a.json")
    document = json.loads(before.read_text())
    document["benchmark"]["threads"] = 1
    document["device"]["board"] = "Raspberry Pi 4"
    (home / "b.json").write_text(json.dumps(document))
    words = ["history", "compare", before, "b.json", "--fail-if", "p90>+5%", "--fail-if", "size>+0%"]
    out, _ = told(capsys, *words, code=3)
    assert "threads: 4 before, 1 after" in out
    assert "board: Raspberry Pi 5 Model B before, Raspberry Pi 4 after" in out
    answer = document_of(capsys, *words, code=3)
    assert [item["state"] for item in answer["gates"]] == ["other conditions", "passed"]


def test_runs_are_named_by_id_baseline_bundle_and_file(home, capsys):
    for index in range(3):
        told(
            capsys, "history", "import", result(home, f"{index}.json", factor=1 + index / 10, hour=10 + index)
        )
    rows = rows_of_history()
    with History(history_file()) as history:
        history.save_baseline("main", [rows[0].run])
    assert document_of(capsys, "history", "show", rows[1].run[:8])["measurements"][0]["run"] == rows[1].run
    assert document_of(capsys, "history", "show", "main")["measurements"][0]["run"] == rows[0].run
    shown = document_of(capsys, "history", "show", "2.json")
    assert shown["documents"][rows[2].run] == json.loads((home / "2.json").read_text())
    out, _ = told(capsys, "history", "show", "main")
    assert "Raspberry Pi 5 Model B" in out
    assert "within tolerance" in out
    for wrong in ("nosuch", "abcdef", rows[0].run[:5]):
        _, err = told(capsys, "history", "show", wrong, code=2)
        assert "baselines: main" in err
    (home / "folder").mkdir()
    assert "no bundle" in told(capsys, "history", "show", "folder", code=2)[1]


def test_a_comparison_without_a_figure_before_says_what_to_do(home, capsys):
    after = result(home, "b.json", hour=13)
    document = json.loads(after.read_text())
    bundle_row = document["benchmark"]["latency"]["bundle"]
    bundle_row["p99_ms"], bundle_row["intervals_ms"] = None, {}
    before = home / "a.json"
    before.write_text(json.dumps(document))
    out, _ = told(capsys, "history", "compare", before, after, "--fail-if", "p99>+5%", code=2)
    assert "there is no earlier run to hold this one against" in out
    assert "do:" in out
    _, err = told(capsys, "history", "compare", before, after, "--strict-gate", code=2)
    assert "add --fail-if" in err


def test_a_reference_that_no_file_can_be_called(home, capsys):
    _, err = told(capsys, "history", "show", "a/" * 3000, code=2)
    assert "there is no run, baseline, bundle or file" in err
    told(capsys, "benchmark", "out", "--compare", "x" * 3000, code=2)
    assert home.exists()


def test_runs_of_other_devices_do_not_crowd_the_reference_out(home, bundle):
    document = json.loads(result(home, "a.json").read_text())
    mine = read_document(document, Source(where="a", device="mine", url="ssh://mine"))
    others = [
        run
        for number in range(250)
        for run in read_document(
            {**document, "started": "2026-02-01T12:00:00Z", "number": number},
            Source(where="a", device="theirs", url="ssh://theirs"),
        )
    ]
    with History(history_file()) as history:
        history.add([*mine, *others])
    now = read_document({**document, "number": -1}, Source(where="a", device="mine", url="ssh://mine"))
    request = request_of(parse_arguments(["benchmark", str(bundle), "--fail-if", "size>+5%", "--no-history"]))
    answer = finish(request, now, Answer(document={}, blocks=()), SilentReporter())
    assert answer.exit_code == 0, answer.blocks


def test_the_list_is_filtered(home, capsys):
    told(capsys, "history", "import", result(home, "a.json"))
    told(capsys, "history", "import", result(home, "b.json", hour=13, void=True, void_reasons=["hot"]))
    out, _ = told(capsys, "history", "list")
    assert out.count("net for raspberry-pi-5") == 2
    assert "void" in out
    board = "Raspberry Pi 5 Model B"
    for words, count in (
        (["--model", "net"], 2), (["--model", "x"], 0), (["--target", "raspberry-pi-5"], 2),
        (["--no-void"], 1), (["--device", board], 2), (["--device", "pi4"], 0), (["--limit", "1"], 1),
        (["--since", "2026-01-31"], 2), (["--since", "2026-02-01"], 0), (["--kind", "verify"], 0),
    ):  # fmt: skip
        assert len(document_of(capsys, "history", "list", *words)["measurements"]) == count, words
    text, _ = told(capsys, "history", "list", "--format", "csv")
    (row, _) = csv.DictReader(io.StringIO(text))
    assert (row["p50_ms"], row["peak_memory_bytes"], row["void"]) == ("10.0", "50000000", "false")
    text, _ = told(capsys, "history", "list", "--format", "markdown")
    assert text.startswith("| run | started (UTC) |")


def test_days_and_spans():
    assert since("2026-01-31") == "2026-01-31T00:00:00Z"
    assert since("1d") > since("2d") > since("99999d")
    for wrong in ("yesterday", "2026-13-01", "3", "-1d", ""):
        with pytest.raises(RecipeError, match="no day"):
            since(wrong)


def test_runs_go_from_one_history_to_another(home, capsys, monkeypatch):
    told(capsys, "history", "import", result(home, "a.json"), result(home, "b.json", hour=13))
    rows = rows_of_history()
    told(capsys, "history", "export", "--output", "runs.json")
    monkeypatch.setenv("EDGEPRESS_HISTORY", str(home / "other"))
    assert "2 of them new" in told(capsys, "history", "import", "runs.json")[0]
    assert "0 of them new" in told(capsys, "history", "import", "runs.json")[0]
    assert rows_of_history() == rows
    # On stdout it is the same document.
    assert json.loads(told(capsys, "history", "export")[0]) == json.loads((home / "runs.json").read_text())
    forged = json.loads((home / "runs.json").read_text())
    forged["runs"][0]["document"]["void"] = True
    (home / "forged.json").write_text(json.dumps(forged))
    assert "not the result" in told(capsys, "history", "import", "forged.json", code=2)[1]


def test_runs_are_removed_but_not_those_of_baselines(home, capsys):
    for index in range(6):
        void = {"void": True, "void_reasons": ["hot"]} if index == 3 else {}
        told(capsys, "history", "import", result(home, f"{index}.json", hour=10 + index, **void))
    runs = [row.run for row in rows_of_history()]
    with History(history_file()) as history:
        history.save_baseline("main", [runs[0]])
    told(capsys, "history", "prune", code=2)
    assert "3 of 6 runs would be removed" in told(capsys, "history", "prune", "--keep", "2", "--dry-run")[0]
    assert len(rows_of_history()) == 6
    told(capsys, "history", "prune", "--void")
    assert [row.run for row in rows_of_history()] == [*runs[:3], *runs[4:]]
    told(capsys, "history", "prune", "--keep", "2")
    assert [row.run for row in rows_of_history()] == [runs[0], *runs[4:]]
    assert "no baseline" in told(capsys, "history", "prune", "--baseline", "x", code=2)[1]
    told(capsys, "history", "prune", "--baseline", "main", "--older-than", "1")
    with History(history_file()) as history:
        assert history.baselines() == {}


def test_plots(home, capsys):
    assert "nothing to plot" in told(capsys, "history", "plot", code=2)[1]
    for index in range(4):
        told(
            capsys, "history", "import", result(home, f"{index}.json", factor=1 + index / 5, hour=10 + index)
        )
    out, _ = told(capsys, "history", "plot")
    assert "▁" in out
    assert "█" in out
    told(capsys, "history", "plot", "--output", "all.html")
    assert (home / "all.html").read_text().startswith("<!doctype html>")
    told(capsys, "history", "plot", "--metric", "p90", "--metric", "energy", "--output", "all.svg")
    root = ElementTree.fromstring((home / "all.svg").read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "an .html or .svg file" in told(capsys, "history", "plot", "--output", "all.png", code=2)[1]
    assert "is no metric" in told(capsys, "history", "plot", "--metric", "p91", code=2)[1]
    assert sorted(path.name for path in home.glob("all*")) == ["all.html", "all.svg"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--fail-if", "p90>5%"], "p90>+5%"),
        (["--strict-gate"], "add --fail-if"),
        (["--compare", "nosuch"], "--save-baseline nosuch"),
        (["--save-baseline", "abcdef12"], "cannot be a baseline's name"),
        (["--save-baseline", "main", "--no-history"], "leave --no-history out"),
        (["--format", "csv", "--json"], "contradict"),
        (["--output", "missing/a.csv"], "no such folder"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_timed(words, says, bundle, capsys):
    _, err = told(capsys, "benchmark", bundle, *words, code=2)
    assert says in err
    assert not list((bundle / "runs").glob("benchmark*"))


def test_compare_takes_a_value_or_none():
    assert parse_arguments(["benchmark", "out"]).compare is None
    assert parse_arguments(["benchmark", "out", "--compare"]).compare == ""
    assert parse_arguments(["benchmark", "out", "--compare", "main"]).compare == "main"
    assert parse_arguments(["benchmark", "out", "--compare=main"]).compare == "main"
