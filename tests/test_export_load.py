"""Loading and running bundles: `load`, the manifest's rules, and the generated programs."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import export_case as case
import msgspec
import numpy as np
import onnxruntime
import pytest
from edgepress.export.load import load
from edgepress.export.manifest import (
    CONFIG_KEYS,
    DataRecord,
    decode_manifest,
    encode_manifest,
    manifest_schema,
    session_settings,
)
from edgepress.export.programs import programs
from edgepress.graph.errors import DataError, ModelError, VerifyFailed
from edgepress.graph.model import TensorSpec
from edgepress.runtimes.base import SessionOptions
from onnx import TensorProto, helper, numpy_helper

info = helper.make_tensor_value_info
CONFIG = {
    "session.intra_op.allow_spinning": "0",
    "optimization.disable_specified_optimizers": "GeluFusion;SkipLayerNormFusion",
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    return case.make_bundle(folder, level="ORT_ENABLE_BASIC", config=CONFIG)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A model with float32 [n, 3], int32 [n], bool [n] and text [n] inputs."""
    folder = tmp_path_factory.mktemp("mixed")
    names = {"x": (TensorProto.FLOAT, ["n", 3]), "count.0": (TensorProto.INT32, ["n"])}
    names |= {"flag": (TensorProto.BOOL, ["n"]), "word": (TensorProto.STRING, ["n"])}
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], [f"{name}_out"]) for name in names],
        "mixed",
        [info(name, *kind) for name, kind in names.items()],
        [info(f"{name}_out", *kind) for name, kind in names.items()],
    )
    contents = case.contents_of(case.onnx_model(folder, graph), folder)
    return case.write_bundle(contents, folder / "bundle", overwrite=False)


GOOD = {"x": [[1, 2, 0.1]], "count.0": [7], "flag": [True], "word": ["ü"]}


def test_call_takes_lists_and_arrays(bundle):
    with load(bundle) as model:
        assert [spec.name for spec in model.inputs] == ["input_ids", "attention_mask"]
        assert [spec.name for spec in model.outputs] == ["y"]
        listed = model(input_ids=[[1, 2, 3]], attention_mask=[[1, 1, 0]])["y"]
        arrays = model(
            input_ids=np.array([[1, 2, 3]], np.int32), attention_mask=np.array([[True, True, False]])
        )["y"]
    source = onnxruntime.InferenceSession(bundle / "model.onnx")
    feeds = {"input_ids": np.array([[1, 2, 3]]), "attention_mask": np.array([[1, 1, 0]])}
    np.testing.assert_allclose(listed, source.run(None, feeds)[0], rtol=1e-6)
    assert np.array_equal(listed, arrays)
    with pytest.raises(ModelError, match="closed"):
        model(input_ids=[[1]], attention_mask=[[1]])


def test_call_keeps_every_value(mixed):
    model = load(str(mixed), threads=2)
    outputs = model(**GOOD)
    assert outputs["x_out"].dtype == np.float32
    assert outputs["x_out"].tolist() == [[1, 2, np.float32(0.1)]]
    assert (outputs["count.0_out"].item(), outputs["flag_out"].item()) == (7, True)
    assert outputs["word_out"].tolist() == ["ü"]
    exact = model(**(GOOD | {"x": np.array([[1.5, -2, np.nan]]), "count.0": np.array([7.0])}))
    assert exact["x_out"].tolist()[0][:2] == [1.5, -2]
    assert np.isnan(exact["x_out"][0, 2])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": np.array([[1, 2, 0.1]])}, "takes float32, not float64"),
        ({"x": np.array([[1, 2, 1e300]])}, "takes float32, not float64"),
        ({"x": [["a", "b", "c"]]}, "takes float32"),
        ({"x": [[1, 2], [3]]}, "not a regular array"),
        ({"x": [1, 2, 3]}, "has 1 axes"),
        ({"x": [[1, 2]]}, "size 2"),
        ({"count.0": [2**40]}, "takes int32, not int64"),
        ({"count.0": [1.5]}, "takes int32, not float64"),
        ({"count.0": np.array([np.nan])}, "takes int32, not float64"),
        ({"flag": [2]}, "takes bool"),
        ({"word": [3]}, "takes string"),
        ({"count.0": [1, 2]}, "disagree about axis 'n'"),
        ({"cuont": [1]}, "not the model's inputs"),
    ],
)
def test_call_explains_what_does_not_fit(mixed, changed, message):
    model = load(mixed)
    with pytest.raises(DataError) as caught:
        model(**(GOOD | changed))
    assert message in str(caught.value)
    assert caught.value.remedy
    with pytest.raises(DataError, match="not the model's inputs"):
        model(x=[[1, 2, 3]])


