"""The device runner on bundles: hashes, the probed runtime, golden samples, benchmarks, command line."""

import ast
import hashlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import export_case as case
import msgspec
import numpy as np
import pytest
from edgepress.export.checksums import check_sums
from edgepress.export.golden import difference
from edgepress.export.manifest import to_json
from edgepress.export.npz import npz_bytes
from edgepress.export.runs import read_runs
from edgepress.export.verify import verify_bundle
from edgepress.runtimes import device_runner as runner
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

SOURCE = Path(runner.__file__)
SCHEMA = json.loads((SOURCE.parents[1] / "docs" / "benchmark.schema.json").read_text(encoding="utf-8"))
QUICK = ["--pairs", "2", "--runs", "3", "--cold-starts", "1", "--energy-seconds", "0"]
QUICKER = [*QUICK, "--cold-starts", "0"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return case.make_bundle(tmp_path_factory.mktemp("original"), quantized=True)


@pytest.fixture
def bundle(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def resum(bundle):
    """Make the sums true again after an edit, as a forger would."""
    names = sorted(
        path.relative_to(bundle).as_posix()
        for path in bundle.rglob("*")
        if path.is_file() and path.name != "SHA256SUMS" and path.parent.name != "runs"
    )
    lines = [f"{hashlib.sha256((bundle / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (bundle / "SHA256SUMS").write_text("".join(lines))


def edit_manifest(bundle, change):
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    resum(bundle)


TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
    "number": (int, float),
}


def faults(value, schema, where="result"):
    """What of a value does not fit a JSON Schema, of the keywords that ours has."""
    unknown = set(schema) - {
        *("$schema", "$defs", "$ref", "title", "description", "type", "enum", "const", "properties"),
        *("required", "additionalProperties", "items", "minimum", "minItems", "maxItems", "anyOf"),
    }
    assert not unknown, unknown
    if "anyOf" in schema:
        tried = [faults(value, one, where) for one in schema["anyOf"]]
        return [] if [] in tried else tried[0]
    if "$ref" in schema:
        return faults(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], where)
    kinds = schema.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    is_number = isinstance(value, int) and not isinstance(value, bool)
    fits = [kind for kind in kinds if isinstance(value, TYPES[kind])]
    if kinds and (not fits or (isinstance(value, bool) and "boolean" not in kinds)):
        return [f"{where}: {value!r} is not {kinds}"]
    found = []
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        found.append(f"{where}: {value!r}")
    if is_number and value < schema.get("minimum", -math.inf):
        found.append(f"{where}: {value} is too small")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
            found.append(f"{where}: {len(value)} items")
        for index, item in enumerate(value):
            found += faults(item, schema.get("items", {}), f"{where}[{index}]")
    if isinstance(value, dict):
        own = schema.get("properties", {})
        found += [f"{where}: {name} is missing" for name in schema.get("required", ()) if name not in value]
        for name, item in value.items():
            rest = schema.get("additionalProperties", True)
            if name not in own and rest is False:
                found.append(f"{where}: {name} is unknown")
            else:
                found += faults(
                    item, own.get(name, rest if isinstance(rest, dict) else {}), f"{where}.{name}"
                )
    return found


def test_the_schema_check_sees_what_it_has_to_see():
    assert faults({"p50_ms": "x"}, SCHEMA["$defs"]["latency"])
    assert faults({"format": "edgepress-device-run", "surprise": 1}, SCHEMA)
    assert faults(True, {"type": "integer"})
    assert faults([1], {"type": "array", "items": {"type": "string"}})
    assert not faults(None, {"type": ["number", "null"]})


def run_main(bundle, *arguments, probe=None):
    """(exit code, result) of the runner in this process."""
    out = bundle.parent / "result.json"
    out.unlink(missing_ok=True)
    code = runner.main(["--bundle", str(bundle), "--out", str(out), *arguments], probe=probe)
    result = json.loads(out.read_text(encoding="utf-8"))
    assert faults(result, SCHEMA) == []
    assert result["exit_code"] == code
    return code, result


def test_the_file_stands_alone_and_is_written_for_python_3_8():
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"), feature_version=(3, 8))
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in top
        for alias in node.names
    }
    assert names <= set(sys.stdlib_module_names)  # numpy and the runtime come once they are known to work
    late = {
        alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import) and node not in top
        for alias in node.names
    }
    assert late == {"numpy", "onnxruntime", "resource", "zipfile"}
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))
    newer = {"removeprefix", "removesuffix", "is_relative_to", "pairwise", "bit_count", "with_stem"}
    assert not newer & {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    keywords = {word.arg for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords}
    assert not {"kw_only", "slots", "strict"} & keywords


@pytest.mark.skipif(shutil.which("python3.8") is None, reason="no Python 3.8 here")
def test_python_3_8_runs_it(bundle):
    done = subprocess.run(
        ["python3.8", str(bundle / "device_runner.py"), "--help"], capture_output=True, text=True, check=False
    )
    if "not found" in done.stderr or "not installed" in done.stderr:
        pytest.skip("python3.8 is a name without a Python behind it")
    assert done.returncode == 0, done.stderr
    assert "--thread-sweep" in done.stdout


def test_a_bundle_carries_the_very_file(bundle):
    assert (bundle / "device_runner.py").read_bytes() == SOURCE.read_bytes()
    assert "  device_runner.py\n" in (bundle / "SHA256SUMS").read_text()
    assert "device_runner.py" in (bundle / "README.md").read_text()


def test_the_copy_in_a_bundle_checks_verifies_and_measures_it(bundle, tmp_path):
    shutil.copy(bundle / "model.onnx", tmp_path / "plain.onnx")
    out = tmp_path / "result.json"
    program = [sys.executable, str(bundle / "device_runner.py"), "--out", str(out), "--keep", *QUICK]
    program += ["--baseline", str(tmp_path / "plain.onnx"), "--batch-sweep", "1,3", "--thread-sweep", "1,2"]
    # The checkout must not be what makes it work.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(program, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "golden samples within tolerance" in done.stdout
    result = json.loads(out.read_text(encoding="utf-8"))
    assert faults(result, SCHEMA) == []
    found = result["benchmark"]
    assert result["runtime"]["status"] == "ok"
    assert result["outputs"]["within_tolerance"] is True
    assert set(found["latency"]) == {"baseline", "bundle"}
    assert found["latency"]["bundle"]["sessions"] == 2
    assert len(found["comparisons"]["baseline"]["pair_ratios"]) == 2
    assert [item["batch"] for item in found["batch_sweep"]] == [1, 3]
    assert [item["threads"] for item in found["thread_sweep"]] == [1, 2]
    cold = found["cold_start"]
    assert cold["cold_start_ms"] > cold["import_ms"] + cold["load_ms"] + cold["first_run_ms"]
    assert cold["peak_memory_bytes"] > cold["imports_bytes"] > 10_000_000
    assert found["file_bytes"] == (bundle / "model.onnx").stat().st_size
    assert result["device"]["affinity"] == sorted(os.sched_getaffinity(0))
    # What it added is a run of the bundle, and the bundle is still what it says.
    assert verify_bundle(bundle).runs == ("device.json", "golden.json")
    runs, problems = read_runs(bundle)
    assert problems == []
    kept = runs["device.json"].payload
    assert kept == json.loads((bundle / "runs" / "device.json").read_text())["payload"]
    assert kept["benchmark"]["latency"] == found["latency"]


def damage(bundle, kind):
    if kind == "flipped":
        data = bytearray((bundle / "model.onnx").read_bytes())
        data[len(data) // 2] ^= 1
        (bundle / "model.onnx").write_bytes(data)
    elif kind == "missing":
        (bundle / "plan.json").unlink()
    elif kind == "extra":
        (bundle / "numpy.py").write_text("raise SystemExit(0)\n")
    elif kind == "link":
        (bundle / "plan.json").unlink()
        (bundle / "plan.json").symlink_to("manifest.json")
    elif kind == "cut":
        (bundle / "SHA256SUMS").write_bytes((bundle / "SHA256SUMS").read_bytes()[:-5])
    elif kind == "escape":
        sums = (bundle / "SHA256SUMS").read_text()
        (bundle / "SHA256SUMS").write_text(f"{'0' * 64}  ../outside\n" + sums)
    elif kind == "no sums":
        (bundle / "SHA256SUMS").unlink()


@pytest.mark.parametrize("kind", ["whole", "flipped", "missing", "extra", "link", "cut", "escape", "no sums"])
def test_hashes_find_what_edgepress_finds(bundle, kind):
    damage(bundle, kind)
    problems = runner.check_sums(bundle)
    assert bool(problems) is (kind != "whole")
    files = {problem.split(":")[0] for problem in problems}
    assert files == {problem.split(":")[0] for problem in check_sums(bundle)}
    if kind == "whole":
        return
    code, result = run_main(bundle, "check", "benchmark")
    assert code == 3
    assert result["bundle"] == {**result["bundle"], "problems": problems, "digest": None}
    assert result["runtime"] is result["benchmark"] is None  # nothing of it was run
    assert problems[0] in result["error"]["why"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda m: m["model"].update(files=["../model.onnx"]), 3),
        (lambda m: m["golden"]["samples"][0].update(inputs="/etc/passwd"), 3),
        (lambda m: m["session_options"]["config"].update({"session.x": "../file"}), 3),
        (lambda m: m.pop("model"), 3),
        (lambda m: m.update(format="something"), 3),
        (lambda m: m.update(schema_version=2), 4),
    ],
)
def test_manifests_that_are_wrong_or_newer(bundle, change, code, capsys):
    edit_manifest(bundle, change)
    assert runner.main(["--bundle", str(bundle)]) == code
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_a_manifest_that_is_no_json(bundle, text, capsys):
    (bundle / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert runner.main(["--bundle", str(bundle)]) == 3
    assert "manifest.json" in capsys.readouterr().err


def test_wrong_usage_is_said_and_touches_nothing(bundle, tmp_path, capsys):
    inside = str(bundle / "result.json")
    for arguments, said in (
        (["--bundle", str(tmp_path)], "not an edgepress bundle"),
        (["--bundle", str(bundle), "--out", inside], "inside the bundle"),
        (["--bundle", str(bundle), "polish"], "no command 'polish'"),
        (["--bundle", str(bundle), "--out", str(tmp_path / "no" / "folder")], "No such file"),
    ):
        assert runner.main([*arguments, *(["check"] if "polish" not in arguments else [])]) == 2
        assert said in capsys.readouterr().err
    for arguments, said in (
        (["benchmark", "--baseline", "nowhere.onnx", *QUICK], "no model"),
        (["scenario", "--scenario", "Server"], "--qps"),
        (["scenario", "--scenario", "Server", "--qps", "-1", "--bound-ms", "5"], "--qps"),
    ):
        code, result = run_main(bundle, *arguments)
        assert code == 2
        assert said in result["error"]["what"]
    assert check_sums(bundle) == []


@pytest.mark.parametrize(
    "words", ["--cold-starts -1", "--threads 4,2", "--runs 0", "--queries -1", "--counted 0", "--pairs x"]
)
def test_numbers_that_make_no_sense_are_refused(bundle, words, capsys):
    with pytest.raises(SystemExit) as caught:
        runner.main(["--bundle", str(bundle), *words.split()])
    assert caught.value.code == 2
    assert words.split()[0] in capsys.readouterr().err


def test_a_child_that_dies_in_the_middle_of_a_report():
    said = 'edgepress-runner {"stage": "whole"}\nedgepress-runner {"stage": "cu'
    end = runner.run_child({}, argv=[sys.executable, "-c", f"print({said!r}, end='')"])
    assert [item["stage"] for item in end.stages] == ["whole"]
    assert len(end.at_ms) == 1


def test_outputs_out_of_tolerance_end_with_3(bundle):
    file = bundle / "golden" / "outputs_001.npz"
    with np.load(file) as archive:
        arrays = {name: archive[name] * np.float32(1.5) for name in archive.files}
    file.write_bytes(npz_bytes(arrays))
    resum(bundle)
    code, result = run_main(bundle, "verify")
    assert code == 3
    assert result["outputs"]["within_tolerance"] is False
    assert result["outputs"]["max_abs_diff"] > 0.1
    assert all(problem.startswith("golden/outputs_001.npz") for problem in result["outputs"]["problems"])
    assert "relative l2" in result["error"]["why"]


@pytest.mark.parametrize("kind", ["damaged", "other arrays", "other shape"])
def test_golden_files_that_do_not_fit(bundle, kind):
    file = bundle / "golden" / "outputs_000.npz"
    data = {
        "damaged": b"PK no archive",
        "other arrays": npz_bytes({"z": np.zeros(3, np.float32)}),
        "other shape": npz_bytes({"y": np.zeros((1, 2), np.float32)}),
    }[kind]
    file.write_bytes(data)
    resum(bundle)
    code, result = run_main(bundle, "verify")
    assert code == 3
    assert "outputs_000.npz" in result["error"]["what"] + result["error"]["why"]


def test_a_bfloat16_bundle_is_not_for_this_runtime(bundle):
    def change(manifest):
        manifest["precision"]["form"] = "int8+bf16"
        manifest["target"]["runtime"] = "tensorrt"

    edit_manifest(bundle, change)
    code, result = run_main(bundle, "verify")
    assert code == 4
    assert "trtexec" in result["error"]["remedy"]


def test_a_tensorrt_bundle_says_whose_figures_these_are(bundle):
    edit_manifest(bundle, lambda manifest: manifest["target"].update(runtime="tensorrt"))
    code, result = run_main(bundle, "verify")
    assert code == 0
    assert "not an engine's" in result["notes"][0]


def test_a_provider_that_is_not_there(bundle):
    code, result = run_main(bundle, "verify", "--provider", "NoSuchExecutionProvider")
    assert code == 4
    assert "NoSuchExecutionProvider" in result["error"]["what"]


def test_a_model_that_the_runtime_refuses(bundle):
    (bundle / "model.onnx").write_bytes(b"no model")
    resum(bundle)
    code, result = run_main(bundle, "verify")
    assert code == 4
    assert "does not load model.onnx" in result["error"]["what"]


REPORT = (
    'import os, signal, sys; print(\'edgepress-runner {"stage": "numpy", "version": "2.0"}\', flush=True); '
)
DEATHS = {
    "SIGILL": (REPORT + "os.kill(os.getpid(), signal.SIGILL)", "crashed", "onnxruntime ends with SIGILL"),
    "SIGSEGV": (
        "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "crashed",
        "numpy ends with SIGSEGV",
    ),
    "by a shell": (REPORT + "sys.exit(132)", "crashed", "SIGILL"),
    "hangs": (REPORT + "import time; time.sleep(60)", "timeout", "onnxruntime took more than"),
    "missing": (
        "raise ModuleNotFoundError(\"No module named 'numpy'\")",
        "missing",
        "numpy is not installed",
    ),
    "its own import": ("raise ImportError('libgomp.so.1: cannot open')", "failed", "cannot be imported"),
}


@pytest.mark.parametrize("name", DEATHS)
def test_a_runtime_that_dies_is_a_finding(name):
    program, status, said = DEATHS[name]
    versions = {"numpy": "2.4.6", "onnxruntime": "1.31.1", "onnx": "1.20"}
    cpu = {"name": "Cortex-A72", "hwcap_features": ["asimd", "crc32"], "claimed_only": ["asimddp"]}
    timeout_s = 1.0 if status == "timeout" else 30.0
    found = runner.probe_runtime(versions, cpu, timeout_s=timeout_s, argv=[sys.executable, "-c", program])
    assert found["status"] == status
    assert said in found["what"]
    assert found["remedy"].endswith("numpy==2.4.6 onnxruntime==1.31.1")
    assert faults(found, SCHEMA["$defs"]["runtime"]) == []
    if found["signal"] == "SIGILL":
        assert "an instruction that this CPU does not have" in found["why"]
        assert "features: asimd crc32" in found["why"]
        assert "claims asimddp" in found["why"]


def test_a_dead_runtime_ends_with_4_and_nothing_is_run(bundle, monkeypatch):
    monkeypatch.setattr(
        runner, "run_child", lambda *_, **__: runner.ChildEnd([{"stage": "started"}], [1.0], -4, "")
    )
    code, result = run_main(bundle, "verify", "benchmark")
    assert code == 4
    assert result["runtime"]["signal"] == "SIGILL"
    assert result["outputs"] is result["benchmark"] is None
    assert "pip install" in result["error"]["remedy"]


def test_a_child_that_dies_in_a_cold_start(bundle):
    (bundle / "model.onnx").write_bytes(b"no model")
    with pytest.raises(runner.RuntimeUnusable, match="exit status 4") as caught:
        runner.cold_starts(bundle / "model.onnx", {}, runner.SessionSettings(), repeats=1)
    assert "does not load model.onnx" in caught.value.why


def fake_board(folder, model, throttled):
    """A probe of a board below `folder` whose firmware answers with `throttled`, one after the other."""
    (folder / "proc/device-tree").mkdir(parents=True)
    (folder / "proc/device-tree/model").write_text(model)
    (folder / "proc/cpuinfo").write_text("CPU part : 0xd08\nFeatures : fp asimd\n")
    answers = iter([*throttled[:-1], *[throttled[-1]] * 1000])

    def command(argv, _timeout_s):
        return next(answers) if list(argv[:2]) == ["vcgencmd", "get_throttled"] else None

    return runner.Probe(folder, command)


def keys_of(value):
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from keys_of(item)


def test_an_emulated_board_gives_outputs_and_counts_and_no_times(bundle, tmp_path):
    board = "Raspberry Pi 4 Model B Rev 1.4 (emulated, not a board)"
    probe = fake_board(tmp_path / "board", board, ["throttled=0x0"])
    code, result = run_main(bundle, "verify", "benchmark", "--counted", "2", probe=probe)
    assert code == 0
    assert result["emulated"] is True
    assert result["outputs"]["within_tolerance"] is True
    assert result["benchmark"]["counted_inferences"] == 2
    assert result["benchmark"]["counted"] == ["bundle"]
    assert not [key for key in keys_of(result) if key.endswith("_ms")]
    code, result = run_main(bundle, "scenario", probe=probe)
    assert code == 2


def test_a_board_that_throttles_voids_the_run(bundle, tmp_path):
    steps = ["throttled=0x0", "throttled=0x0", "throttled=0x40004", "throttled=0x40000"]
    probe = fake_board(tmp_path / "board", "Raspberry Pi 4 Model B Rev 1.4", steps)
    code, result = run_main(bundle, "benchmark", *QUICKER, probe=probe)
    assert code == 3
    assert result["void"] is True
    assert result["void_reasons"] == ["throttled during the run"]
    assert result["benchmark"]["latency"]["bundle"]["runs"] > 0  # kept, and marked
    assert result["benchmark"]["cold_start"] is None
    assert "VOID        throttled during the run" in runner.summary_lines(result)


def test_the_scenarios_of_a_bundle(bundle):
    arguments = [
        "scenario",
        "--scenario-seconds",
        "0",
        "--qps",
        "2000",
        "--bound-ms",
        "1000",
        "--loadgen",
        "light",
    ]
    for name in runner.SCENARIOS:
        arguments += ["--scenario", name]
    code, result = run_main(bundle, *arguments)
    assert code == 0
    assert [item["scenario"] for item in result["scenarios"]] == list(runner.SCENARIOS)
    assert all(item["valid"] and item["official"] is False for item in result["scenarios"])
    single, multi, offline, server = result["scenarios"]
    assert (single["percentile"], single["latency"]["runs"]) == (0.9, 64)
    assert (multi["percentile"], multi["samples_per_query"], multi["latency"]["runs"]) == (0.99, 8, 662)
    assert offline["throughput_per_s"] > 0
    assert (server["bound_ms"], server["early_stopping"]["over"]) == (1000.0, 0)


def test_a_bundle_without_golden_samples_is_timed_on_made_up_inputs(tmp_path):
    bundle = case.make_bundle(tmp_path, golden=False)
    code, result = run_main(bundle, "verify", "benchmark", *QUICKER)
    assert code == 0
    assert result["outputs"] is None
    assert result["benchmark"]["inputs"] == "made up"
    assert result["benchmark"]["shapes"] == {"attention_mask": [1, 16], "input_ids": [1, 16]}
    assert any("no golden samples" in note for note in result["notes"])


def test_the_usual_shape_of_a_range_is_timed(bundle):
    specs = json.loads((bundle / "manifest.json").read_text())["model"]["inputs"]
    for index, length in enumerate((4, 8, 12)):
        arrays = {spec["name"]: np.ones((1, length), np.int64) for spec in specs}
        (bundle / "golden" / f"inputs_{index:03}.npz").write_bytes(npz_bytes(arrays))
    shapes = {spec["name"]: {"min": [1, 4], "opt": [1, 8], "max": [1, 12]} for spec in specs}
    edit_manifest(bundle, lambda manifest: manifest.update(shapes=shapes))
    feeds, source = runner.benchmark_feeds(runner.open_bundle(bundle))
    assert source == "golden"
    assert {array.shape for array in feeds.values()} == {(1, 8)}


def test_batches_are_repeated_samples_where_the_axis_is_free():
    free = [{"name": "x", "shape": ["N", 2]}, {"name": "c", "shape": [3]}, {"name": "s", "shape": []}]
    feeds = {"x": np.array([[1, 2], [3, 4]]), "c": np.arange(3), "s": np.array(5)}
    batch = runner.with_batch(feeds, free, 5)
    assert batch["x"].tolist() == [[1, 2], [3, 4], [1, 2], [3, 4], [1, 2]]
    assert batch["c"] is feeds["c"]
    assert batch["s"] is feeds["s"]
    fixed = [{"name": "x", "shape": [2, 2]}]
    assert runner.with_batch({"x": feeds["x"]}, fixed, 5) is None
    assert runner.with_batch({"x": feeds["x"]}, fixed, 2)["x"] is feeds["x"]


def identity(folder, name, dtype, inputs=("x",)):
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in inputs]
    infos = [helper.make_tensor_value_info(name, dtype, ["N"]) for name in inputs]
    outputs = [helper.make_tensor_value_info(f"{name}_out", dtype, ["N"]) for name in inputs]
    graph = helper.make_graph(nodes, "g", infos, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / f"{name}.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_inputs_are_fitted_to_the_float_types_of_a_baseline(tmp_path):
    ort = runner.import_runtime()
    session = runner.SessionSettings().open(ort, identity(tmp_path, "half", TensorProto.FLOAT16))
    feeds = runner.fit_feeds(session, {"x": np.ones(3, np.float32)})
    assert feeds["x"].dtype == np.float16
    other = runner.SessionSettings().open(ort, identity(tmp_path, "two", TensorProto.FLOAT, ("x", "y")))
    with pytest.raises(runner.WrongUsage, match="other inputs"):
        runner.fit_feeds(other, {"x": np.ones(3, np.float32)})


def test_a_bundle_as_baseline_is_checked_and_runs_with_its_own_options(bundle, tmp_path):
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    edit_manifest(other, lambda m: m["session_options"].update(graph_optimization_level="ORT_DISABLE_ALL"))
    shutil.rmtree(other / "runs")
    arguments = [
        "benchmark",
        "--baseline",
        str(other),
        *QUICK[:4],
        "--cold-starts",
        "0",
        "--energy-seconds",
        "0",
    ]
    code, result = run_main(bundle, *arguments)
    assert code == 0
    assert set(result["benchmark"]["comparisons"]) == {"baseline"}
    damage(other, "flipped")
    code, result = run_main(bundle, *arguments)
    assert code == 3
    assert str(other) in result["error"]["what"]


floats = st.floats(width=32) | st.sampled_from([0.0, 1.0, math.inf, math.nan])


@given(data=st.lists(st.tuples(floats, floats), min_size=1, max_size=8))
def test_differences_equal_those_that_the_tolerance_was_made_of(data):
    reference, candidate = (np.array(column, np.float32) for column in zip(*data, strict=True))
    found, expected = runner.difference(reference, candidate), difference(reference, candidate)
    assert found["cosine_distance"] == expected.cosine_distance
    assert found["relative_l2"] == expected.relative_l2
    whole = [np.nan_to_num(item, posinf=9, neginf=-9).astype(np.int64) for item in (reference, candidate)]
    found = runner.difference(*whole)
    assert found["mismatch_fraction"] == difference(*whole).mismatch_fraction
    assert found["max_abs_diff"] == max(abs(float(a) - float(b)) for a, b in zip(*whole, strict=True))


def test_text_outputs_are_compared_as_text():
    texts = np.array(["a", "b"], object)
    assert runner.difference(texts, texts)["mismatch_fraction"] == 0.0
    assert runner.difference(texts, np.array(["a", "c"], object)) == {
        "mismatch_fraction": 0.5,
        "max_abs_diff": None,
    }


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.floats(1e-6, 1e-3)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@given(
    value=st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=12)
)
def test_json_is_spelled_as_edgepress_spells_it(value):
    assert runner.dump_json(value).encode() == to_json(value)
    assert json.loads(runner.dump_json(value)) == value


