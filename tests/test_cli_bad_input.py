"""Bad input of every kind: a documented exit code, what to do on stderr, no trace, nothing left behind.

Every entry of KINDS makes one broken situation in an empty folder and says which command line runs
into it. All of them go through `main` in this process; what needs a process of its own (a full disk,
an interrupt) follows at the end.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass

import numpy as np
import pytest
from cli_case import calib_file, make_model, model_file, samples
from edgepress.driver.cli import main
from onnx import TensorProto, helper

KINDS = {}


@dataclass
class Case:
    """A command line, the exit code that it must end with, and a word that its message must hold."""

    argv: list
    code: int
    says: str


def kind(function):
    KINDS[function.__name__] = function
    return function


def compiling(folder, *extra, model=None, calib=None, target="host"):
    """A compile command line that is sound but for what the case breaks."""
    model = model if model is not None else model_file(folder)
    calib = calib if calib is not None else calib_file(folder)
    return [
        *("compile", model, "--target", target, "-o", folder / "out", "--skip", "benchmark"),
        *("--calib", calib, *extra),
    ]


# --- the model ---------------------------------------------------------------------------------


@kind
def missing_model_path(folder):
    model_file(folder)
    return Case(compiling(folder, model=folder / "modle.onnx"), 2, "model.onnx")


@kind
def directory_without_config(folder):
    (folder / "empty").mkdir()
    return Case(compiling(folder, model=folder / "empty"), 2, "config.json")


@kind
def file_of_another_format(folder):
    (folder / "model.tflite").write_bytes(b"TFL3" * 40)
    return Case(compiling(folder, model=folder / "model.tflite"), 2, ".onnx")


@kind
def hub_id_without_network(folder):
    return Case(compiling(folder, model="edgepress-tests/not-there"), 4, "edgepress-tests/not-there")


@kind
def truncated_model(folder):
    path = model_file(folder)
    path.write_bytes(path.read_bytes()[:-40])
    return Case(compiling(folder, model=path), 2, "model.onnx")


@kind
def wrong_magic(folder):
    path = folder / "model.onnx"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    return Case(compiling(folder, model=path), 2, "model.onnx")


@kind
def empty_model_file(folder):
    path = folder / "model.onnx"
    path.write_bytes(b"")
    return Case(compiling(folder, model=path), 2, "model.onnx")


@kind
def cyclic_graph(folder):
    nodes = [
        helper.make_node("Add", ["x", "b"], ["a"], name="one"),
        helper.make_node("Relu", ["a"], ["b"], name="two"),
        helper.make_node("MatMul", ["a", "w"], ["y"], name="three"),
    ]
    model = make_model(nodes=nodes, weights={"w": np.ones((64, 16), np.float32)})
    return Case(compiling(folder, model=model_file(folder, model)), 2, "model.onnx")


@kind
def duplicate_value_name(folder):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="one"),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="two"),
    ]
    model = make_model(nodes=nodes, weights={"w": np.ones((64, 16), np.float32)})
    return Case(compiling(folder, model=model_file(folder, model)), 2, "model.onnx")


@kind
def unknown_operator(folder):
    model = make_model(
        nodes=[helper.make_node("Frobnicate", ["x", "w"], ["y"], name="odd")],
        weights={"w": np.ones((64, 16), np.float32)},
    )
    return Case(compiling(folder, model=model_file(folder, model)), 2, "Frobnicate")


@kind
def operator_of_an_unknown_domain(folder):
    node = helper.make_node("Secret", ["x", "w"], ["y"], name="odd", domain="com.example")
    model = make_model(nodes=[node], weights={"w": np.ones((64, 16), np.float32)})
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    return Case(compiling(folder, model=model_file(folder, model)), 2, "com.example")


@kind
def operator_set_of_the_future(folder):
    model = make_model()
    model.opset_import[0].version = 999
    return Case(compiling(folder, model=model_file(folder, model)), 2, "999")


def external(folder, location):
    model = make_model()
    tensor = model.graph.initializer[0]
    raw = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(len(raw)))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return model_file(folder, model), raw


@kind
def missing_external_data(folder):
    path, _ = external(folder, "weights.bin")
    return Case(compiling(folder, model=path), 2, "weights.bin")


@kind
def truncated_external_data(folder):
    path, raw = external(folder, "weights.bin")
    (folder / "weights.bin").write_bytes(raw[:-8])
    return Case(compiling(folder, model=path), 2, "weights.bin")


@kind
def external_data_outside_the_folder(folder):
    (folder / "inner").mkdir()
    path, raw = external(folder / "inner", "../secret.bin")
    (folder / "secret.bin").write_bytes(raw)
    return Case(compiling(folder, model=path), 2, "secret.bin")


@kind
def external_data_behind_a_link(folder):
    (folder / "inner").mkdir()
    path, raw = external(folder / "inner", "weights.bin")
    (folder / "secret.bin").write_bytes(raw)
    (folder / "inner" / "weights.bin").symlink_to(folder / "secret.bin")
    return Case(compiling(folder, model=path), 2, "weights.bin")


@kind
def nan_weights(folder):
    weights = {"w1": np.full((64, 8), np.nan, np.float32), "w2": np.ones((8, 16), np.float32)}
    return Case(compiling(folder, model=model_file(folder, make_model(weights=weights))), 2, "w1")


# --- the data ----------------------------------------------------------------------------------


@kind
def no_data(folder):
    argv = ["compile", model_file(folder), "--target", "host", "-o", folder / "out"]
    return Case(argv, 2, "--calib")


@kind
def data_that_does_not_exist(folder):
    return Case(compiling(folder, calib=folder / "clib.npz"), 2, "clib.npz")


@kind
def wrong_input_names(folder):
    return Case(compiling(folder, calib=calib_file(folder, z=samples(), q=samples())), 2, "'x'")


@kind
def wrong_dtype(folder):
    return Case(compiling(folder, calib=calib_file(folder, x=np.ones((40, 64), np.int64))), 2, "int64")


@kind
def wrong_shape(folder):
    return Case(compiling(folder, calib=calib_file(folder, x=np.ones((40, 5), np.float32))), 2, "(40, 5)")


@kind
def nan_in_a_sample(folder):
    values = samples()
    values[11, 2] = np.nan
    return Case(compiling(folder, calib=calib_file(folder, x=values)), 2, "NaN")


@kind
def no_samples(folder):
    return Case(compiling(folder, calib=calib_file(folder, x=samples(0))), 2, "no samples")


@kind
def too_few_samples_to_split(folder):
    return Case(compiling(folder, calib=calib_file(folder, x=samples(1))), 2, "--eval")


@kind
def inputs_of_unequal_length(folder):
    model = make_model()
    model.graph.input.append(helper.make_tensor_value_info("k", TensorProto.FLOAT, ["N", 16]))
    model.graph.node[-1].output[0] = "m"
    model.graph.node.append(helper.make_node("Add", ["m", "k"], ["y"], name="sum"))
    calib = calib_file(folder, x=samples(40), k=np.ones((39, 16), np.float32))
    return Case(compiling(folder, model=model_file(folder, model), calib=calib), 2, "39")


@kind
def truncated_data_file(folder):
    path = calib_file(folder)
    path.write_bytes(path.read_bytes()[:-60])
    return Case(compiling(folder, calib=path), 2, "calib.npz")


@kind
def pickled_data(folder):
    path = calib_file(folder, x=np.array([{"a": 1}, {"b": 2}], dtype=object))
    return Case(compiling(folder, calib=path), 2, "calib.npz")


@kind
def data_archive_with_a_bomb(folder):
    # A header that claims more than the file holds must not make the reader allocate it.
    path = folder / "calib.npz"
    header = (
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (400000000000, 64), }".ljust(117)
        + b"\n"
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header)
    return Case(compiling(folder, calib=path), 2, "calib.npz")


@kind
def text_without_a_tokenizer(folder):
    (folder / "text.txt").write_text("one sentence\nanother sentence\n" * 20)
    return Case(compiling(folder, calib=folder / "text.txt"), 2, "tokenizer")


@kind
def generator_of_something_else(folder):
    return Case(compiling(folder, calib="os:listdir"), 2, "os:listdir")


@kind
def generator_that_does_not_exist(folder):
    return Case(compiling(folder, calib="os:lisdir"), 2, "lisdir")


@kind
def data_of_another_format(folder):
    (folder / "calib.parquet").write_bytes(b"PAR1" * 10)
    return Case(compiling(folder, calib=folder / "calib.parquet"), 2, ".npz")


# --- the options -------------------------------------------------------------------------------


@kind
def unknown_target(folder):
    return Case(compiling(folder, target="rasberry-pi-5"), 2, "raspberry-pi-5")


@kind
def target_file_with_an_unknown_key(folder):
    (folder / "board.toml").write_text('base = "raspberry-pi-5"\nname = "mine"\ncolour = "red"\n')
    return Case(compiling(folder, target=folder / "board.toml"), 2, "colour")


@kind
def unknown_target_field(folder):
    return Case(compiling(folder, "--set", "target.default_thread=2"), 2, "did you mean default_threads")


@kind
def target_field_of_the_wrong_type(folder):
    return Case(compiling(folder, "--set", "target.default_threads=many"), 2, "got `str`")


@kind
def malformed_drift_limit(folder):
    return Case(compiling(folder, "--max-drift", "cosine=1%%"), 2, "drift limit")


@kind
def unknown_drift_metric(folder):
    return Case(compiling(folder, "--max-drift", "cosin=1%"), 2, "cosine")


@kind
def metric_that_needs_labels(folder):
    return Case(compiling(folder, "--max-drift", "accuracy=1%"), 2, "labels")


@kind
def bad_regular_expression(folder):
    return Case(compiling(folder, "--keep-float", "layer[0"), 2, "layer[0")


@kind
def malformed_shape(folder):
    return Case(compiling(folder, "--shape", "x:1xN"), 2, "x:1xN")


@kind
def shape_of_an_unknown_input(folder):
    return Case(compiling(folder, "--shape", "z:1x64"), 2, "'x'")


@kind
def shape_that_the_model_does_not_take(folder):
    return Case(compiling(folder, "--shape", "x:1x5"), 2, "64")


@kind
def unknown_option(folder):
    return Case(compiling(folder, "--precison", "int8"), 2, "--precision")


@kind
def unknown_stage_to_skip(folder):
    return Case([*compiling(folder), "--skip", "verify"], 2, "verify")


@kind
def precision_that_the_target_has_no_kernels_for(folder):
    return Case(compiling(folder, "--precision", "bf16-compute"), 4, "bfloat16")


@kind
def recipe_with_an_unknown_key(folder):
    (folder / "recipe.toml").write_text('target = "host"\nprecison = "int8"\n')
    return Case(compiling(folder, "--recipe", folder / "recipe.toml"), 2, "precision")


@kind
def recipe_of_a_newer_schema(folder):
    (folder / "recipe.toml").write_text('schema_version = 2\ntarget = "host"\n')
    return Case(compiling(folder, "--recipe", folder / "recipe.toml"), 2, "upgrade")


# --- the output --------------------------------------------------------------------------------


@kind
def existing_output(folder):
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("keep")
    return Case(compiling(folder), 2, "--overwrite")


@kind
def existing_output_that_is_no_bundle(folder):
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("keep")
    return Case(compiling(folder, "--overwrite"), 2, "out")


@kind
def output_through_a_file(folder):
    (folder / "file").write_text("keep")
    argv = compiling(folder)
    argv[argv.index("-o") + 1] = folder / "file" / "out"
    return Case(argv, 2, "file")


@kind
def output_where_nothing_can_be_made(folder):
    # Tests may run as root, whom permissions do not stop: the kernel's own tree refuses everybody.
    argv = compiling(folder)
    argv[argv.index("-o") + 1] = "/proc/edgepress/out"
    return Case(argv, 2, "/proc")


@kind
def no_output_named(folder):
    return Case(["compile", model_file(folder), "--target", "host", "--data-free"], 2, "-o")


# --- ranges of shapes, presets, calibration caches, Hugging Face datasets -------------------------


@kind
def range_of_two_shapes(folder):
    return Case(compiling(folder, "--shape", "x:1x64:8x64"), 2, "MIN:OPT:MAX")


@kind
def range_in_the_wrong_order(folder):
    return Case(compiling(folder, "--shape", "x:1x64:8x64:4x64"), 2, "the least size comes first")


@kind
def range_over_an_axis_that_the_model_fixes(folder):
    return Case(compiling(folder, "--shape", "x:1x32:1x64:4x64"), 2, "1x32")


@kind
def range_that_two_inputs_contradict(folder):
    argv = compiling(folder, "--shape", "x:1x4:1x8:2x16", "--shape", "m:1x4:1x8:2x32", model=lengths(folder))
    return Case(argv, 2, "'T' has two sizes")


@kind
def data_outside_the_range(folder):
    data = calib_file(folder, x=np.ones((4, 9), np.float32), m=np.ones((4, 9), np.float32))
    argv = compiling(folder, "--shape", "x:1x2:1x4:4x8", model=lengths(folder), calib=data)
    return Case(argv, 2, "1x9")


@kind
def range_beyond_what_the_model_runs_at(folder):
    data = calib_file(folder, x=samples(4)[:, :8], m=samples(4)[:, 8:16])
    argv = compiling(folder, "--shape", "x:1x8:1x8:1x12", model=lengths(folder, most=8), calib=data)
    return Case(argv, 2, "largest shapes")


def lengths(folder, most=None):
    """x[N,T] + m[N,T] → y; with `most`, a constant that only lets T = most through."""
    nodes = [helper.make_node("Add", ["x", "m"], ["s"]), helper.make_node("Relu", ["s"], ["y"])]
    weights = {}
    if most is not None:
        nodes[1] = helper.make_node("Mul", ["s", "w"], ["y"])
        weights = {"w": np.ones((1, most), np.float32)}
    model = make_model(nodes=nodes, weights=weights or {"w": np.ones(1, np.float32)})
    del model.graph.input[:], model.graph.output[:]
    for name, place in (("x", model.graph.input), ("m", model.graph.input), ("y", model.graph.output)):
        place.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", "T"]))
    return model_file(folder, model)


@kind
def unknown_preset(folder):
    return Case(compiling(folder, "--preset", "quik"), 2, "quick")


@kind
def rounds_of_nothing(folder):
    return Case(compiling(folder, "--rounds", "0"), 2, "from 1 upwards")


@kind
def calibration_cache_that_is_none(folder):
    (folder / "ranges.json").write_text("[1, 2]")
    return Case(compiling(folder, "--calib-cache", folder / "ranges.json"), 2, "no calibration cache")


@kind
def calibration_cache_of_the_future(folder):
    (folder / "ranges.json").write_text('{"schema_version": 99}')
    return Case(compiling(folder, "--calib-cache", folder / "ranges.json"), 2, "schema version 99")


@kind
def calibration_cache_in_no_folder(folder):
    return Case(compiling(folder, "--calib-cache", folder / "no" / "ranges.json"), 2, "folder")


@kind
def neither_a_calibration_cache_nor_data(folder):
    argv = ["compile", model_file(folder), "--target", "host", "-o", folder / "out"]
    return Case([*argv, "--calib-cache", folder / "ranges.json"], 2, "neither")


def cached(folder, **changes):
    """A calibration cache of the sound compile with some of its entries changed."""
    argv = compiling(folder, "--calib-cache", folder / "ranges.json", "-q", target="raspberry-pi-4")
    assert main([str(word) for word in [*argv, "--quantization", "static", "--max-drift", "100%"]]) == 0
    shutil.rmtree(folder / "out")
    known = json.loads((folder / "ranges.json").read_text())
    (folder / "ranges.json").write_text(json.dumps(known | changes))
    extra = ("--calib-cache", folder / "ranges.json", "--quantization", "static")
    return compiling(folder, *extra, target="raspberry-pi-4")


@kind
def calibration_cache_of_another_model(folder):
    return Case(cached(folder, model_sha256="0" * 64), 2, "another model")


@kind
def calibration_cache_of_other_data(folder):
    argv = cached(folder)
    calib_file(folder, x=samples(39))
    return Case(argv, 2, "other data")


@kind
def calibration_cache_of_another_method(folder):
    return Case([*cached(folder), "--calib-method", "minmax"], 2, "--calib-method auto, not minmax")


@kind
def calibration_cache_of_another_runtime(folder):
    return Case(cached(folder, versions={"onnxruntime": "1.2.3"}), 2, "onnxruntime 1.2.3")


@kind
def calibration_cache_without_a_tensor(folder):
    return Case(cached(folder, ranges={"x": {"min": -1.0, "max": 1.0}}), 2, "nothing about")


@kind
def calibration_cache_with_a_range_that_is_none(folder):
    return Case(cached(folder, ranges={"x": {"min": 2.0, "max": 1.0}}), 2, "no range")


@kind
def dataset_name_that_is_none(folder):
    return Case(compiling(folder, calib="hf:a:b:c:d"), 2, "hf:NAME")


@kind
def dataset_role_that_is_none(folder):
    return Case(compiling(folder, calib="hf:owner/name,texts=body"), 2, "'texts=body'")


@kind
def dataset_without_network(folder):
    pytest.importorskip("datasets")
    return Case(compiling(folder, calib="hf:edgepress-tests/not-there"), 4, "hf download")


@kind
def dataset_folder_that_is_not_there(folder):
    pytest.importorskip("datasets")
    return Case(compiling(folder, calib=f"hf:{folder}/not-there"), 2, "no such dataset")


@kind
def dataset_split_that_is_not_there(folder):
    pytest.importorskip("datasets")
    (folder / "texts").mkdir()
    (folder / "texts" / "train.jsonl").write_text('{"text": "a"}\n')
    return Case(compiling(folder, calib=f"hf:{folder}/texts:tset"), 2, "'train'")


# --- other commands ----------------------------------------------------------------------------


@kind
def verify_what_is_no_bundle(folder):
    (folder / "thing").mkdir()
    return Case(["verify", folder / "thing"], 2, "bundle")


@kind
def inspect_what_does_not_exist(folder):
    return Case(["inspect", folder / "nothing.onnx"], 2, "nothing.onnx")


@kind
def drift_without_data(folder):
    return Case(["drift", model_file(folder), model_file(folder)], 2, "--data")


@kind
def drift_between_models_with_other_outputs(folder):
    other = make_model()
    other.graph.output[0].name = other.graph.node[-1].output[0] = "z"
    argv = [
        "drift",
        model_file(folder),
        model_file(folder, other, "other.onnx"),
        "--data",
        calib_file(folder),
    ]
    return Case(argv, 2, "z")


@kind
def show_an_unknown_target(folder):  # noqa: ARG001
    return Case(["targets", "show", "hots"], 2, "host")


@kind
def benchmark_what_does_not_exist(folder):
    return Case(["benchmark", folder / "nothing"], 2, "nothing")


def tree(folder):
    """Every path under a folder with its content: what must be the same afterwards."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def test_there_are_enough_kinds():
    assert len(KINDS) >= 25