def test_session_options_reach_the_session(bundle, monkeypatch):
    seen = []
    genuine = onnxruntime.InferenceSession

    def session(model, options, **rest):
        seen.append(options)
        return genuine(model, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    load(bundle)
    load(bundle, threads=2)
    for options in seen:
        assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        assert {key: options.get_session_config_entry(key) for key in CONFIG} == CONFIG
    assert [options.intra_op_num_threads for options in seen] == [1, 2]


def test_sums_are_checked_on_demand(bundle, tmp_path):
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    load(copy, verify_sums=True)
    (copy / "README.md").write_text("other")
    load(copy)
    with pytest.raises(VerifyFailed, match=r"README\.md: contents have changed"):
        load(copy, verify_sums=True)
    with pytest.raises(ModelError, match="not an edgepress bundle"):
        load(tmp_path)


def test_tokenizer_of_the_bundle(bundle, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", *["the", "quick", "brown", "fox"]]
    inner = tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(inner)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    assets = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps({"pad_token": "[PAD]", "name_or_path": "/home/x"}).encode(),
    }
    model = load(case.make_bundle(tmp_path, assets=assets))
    encoded = model.encode(["the quick fox", "fox"])
    assert list(encoded) == ["input_ids", "attention_mask"]
    assert encoded["input_ids"].tolist() == [[2, 3, 5], [5, 0, 0]]
    assert model(**encoded)["y"].shape == (2, 3, case.OUT)
    assert 'model.encode(["a sentence"])' in (model.path / "README.md").read_text()
    with pytest.raises(ModelError, match="no tokenizer"):
        load(bundle).encode(["the"])


def manifest_of(bundle):
    return decode_manifest((bundle / "manifest.json").read_bytes(), where="manifest.json")


def test_manifest_round_trip_and_form(bundle):
    data = (bundle / "manifest.json").read_bytes()
    assert encode_manifest(manifest_of(bundle)) == data
    values = json.loads(data)
    assert values["session_options"] == {"graph_optimization_level": "ORT_ENABLE_BASIC", "config": CONFIG}
    assert values["versions"]["onnxruntime"] == onnxruntime.__version__
    assert not re.search(rb"\d\d:\d\d:\d\d|20\d\d-\d\d-\d\d", data), "a time stamp"
    values["surprise"] = 1
    with pytest.raises(ModelError, match="not valid") as caught:
        decode_manifest(json.dumps(values).encode(), where="manifest.json")
    assert "surprise" in caught.value.why


def test_default_level_is_absent():
    for level in (None, "all", "ORT_ENABLE_ALL"):
        settings = session_settings(SessionOptions(graph_optimization_level=level))
        assert msgspec.json.encode(settings) == b'{"config":{}}'
        assert settings.options(threads=3) == SessionOptions(threads=3)


def test_only_what_every_language_can_set():
    with pytest.raises(ValueError, match="every language"):
        session_settings(SessionOptions(graph_optimization_level="layout"))
    for key in ("session.optimized_model_filepath", "ep.context_file_path", "made.up"):
        with pytest.raises(ValueError, match="not one that a bundle may set"):
            session_settings(SessionOptions(config={key: "1"}))
    for value in ("a\nb", "x" * 1025):
        with pytest.raises(ValueError, match="single line"):
            session_settings(SessionOptions(config={min(CONFIG_KEYS): value}))


def test_paths_have_no_place_in_a_manifest(bundle):
    values = json.loads((bundle / "manifest.json").read_text())
    record = DataRecord(name="calib.npz", digest="0", origin="real", split="calibrate", samples=1)
    for name in ("/data/calib.npz", "C:\\data", "~/calib.npz"):
        values["data"] = [msgspec.to_builtins(record) | {"name": name}]
        with pytest.raises(ModelError, match="not valid") as caught:
            decode_manifest(json.dumps(values).encode(), where="manifest.json")
        assert "path of one machine" in caught.value.why


def test_schema_describes_the_manifest(bundle):
    schema = manifest_schema()
    definition = schema["$defs"]["Manifest"]
    values = json.loads((bundle / "manifest.json").read_text())
    assert set(values) <= set(definition["properties"])
    assert set(definition["required"]) <= set(values)
    assert definition["additionalProperties"] is False


@pytest.mark.parametrize("golden", [True, False])
def test_python_program_runs_without_edgepress(tmp_path, golden):
    out = case.make_bundle(tmp_path, golden=golden, level="ORT_DISABLE_ALL", config=CONFIG)
    # -I keeps edgepress's checkout and the environment out; the program finds the bundle by itself.
    done = subprocess.run(
        [sys.executable, "-I", str(out / "snippets" / "run_python.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"y float32 [1, 16, {case.OUT}]\n"
    text = (out / "snippets" / "run_python.py").read_text()
    assert "edgepress" not in text
    assert len(text.splitlines()) <= 18


def test_python_program_honours_the_session_options(bundle, monkeypatch, capsys):
    seen = []
    genuine = onnxruntime.InferenceSession

    def session(model, options, **rest):
        seen.append(options)
        return genuine(model, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    runpy.run_path(str(bundle / "snippets" / "run_python.py"))
    assert capsys.readouterr().out.startswith("y float32")
    (options,) = seen
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert {key: options.get_session_config_entry(key) for key in CONFIG} == CONFIG


def test_compiled_programs_set_the_same_options(bundle):
    cpp = (bundle / "snippets" / "run_cpp.cc").read_text()
    csharp = (bundle / "snippets" / "RunCSharp.cs").read_text()
    assert "options.SetGraphOptimizationLevel(ORT_ENABLE_BASIC);" in cpp
    assert "options.GraphOptimizationLevel = GraphOptimizationLevel.ORT_ENABLE_BASIC;" in csharp
    for key, value in CONFIG.items():
        assert f'options.AddConfigEntry("{key}", "{value}");' in cpp
        assert f'options.AddSessionConfigEntry("{key}", "{value}");' in csharp
    assert (
        '["input_ids"] = OrtValue.CreateTensorValueFromMemory(new long[16], new long[] { 1, 16 })' in csharp
    )
    assert "@" not in cpp + csharp


def test_names_from_the_model_cannot_break_out_of_the_programs(bundle):
    manifest = manifest_of(bundle)
    name = 'x"); system("rm -rf"); //\\ü'
    spec = TensorSpec(name=name, dtype="float32", shape=(None, 3, "h", 8))
    model = msgspec.structs.replace(manifest.model, inputs=(spec,))
    made = programs(msgspec.structs.replace(manifest, model=model, golden=None))
    cpp, csharp = made["snippets/run_cpp.cc"].decode(), made["snippets/RunCSharp.cs"].decode()
    assert r'{"x\042); system(\042rm -rf\042); //\134\303\274"}' in cpp
    assert r'["x\"); system(\"rm -rf\"); //\\\u00fc"]' in csharp
    assert "{1, 3, 64, 8}" in cpp
    namespace = {"np": np}
    (line,) = [row for row in made["snippets/run_python.py"].decode().splitlines() if "np.zeros" in row]
    exec(line, namespace)
    assert {key: value.shape for key, value in namespace["feeds"].items()} == {name: (1, 3, 64, 8)}


def test_programs_leave_out_languages_that_lack_a_type(mixed):
    assert sorted(path.name for path in (mixed / "snippets").iterdir()) == ["run_python.py"]
    done = subprocess.run([sys.executable, "-I", str(mixed / "snippets/run_python.py")], check=False)
    assert done.returncode == 0


def test_cpp_program_compiles_and_runs(bundle, tmp_path):
    """With onnxruntime's headers (ONNXRUNTIME_INCLUDE) and a compiler, against the wheel's library."""
    headers, compiler = os.environ.get("ONNXRUNTIME_INCLUDE"), shutil.which("g++")
    libraries = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if not (headers and compiler and libraries):
        pytest.skip("needs g++, onnxruntime's library and its headers: set ONNXRUNTIME_INCLUDE")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (tmp_path / name).symlink_to(libraries[0])
    command = [compiler, "-std=c++17", "-Wall", "-Werror", str(bundle / "snippets/run_cpp.cc")]
    command += [f"-isystem{headers}", f"-L{tmp_path}", f"-Wl,-rpath,{tmp_path}", "-lonnxruntime"]
    subprocess.run([*command, "-o", str(tmp_path / "run")], check=True)
    done = subprocess.run([str(tmp_path / "run"), str(bundle)], capture_output=True, text=True, check=True)
    assert done.stdout == f"y 1 16 {case.OUT}\n"


def test_scalar_input(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "one"], ["y"])],
        "g",
        [info("x", TensorProto.FLOAT, [])],
        [info("y", TensorProto.FLOAT, [])],
        [numpy_helper.from_array(np.float32(1), "one")],
    )
    contents = case.contents_of(case.onnx_model(tmp_path, graph), tmp_path)
    out = case.write_bundle(contents, tmp_path / "bundle", overwrite=False)
    assert load(out)(x=2)["y"] == np.float32(3)
