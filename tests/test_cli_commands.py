"""Every command on a small real bundle: what it answers in both forms, and what it leaves behind."""

import json
import re
import subprocess
import sys
import tomllib

import msgspec
import numpy as np
import pytest
from cli_case import calib_file, make_model, model_file, samples
from edgepress.compress.recipe import read_recipe
from edgepress.driver import doctor_command
from edgepress.driver.cli import main
from edgepress.driver.output import render
from edgepress.driver.summary import speed_word, summary_blocks
from edgepress.runtimes.timing import BenchmarkResult, Timing, compare
from onnx import helper


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, its data, and a bundle made of them."""
    folder = tmp_path_factory.mktemp("home")
    model_file(folder)
    calib_file(folder)
    assert (
        run_in(folder, "compile model.onnx --target host --calib calib.npz -o out --skip benchmark -q") == 0
    )
    return folder


def run_in(folder, words):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return main(words.split())


def told(folder, words, capsys, code=0):
    """The command's JSON document."""
    capsys.readouterr()
    assert run_in(folder, f"{words} --json") == code
    return json.loads(capsys.readouterr().out)


def shown(folder, words, capsys, code=0):
    """The command's text."""
    capsys.readouterr()
    assert run_in(folder, words) == code
    return capsys.readouterr().out


def test_compile_writes_a_bundle_and_says_what_to_do_next(tmp_path, capsys):
    model_file(tmp_path)
    calib_file(tmp_path)
    text = shown(
        tmp_path,
        "compile model.onnx --target raspberry-pi-4 --calib calib.npz -o out --skip benchmark",
        capsys,
    )
    assert (tmp_path / "out" / "manifest.json").is_file()
    for part in ("model size", "drift, ", "Speed was not measured", "Next:", "edgepress verify"):
        assert part in text
    for line in text.partition("Next:\n")[2].splitlines():
        if "verify" in line:
            assert run_in(tmp_path, line.split("edgepress ")[1]) == 0


def test_compile_with_benchmark_compares_with_the_model_that_went_in(tmp_path, capsys):
    model_file(tmp_path, make_model(width=512))
    calib_file(tmp_path)
    document = told(tmp_path, "compile model.onnx --target host --calib calib.npz -o out", capsys)
    timings = document["benchmark"]["timings"]
    assert len(timings) >= 2
    assert all(timing["p50_ms"] > 0 and timing["peak_memory_bytes"] > 1e6 for timing in timings[:2])
    assert document["evidence"] == "measured-on-target"
    assert document["word"] in ("faster", "not slower", "slower")
    assert document["drift"]["samples"] == 8
    assert document["bundle"].endswith("out")


def test_a_dry_run_prints_plan_and_recipe_and_writes_nothing(home, capsys):
    before = sorted(path.name for path in home.iterdir())
    text = shown(home, "compile model.onnx --target host --calib calib.npz --dry-run --seed 4", capsys)
    assert "Nothing was written" in text
    recipe = tomllib.loads(text[text.index("# edgepress recipe") : text.index("Nothing was written")])
    assert (recipe["target"], recipe["seed"]) == ("host", 4)
    assert sorted(path.name for path in home.iterdir()) == before
    document = told(home, "compile model.onnx --target host --calib calib.npz --dry-run", capsys)
    assert {decision["node"] for decision in document["plan"]["decisions"]} == {"first", "second"}
    assert document["bundle"] is None


def test_a_changed_target_field_is_used_and_kept_in_the_recipe(home, capsys):
    words = "compile model.onnx --target host --calib calib.npz --dry-run --set target.name=mine"
    document = told(home, words, capsys)
    assert document["plan"]["target"] == "mine"
    assert document["recipe"]["target_overrides"] == {"name": "mine"}


def test_a_bundles_recipe_replays_it(home, capsys):
    recipe = read_recipe(home / "out" / "recipe.toml")
    assert recipe.pins is not None
    shown(home, "compile model.onnx --recipe out/recipe.toml --calib calib.npz -o again -q", capsys)
    assert (home / "again" / "model.onnx").read_bytes() == (home / "out" / "model.onnx").read_bytes()