@pytest.mark.parametrize("name", list(KINDS))
def test_bad_input(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = KINDS[name](tmp_path)
    before = tree(tmp_path)
    capsys.readouterr()  # what making the case has printed
    code = main([str(word) for word in case.argv])
    printed = capsys.readouterr()
    assert code == case.code, printed.err
    assert "Traceback" not in printed.err
    assert "bug in edgepress" not in printed.err
    assert case.says in printed.err
    assert any(line.startswith("  do:    ") for line in printed.err.splitlines()), printed.err
    assert printed.out == ""
    assert tree(tmp_path) == before


def test_a_drift_limit_that_is_not_met_shows_the_figures(tmp_path, capsys):
    other = model_file(tmp_path, make_model(seed=5), "other.onnx")
    argv = ["drift", model_file(tmp_path), other, "--data", calib_file(tmp_path), "--max-drift", "l2=1%"]
    assert main([str(word) for word in argv]) == 3
    printed = capsys.readouterr()
    assert "the drift limit on l2 is not met" in printed.err
    assert "NO" in printed.out


# --- a bundle that was tampered with -----------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """One sound bundle that the tests below copy before they damage it."""
    folder = tmp_path_factory.mktemp("bundle")
    assert main([str(word) for word in compiling(folder)]) == 0
    return folder / "out"


def copied(bundle, tmp_path):
    copy = tmp_path / "copy"
    for path in sorted(bundle.rglob("*")):
        place = copy / path.relative_to(bundle)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    return copy


def test_a_sound_bundle_verifies(bundle, tmp_path, capsys):
    assert main(["verify", str(copied(bundle, tmp_path))]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["model.onnx", "manifest.json", "recipe.toml", "plan.json", "drift.json", "SHA256SUMS"]
)
def test_a_flipped_byte_is_found(bundle, tmp_path, capsys, name):
    copy = copied(bundle, tmp_path)
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    assert main(["verify", str(copy)]) == 3
    printed = capsys.readouterr().err
    assert "\n  do:    " in printed
    assert "Traceback" not in printed


def test_a_file_that_was_added_or_removed_is_found(bundle, tmp_path, capsys):
    copy = copied(bundle, tmp_path)
    (copy / "extra.txt").write_text("hello")
    assert main(["verify", str(copy)]) == 3
    (copy / "extra.txt").unlink()
    (copy / "plan.json").unlink()
    assert main(["verify", str(copy)]) == 3
    assert "plan.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"z": np.ones((1, 64), np.float32), "q": np.ones(3)}, "x"),
        ({"x": np.ones((1, 5), np.float32)}, "5"),
        ({"x": np.array([["a"] * 64])}, "x"),
        ({}, "x"),
    ],
)
def test_run_refuses_inputs_that_do_not_fit(bundle, tmp_path, capsys, arrays, says):
    np.savez(tmp_path / "in.npz", **arrays)
    assert (
        main(["run", str(bundle), "--inputs", str(tmp_path / "in.npz"), "-o", str(tmp_path / "o.npz")]) == 2
    )
    printed = capsys.readouterr().err
    assert says in printed
    assert "\n  do:    " in printed
    assert not (tmp_path / "o.npz").exists()