def test_numbers_that_are_none_become_null():
    assert (
        runner.dump_json({"a": math.nan, "b": [math.inf]}) == '{\n  "a": null,\n  "b": [\n    null\n  ]\n}\n'
    )


def test_kept_runs_are_numbered_and_bound_to_the_bundle(bundle):
    opened = runner.open_bundle(bundle)
    payload = {"latency": {"p50_ms": 1.25e-05, "p99_ms": None}, "notes": ["ü \u2028 <"], "ratio": 1e22}
    names = [runner.keep_run(opened, payload).name for _ in range(2)]
    assert names == ["device.json", "device-2.json"]
    runs, problems = read_runs(bundle)
    assert problems == []
    assert runs["device-2.json"].payload == payload
    assert msgspec.to_builtins(runs["device.json"])["bundle"] == opened.digest
    text = (bundle / "runs" / "device.json").read_text(encoding="utf-8")
    (bundle / "runs" / "device.json").write_text(text.replace("1e22", "1e23"), encoding="utf-8")
    assert "contents have changed" in read_runs(bundle)[1][0]


def test_two_runs_at_once_are_noticed(bundle):
    arguments = ["scenario", "--scenario", "Offline", "--scenario-seconds", "0"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        try:
            other.bind("\0edgepress-device-runner")
        except OSError:
            pytest.skip("another test is measuring in another process")
        code, result = run_main(bundle, *arguments)
        assert code == 0
        assert any("another run" in note for note in result["notes"])
        _, checked = run_main(bundle, "check")
        assert checked["notes"] == []  # nothing is measured there


def test_marks_for_an_instruction_counter_do_no_harm():
    runner.mark_region(True, 7)
    runner.mark_region(False, 7)
