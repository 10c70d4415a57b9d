"""Small models and data for the tests of the command line."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper


def make_model(width=64, weights=None, nodes=None, seed=0):
    """x[N,64] → MatMul → Relu → MatMul → y[N,16], large enough to be worth quantizing."""
    rng = np.random.default_rng(seed)
    weights = weights or {
        "w1": rng.normal(size=(64, width)).astype(np.float32),
        "w2": rng.normal(size=(width, 16)).astype(np.float32),
    }
    nodes = nodes or [
        helper.make_node("MatMul", ["x", "w1"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "w2"], ["y"], name="second"),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 16])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def model_file(folder, model=None, name="model.onnx"):
    path = folder / name
    path.write_bytes((model or make_model()).SerializeToString())
    return path


def samples(count=40):
    return np.random.default_rng(1).normal(size=(count, 64)).astype(np.float32)


def calib_file(folder, **arrays):
    path = folder / "calib.npz"
    np.savez(path, **(arrays or {"x": samples()}))
    return path