def test_inspect_a_model(home, capsys):
    document = told(home, "inspect model.onnx", capsys)["model"]
    assert document["operators"] == {"MatMul": 2, "Relu": 1}
    assert document["weights"] == {
        "float32": {"tensors": 2, "elements": 64 * 64 + 64 * 16, "bytes": 4 * 64 * 80}
    }
    assert document["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["N", 64]}]
    text = shown(home, "inspect model.onnx", capsys)
    assert "add --target" in text
    assert "[N, 64]" in text


def test_inspect_with_a_target_says_of_every_node_why(home, capsys):
    document = told(home, "inspect model.onnx --target raspberry-pi-5", capsys)
    assert all(decision["reason"] for decision in document["plan"]["decisions"])
    assert document["plan"]["target"] == "raspberry-pi-5"
    assert "first" in shown(home, "inspect model.onnx --target raspberry-pi-5", capsys)


def test_inspect_for_a_tensorrt_target_reads_its_operator_table(home, capsys):
    dynamic = make_model(
        nodes=[
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="quantize"),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="back"),
            helper.make_node("MatMul", ["d", "w1"], ["h"], name="first"),
            helper.make_node("MatMul", ["h", "w2"], ["y"], name="second"),
        ]
    )
    model_file(home, dynamic, "dynamic.onnx")
    check = told(home, "inspect dynamic.onnx --target jetson-orin-nano", capsys)["operator_check"]
    assert (check["ready"], check["table"]) == (False, "10.1")
    finding = next(item for item in check["findings"] if item["op"] == "DynamicQuantizeLinear")
    assert finding["nodes"] == ["quantize"]
    text = shown(home, "inspect dynamic.onnx --target jetson-orin-nano", capsys)
    assert "blocked: DynamicQuantizeLinear in 1 node: quantize" in text
    assert text.splitlines()[-1].startswith("NOT READY for jetson-orin-nano (TensorRT 10.3.0, JetPack 6.2)")
    text = shown(home, "inspect model.onnx --target a100-80gb", capsys)
    assert text.splitlines()[-1].startswith("READY for a100-80gb")
    older = shown(home, "inspect model.onnx --target jetson-nano", capsys)
    assert "opset 17 is newer than 13" in older


def test_compiling_for_tensorrt_is_not_there_yet_and_says_what_is(home, capsys):
    assert run_in(home, "compile model.onnx --target jetson-orin-nx --calib calib.npz -o engine") == 4
    told_off = capsys.readouterr().err
    assert "not there yet" in told_off
    assert "edgepress inspect MODEL --target jetson-orin-nx" in told_off
    assert not (home / "engine").exists()


def test_inspect_a_bundle(home, capsys):
    document = told(home, "inspect out", capsys)["bundle"]
    assert document["manifest"]["target"]["name"] == "host"
    assert re.fullmatch("[0-9a-f]{64}", document["digest"])
    assert {item["node"] for item in document["plan"]["decisions"]} == {"first", "second"}
    text = shown(home, "inspect out", capsys)
    assert "edgepress verify out" in text


def test_verify(home, capsys):
    document = told(home, "verify out", capsys)
    assert document["verified"] is True
    assert document["golden_samples"] > 0
    assert "is what it says it is" in shown(home, "verify out", capsys)