# --- what needs a process of its own -----------------------------------------------------------


def in_a_process(argv, folder, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "edgepress", *(str(word) for word in argv)],
        cwd=folder,
        # Temporary files count as left behind too.
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_full_disk_leaves_nothing(tmp_path):
    argv = compiling(tmp_path, model=model_file(tmp_path, make_model(width=8_000)))
    before = tree(tmp_path)
    # The weights take 2.6 MB in float and 0.6 MB in int8; no file may grow beyond 0.1 MB.
    process = in_a_process(
        argv, tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    )
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 2, printed
    assert "\n  do:    " in printed
    assert "Traceback" not in printed
    assert tree(tmp_path) == before


STOPPING_DATA = """
import pathlib, time
import numpy as np
passes = 0
def samples():
    global passes
    passes += 1
    for number in range(8):
        yield {"x": np.full((1, 64), number, np.float32)}
    if passes >= int(pathlib.Path("stop-in-pass").read_text()):
        pathlib.Path("stopped").touch()
        # In short steps: a signal that comes just before a sleep begins is seen when it ends.
        for step in range(1200):
            time.sleep(0.1)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stop_in_pass", [1, 3])
def test_an_interrupt_leaves_nothing(tmp_path, number, stop_in_pass):
    """Interrupted while the data is read first, and while drift is measured, with files written."""
    model = model_file(tmp_path, make_model(width=16))
    (tmp_path / "stopping.py").write_text(STOPPING_DATA)
    (tmp_path / "stop-in-pass").write_text(str(stop_in_pass))
    argv = compiling(tmp_path, "-v", model=model, calib="stopping:samples")
    before = tree(tmp_path)
    # Tests that are run in the background ignore Ctrl-C, and their children inherit that.
    process = in_a_process(
        argv, tmp_path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    )
    while not (tmp_path / "stopped").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    os.kill(process.pid, number)
    out, printed = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert "interrupted" in printed
    assert "Traceback" not in printed
    assert out == ""
    (tmp_path / "stopped").unlink()
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    assert tree(tmp_path) == before
