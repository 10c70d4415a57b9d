"""The wheel, installed apart from the checkout, compiles and runs a bundle."""

import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

pytestmark = pytest.mark.slow


def run(argv, **options):
    done = subprocess.run(argv, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, copy_checkout):
    """A wheel built from the source distribution of a copy, as a release is; no network is used."""
    copy = copy_checkout(tmp_path_factory.mktemp("copy") / "edge-press")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)])
    (path,) = (copy / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(tmp_path_factory, wheel):
    """A folder with nothing but the installed wheel."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--no-index", "--no-deps", "--target", str(folder), str(wheel)])
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"edgepress", "edgepress-0.1.0.dist-info"}
    inner = {name.split("/")[1] for name in names if name.startswith("edgepress/")}
    assert not inner & {"tests", "docs", "demo", "benchmarks", "build"}
    for needed in ("py.typed", "targets/raspberry-pi-5.toml", "driver/cli.py", "graph/errors.py"):
        assert f"edgepress/{needed}" in names
    assert "edgepress-0.1.0.dist-info/licenses/LICENSE" in names


def model_file(folder):
    rng = np.random.default_rng(0)
    weights = {"w1": rng.normal(size=(16, 32)), "w2": rng.normal(size=(32, 4))}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w1"], ["h"], name="first"),
            helper.make_node("Relu", ["h"], ["r"], name="relu"),
            helper.make_node("MatMul", ["r", "w2"], ["y"], name="second"),
        ],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    np.savez(folder / "samples.npz", x=rng.normal(size=(40, 16)).astype(np.float32))
    np.savez(folder / "one.npz", x=rng.normal(size=(1, 16)).astype(np.float32))
    return weights


def test_an_installed_wheel_compiles_and_runs_a_bundle(installed, tmp_path):
    weights = model_file(tmp_path)
    # The folder of the wheel comes before site-packages, where the checkout may be installed editable.
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    own = {"cwd": tmp_path, "env": environment}
    edgepress = [sys.executable, str(installed / "bin" / "edgepress")]
    compiled = run(
        [
            *edgepress,
            "compile",
            "model.onnx",
            "--target",
            "host",
            "--calib",
            "samples.npz",
            "-o",
            "out",
            "--json",
        ],
        **own,
    )
    assert json.loads(compiled)["bundle"].endswith("out")
    run([*edgepress, "verify", "out"], **own)
    run([*edgepress, "run", "out", "--inputs", "one.npz", "-o", "y.npz"], **own)
    x = np.load(tmp_path / "one.npz")["x"]
    expected = np.maximum(x @ weights["w1"], 0) @ weights["w2"]
    found = np.load(tmp_path / "y.npz")["y"]
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)

    program = """
import json, sys
import numpy as np
import edgepress
outputs = edgepress.load("out")(x=np.load("one.npz")["x"])
files = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "edgepress"]
print(json.dumps({"y": outputs["y"].tolist(), "files": files}))
"""
    told = json.loads(run([sys.executable, "-c", program], **own))
    assert np.array_equal(np.array(told["y"], np.float32), found)
    assert len(told["files"]) > 10
    assert all(path.startswith(str(installed)) for path in told["files"])