def test_run_writes_what_the_model_answers(home, tmp_path, capsys):
    x = samples(3)
    np.savez(tmp_path / "in.npz", x=x)
    document = told(home, f"run out --inputs {tmp_path / 'in.npz'} -o {tmp_path / 'y.npz'}", capsys)
    found = np.load(tmp_path / "y.npz")["y"]
    weights = {item.name: np.frombuffer(item.raw_data, np.float32) for item in make_model().graph.initializer}
    expected = np.maximum(x @ weights["w1"].reshape(64, 64), 0) @ weights["w2"].reshape(64, 16)
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)
    assert document["outputs"]["y"]["shape"] == [3, 16]
    assert document["outputs"]["y"]["largest"] == pytest.approx(found.max(), rel=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npz", "y.npz"]
    assert (tmp_path / "y.npz").stat().st_mode & 0o777 == (tmp_path / "in.npz").stat().st_mode & 0o777


def test_run_does_not_replace_a_file_unasked(home, tmp_path, capsys):
    np.savez(tmp_path / "in.npz", x=samples(1))
    (tmp_path / "y.npz").write_text("mine")
    words = f"run out --inputs {tmp_path / 'in.npz'} -o {tmp_path / 'y.npz'}"
    assert run_in(home, words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "y.npz").read_text() == "mine"
    assert run_in(home, f"{words} --overwrite") == 0
    assert np.load(tmp_path / "y.npz")["y"].shape == (1, 16)


@pytest.mark.parametrize("content", ["nothing", "text", "array", "pickle"])
def test_run_says_what_is_wrong_with_the_inputs_file(home, tmp_path, capsys, content):
    path = tmp_path / "in.npz"
    if content == "text":
        path.write_text("hello")
    elif content == "array":
        with path.open("wb") as file:
            np.save(file, samples(1))
    elif content == "pickle":
        np.savez(path, x=np.array([{}], dtype=object))
    assert run_in(home, f"run out --inputs {path}") == 2
    printed = capsys.readouterr().err
    assert str(path) in printed
    assert "\n  do:    " in printed


def test_run_needs_inputs(home, capsys):
    assert run_in(home, "run out") == 2
    assert "--inputs" in capsys.readouterr().err


def test_drift_of_a_bundle_against_its_model(home, capsys):
    document = told(home, "drift model.onnx out --data calib.npz --max-drift l2=20%,sqnr=10dB", capsys)
    assert document["drift"]["samples"] == 40
    assert 0 < document["drift"]["l2"] < 0.2
    assert [item["met"] for item in document["limits"]] == [True, True]
    text = shown(home, "drift model.onnx out --data calib.npz --samples 10 --max-drift 100%", capsys)
    assert "Drift on 10 samples" in text
    assert "yes" in text


def test_drift_of_a_model_against_itself_is_none(home, capsys):
    document = told(home, "drift model.onnx model.onnx --data calib.npz --max-drift l2=0", capsys)
    assert document["drift"]["l2"] == 0
    assert document["limits"][0]["met"] is True


def test_benchmark_keeps_its_figures_beside_the_bundle(home, capsys):
    before = (home / "out" / "SHA256SUMS").read_bytes()
    words = "benchmark out --baseline model.onnx --shape x:4x64 --rounds 2"
    document = told(home, words, capsys)
    assert [timing["name"] for timing in document["benchmark"]["timings"]] == ["model.onnx", "out"]
    assert document["inputs"] == ["x:4x64"]
    assert document["benchmark"]["pairs"] == 2
    first = document["benchmark"]["timings"][0]
    assert first["throughput_per_s"] == pytest.approx(4000 / first["mean_ms"])
    kept = json.loads((home / "out" / "runs" / "benchmark.json").read_text())
    assert kept["payload"]["benchmark"] == document["benchmark"]
    assert kept["payload"]["threads"] == 1
    assert (home / "out" / "SHA256SUMS").read_bytes() == before
    assert run_in(home, "verify out") == 0
    assert "baseline" in shown(home, f"{words} --threads 2", capsys)


def test_benchmark_of_one_thing_named_twice_is_one_thing(home, capsys):
    document = told(home, "benchmark model.onnx --baseline model.onnx --rounds 1", capsys)
    assert len(document["benchmark"]["timings"]) == 1


def test_targets(home, capsys):
    document = told(home, "targets list", capsys)
    names = {item["name"] for item in document["targets"]}
    assert {"host", "raspberry-pi-4", "raspberry-pi-5", "x86-64-avx2", "x86-64-avx512-vnni"} <= names
    text = shown(home, "targets show raspberry-pi-5 --set target.default_threads=2", capsys)
    assert tomllib.loads(text)["default_threads"] == 2
    assert tomllib.loads(shown(home, "targets probe", capsys))["kind"] == "host"


def test_a_shown_profile_can_be_used_as_a_target(home, capsys):
    (home / "board.toml").write_text(shown(home, "targets show raspberry-pi-4", capsys))
    document = told(home, "inspect model.onnx --target board.toml", capsys)
    assert document["plan"]["target"] == "raspberry-pi-4"


def test_doctor_finds_this_installation_healthy(home, capsys):
    document = told(home, "doctor", capsys)
    states = {check["name"]: check["state"] for check in document["checks"]}
    assert document["healthy"] is True
    assert (
        states["python"] == states["onnxruntime"] == states["onnxruntime runs"] == states["processor"] == "ok"
    )


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", ("SIGILL", "another version")),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", ("SIGSEGV", "--force-reinstall")),
        ("raise ImportError('libonnx is missing')", ("libonnx is missing", "--force-reinstall")),
        ("import time; time.sleep(5)", ("no answer", "idle")),
    ],
)
def test_doctor_reports_a_runtime_that_crashes(home, capsys, monkeypatch, program, expected):
    monkeypatch.setattr(doctor_command, "_RUNTIME_TRIAL", program)
    monkeypatch.setattr(doctor_command, "_RUNTIME_TIMEOUT_S", 2)
    document = told(home, "doctor", capsys, code=4)
    (check,) = [check for check in document["checks"] if check["name"] == "onnxruntime runs"]
    assert check["state"] == "failed"
    assert expected[0] in check["detail"]
    assert expected[1] in check["remedy"]


