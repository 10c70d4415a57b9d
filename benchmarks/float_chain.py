"""A made-up float model of about so many milliseconds, and a bundle of it, for what is about time alone."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

_ROWS, _WIDTH = 64, 512
_TRIAL_LAYERS, _TRIAL_RUNS = 4, 15
INPUT = "x"


def write_chain(path: Path, layers: int) -> None:
    """Write a chain of MatMul and Relu: x of shape (1, 64, 512), `layers` weights of shape (512, 512)."""
    draw = np.random.default_rng(0)
    nodes, weights, value = [], [], INPUT
    for layer in range(layers):
        array = draw.standard_normal((_WIDTH, _WIDTH)).astype(np.float32) * np.float32(2 / _WIDTH) ** 0.5
        weights.append(numpy_helper.from_array(array, f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [value, f"w{layer}"], [f"m{layer}"], name=f"matmul{layer}"))
        nodes.append(helper.make_node("Relu", [f"m{layer}"], [f"r{layer}"], name=f"relu{layer}"))
        value = f"r{layer}"
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [1, _ROWS, _WIDTH])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, [1, _ROWS, _WIDTH])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)


def chain_feeds() -> dict[str, np.ndarray]:
    """The chain's input, of shape (1, 64, 512)."""
    return {INPUT: np.random.default_rng(1).standard_normal((1, _ROWS, _WIDTH)).astype(np.float32)}


def open_session(path: Path) -> ort.InferenceSession:
    """A session with one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def model_of_about(path: Path, milliseconds: float) -> int:
    """Write a chain that takes about so long on one core here; how many layers that are."""
    write_chain(path, _TRIAL_LAYERS)
    session, feeds, taken = open_session(path), chain_feeds(), []
    for _ in range(_TRIAL_RUNS):
        started = time.perf_counter_ns()
        session.run(None, feeds)
        taken.append(time.perf_counter_ns() - started)
    each_ms = statistics.median(taken[_TRIAL_RUNS // 3 :]) / 1e6 / _TRIAL_LAYERS
    layers = max(1, round(milliseconds / each_ms))
    write_chain(path, layers)
    return layers
