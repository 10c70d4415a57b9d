"""Small models on disk, and data for them, that the tests of driver/ compile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def _weight(rng, name, *shape, scale=None):
    fan = np.prod(shape[1:]) if len(shape) > 2 else shape[0]
    values = rng.standard_normal(shape) * (scale or 1 / np.sqrt(fan))
    return numpy_helper.from_array(values.astype(np.float32), name)


def _save(path, graph):
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def mlp(path: Path, *, outlier_layer: int | None = None, width: int = 64) -> Path:
    """x [N, T, width] -> three linear layers with Relu -> y; one layer may get an outlier channel."""
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for layer in range(3):
        matrix = rng.standard_normal((width, width)) / np.sqrt(width)
        if layer == outlier_layer:
            # One huge input channel stretches the activation's only scale: all others lose their bits.
            nodes.append(helper.make_node("Mul", [value, "stretch"], [f"s{layer}"], name=f"stretch{layer}"))
            stretch = np.ones(width)
            stretch[0] = 3000.0
            matrix[0] /= 3000.0
            weights.append(numpy_helper.from_array(stretch.astype(np.float32), "stretch"))
            value = f"s{layer}"
        weights += [
            numpy_helper.from_array(matrix.astype(np.float32), f"layer{layer}.weight"),
            _weight(rng, f"layer{layer}.bias", width, scale=0.1),
        ]
        nodes += [
            helper.make_node("MatMul", [value, f"layer{layer}.weight"], [f"m{layer}"], name=f"matmul{layer}"),
            helper.make_node("Add", [f"m{layer}", f"layer{layer}.bias"], [f"a{layer}"], name=f"add{layer}"),
        ]
        value = f"a{layer}"
        if layer < 2:
            nodes.append(helper.make_node("Relu", [value], [f"r{layer}"], name=f"relu{layer}"))
            value = f"r{layer}"
    nodes.append(helper.make_node("Identity", [value], ["y"], name="last"))
    shape = ["N", "T", width]
    return _save(
        path,
        helper.make_graph(
            nodes,
            "case",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
            weights,
        ),
    )


def cnn(path: Path, *, batch_norm: bool = False) -> Path:
    """image [N, 3, 16, 16] -> conv, relu, conv + residual, pool, classifier of 4 classes -> logits."""
    rng = np.random.default_rng(1)
    weights = [
        _weight(rng, "first.weight", 16, 3, 3, 3),
        _weight(rng, "first.bias", 16, scale=0.1),
        _weight(rng, "second.weight", 16, 16, 3, 3),
        _weight(rng, "second.bias", 16, scale=0.1),
        _weight(rng, "head.weight", 16, 4),
        _weight(rng, "head.bias", 4, scale=0.1),
    ]
    nodes = [
        helper.make_node("Conv", ["image", "first.weight", "first.bias"], ["c0"], name="first", pads=[1] * 4),
        helper.make_node("Relu", ["n0" if batch_norm else "c0"], ["r0"], name="relu0"),
        helper.make_node("Conv", ["r0", "second.weight", "second.bias"], ["c1"], name="second", pads=[1] * 4),
        helper.make_node("Add", ["c1", "r0"], ["s"], name="residual"),
        helper.make_node("Relu", ["s"], ["r1"], name="relu1"),
        helper.make_node("GlobalAveragePool", ["r1"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "head.weight", "head.bias"], ["logits"], name="head"),
    ]
    if batch_norm:
        statistics = {"gamma": 1.3, "beta": 0.2, "mean": 0.1, "variance": 0.7}
        weights += [
            numpy_helper.from_array(np.full(16, number, np.float32), name)
            for name, number in statistics.items()
        ]
        nodes.insert(1, helper.make_node("BatchNormalization", ["c0", *statistics], ["n0"], name="norm"))
    return _save(
        path,
        helper.make_graph(
            nodes,
            "case",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 16, 16])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 4])],
            weights,
        ),
    )


def vectors(path: Path, *, samples: int = 24, width: int = 64, seed: int = 3) -> str:
    """An .npz of samples for `mlp`, each of four rows."""
    rng = np.random.default_rng(seed)
    np.savez(path, x=rng.standard_normal((samples, 4, width)).astype(np.float32))
    return str(path)


def images(path: Path, *, samples: int = 40, seed: int = 4, labels: bool = False) -> str:
    """An .npz of images for `cnn`, with labels if asked for."""
    rng = np.random.default_rng(seed)
    arrays = {"image": rng.standard_normal((samples, 3, 16, 16)).astype(np.float32)}
    if labels:
        arrays["labels"] = rng.integers(0, 4, samples)
    np.savez(path, **arrays)
    return str(path)