def test_doctor_tells_missing_extras_from_a_broken_core(home, capsys, monkeypatch):
    lines = [
        "numpy>=999",
        "msgspec>=0.20",
        "no-such-core>=1",
        'no-such-extra>=1; extra == "hf"',
        'pytest; extra == "dev"',
    ]
    monkeypatch.setattr(doctor_command.metadata, "requires", lambda _name: lines)
    document = told(home, "doctor", capsys, code=4)
    states = {check["name"]: (check["state"], check["remedy"]) for check in document["checks"]}
    assert states["numpy"] == ("failed", "pip install --upgrade 'numpy>=999'")
    assert states["msgspec"] == ("ok", None)
    assert states["no-such-core"] == ("failed", "pip install 'edgepress'")
    assert states["no-such-extra"] == ("missing", "pip install 'edgepress[hf]'")
    assert "pytest" not in states


def result_of(home, capsys, **changes):
    """A real dry run's result with fields replaced."""
    from edgepress.driver.compile import compile_model

    capsys.readouterr()
    result = compile_model(
        str(home / "model.onnx"), target="host", calib=str(home / "calib.npz"), dry_run=True
    )
    return msgspec.structs.replace(result, **changes)


def timed(before_ns, after_ns):
    def timing(name, series):
        values = [value / 1e6 for part in series for value in part]
        return Timing(
            name=name, runs=len(values), sessions=len(series), warm_up_runs=1, mean_ms=np.mean(values),
            min_ms=min(values), p50_ms=np.median(values), p90_ms=max(values), p99_ms=max(values),
            throughput_per_s=1000 / np.mean(values), load_ms=1.0,
        )  # fmt: skip

    return BenchmarkResult(
        timings=(timing("before", before_ns), timing("after", after_ns)),
        comparisons=(compare("before", "after", before_ns, after_ns),),
        pairs=len(before_ns),
        runs_per_pair=1,
    )


SLOW, FAST = [[2_000_000], [2_000_000]], [[1_000_000], [1_000_000]]


@pytest.mark.parametrize(
    ("benchmark", "evidence", "word"),
    [
        (timed(SLOW, FAST), "measured-on-target", "faster"),
        (timed(FAST, FAST), "measured-on-target", "not slower"),
        (timed(FAST, SLOW), "measured-on-target", "slower"),
        (timed(SLOW, FAST), "modelled", "predicted (modelled)"),
        (timed(SLOW, FAST), "none", "predicted (none)"),
        (None, "measured-elsewhere", "predicted (measured-elsewhere)"),
        (None, "none", None),
    ],
)
def test_only_a_timing_on_the_target_may_say_not_slower(home, capsys, benchmark, evidence, word):
    result = result_of(home, capsys, benchmark=benchmark, evidence=evidence)
    assert speed_word(result) == word
    text = render(summary_blocks(result), sys.stdout)
    if benchmark is not None:
        assert str(word) in text
        assert ("on this machine, not the target" in text) == (evidence != "measured-on-target")
    else:
        assert "Speed was not measured" in text


def test_stamps_stand_beside_the_figures(home, capsys):
    result = result_of(home, capsys, stamps=("data-free",))
    assert "data-free: the figures come of generated inputs" in render(summary_blocks(result), sys.stdout)


def test_stdout_carries_only_json_even_with_verbose(home):
    done = subprocess.run(
        [sys.executable, "-m", "edgepress", "inspect", "model.onnx", "--target", "host", "--json", "-v"],
        cwd=home, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert set(json.loads(done.stdout)) == {"model", "plan", "plan_summary"}
    assert done.stderr
