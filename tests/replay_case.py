"""Small quantized graphs for the tests of kernel replay, and a device that can be told to compute wrongly."""

import dataclasses
import io
import json
import zipfile
from types import SimpleNamespace

import export_case
import numpy as np
from edgepress.compress.emulate.integer import Affine, Quantized
from edgepress.export.bundle import write_bundle
from edgepress.runtimes import remote_replay
from edgepress.runtimes.replay import on_this_machine
from edgepress.runtimes.ssh_session import ProgramEnd
from edgepress.targets.host import read_host
from onnx import TensorProto, helper, numpy_helper


def model_of(folder, nodes, inputs, outputs, weights):
    """A model from nodes; inputs and outputs as name -> (type, shape)."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "quantized",
        [info(name, *kind) for name, kind in inputs.items()],
        [info(name, *kind) for name, kind in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return export_case.onnx_model(folder, graph)


def node(op, inputs, output, **attributes):
    outputs = output if isinstance(output, list) else [output]
    return helper.make_node(op, inputs, outputs, name=f"{outputs[0]}/{op}", **attributes)


def static_net(folder):
    """x[N,3,8,8] → Q → conv, relu → conv + shortcut → reshape → product → times a vector → y[N,5]."""
    rng = np.random.default_rng(0)
    small = np.float32
    weights = {
        "s": small(0.05), "z": np.uint8(120), "s2": small(0.08), "z2": np.uint8(0),
        "w1": rng.integers(-127, 128, (8, 3, 3, 3)).astype(np.int8), "w1s": np.full(8, 0.01, small),
        "w1z": np.zeros(8, np.int8), "b1": rng.integers(-500, 500, 8).astype(np.int32),
        "b1s": np.full(8, 0.0005, small),
        "w2": rng.integers(-127, 128, (8, 8, 1, 1)).astype(np.int8), "w2s": small(0.01), "w2z": np.int8(0),
        "shape": np.array([-1, 512]),
        "w3": rng.integers(-127, 128, (512, 5)).astype(np.int8), "w3s": small(0.002), "w3z": np.int8(0),
        "b3": rng.standard_normal(5).astype(small),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], "xq"),
        node("DequantizeLinear", ["xq", "s", "z"], "xd"),
        node("DequantizeLinear", ["w1", "w1s", "w1z"], "w1d", axis=0),
        node("DequantizeLinear", ["b1", "b1s"], "b1d", axis=0),
        node("Conv", ["xd", "w1d", "b1d"], "c", pads=[1, 1, 1, 1]),
        node("Relu", ["c"], "r"),
        node("QuantizeLinear", ["r", "s2", "z2"], "rq"),
        node("DequantizeLinear", ["rq", "s2", "z2"], "rd"),
        node("DequantizeLinear", ["w2", "w2s", "w2z"], "w2d"),
        node("Conv", ["rd", "w2d"], "e"),
        node("QuantizeLinear", ["e", "s2", "z"], "eq"),
        node("DequantizeLinear", ["eq", "s2", "z"], "ed"),
        node("Add", ["ed", "rd"], "a"),
        node("QuantizeLinear", ["a", "s2", "z"], "aq"),
        node("DequantizeLinear", ["aq", "s2", "z"], "ad"),
        node("Reshape", ["ad", "shape"], "f"),
        node("DequantizeLinear", ["w3", "w3s", "w3z"], "w3d"),
        node("MatMul", ["f", "w3d"], "m"),
        node("Mul", ["m", "b3"], "y"),
    ]
    inputs = {"x": (TensorProto.FLOAT, ["N", 3, 8, 8])}
    return model_of(folder, nodes, inputs, {"y": (TensorProto.FLOAT, ["N", 5])}, weights)


def dynamic_net(folder, *, twice=False):
    """x[N,32] → two products of one DynamicQuantizeLinear, added → a third → y[N,6]."""
    rng = np.random.default_rng(1)

    def product(name, data, width, depth):
        weights[f"{name}.w"] = rng.integers(-127, 128, (depth, width)).astype(np.int8)
        weights[f"{name}.s"] = np.full(width, 0.004, np.float32)
        weights[f"{name}.b"] = rng.standard_normal(width).astype(np.float32)
        return [
            node("MatMulInteger", [f"{data}.q", f"{name}.w", f"{data}.z"], f"{name}.i"),
            node("Cast", [f"{name}.i"], f"{name}.f", to=TensorProto.FLOAT),
            node("Mul", [f"{data}.s", f"{name}.s"], f"{name}.k"),
            node("Mul", [f"{name}.f", f"{name}.k"], f"{name}.p"),
            node("Add", [f"{name}.p", f"{name}.b"], f"{name}.y"),
        ]

    weights = {}
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["x.q", "x.s", "x.z"]),
        *product("one", "x", 24, 32),
        *product("two", "x", 24, 32),
        node("Add", ["one.y", "two.y"], "sum"),
        node("DynamicQuantizeLinear", ["sum"], ["sum.q", "sum.s", "sum.z"]),
        *product("last", "sum", 6, 24),
    ]
    if twice:  # two layers with the same numbers
        for part in "wsb":
            weights[f"two.{part}"] = weights[f"one.{part}"]
    inputs = {"x": (TensorProto.FLOAT, ["N", 32])}
    return model_of(folder, nodes, inputs, {"last.y": (TensorProto.FLOAT, ["N", 6])}, weights)


def bundle_of(model, folder):
    return write_bundle(export_case.contents_of(model, folder), folder / "bundle", overwrite=False)


def altered(archive, change):
    """An archive of outputs with `change(name, array)` applied to every array but the report."""
    out = io.BytesIO()
    with np.load(io.BytesIO(archive)) as stored, zipfile.ZipFile(out, "w") as written:
        for name in stored.files:
            array = stored[name]
            remote_replay.write(written, name, array if name == remote_replay.REPORT else change(name, array))
    return out.getvalue()


def request_of(files):
    return json.loads(files["request.json"].read_text())


def wrong_device(change):
    """A way to run jobs that alters what comes of them."""

    def runs(files, bundle):
        return altered(on_this_machine(files, bundle), change)

    return runs


class FakeDevice:
    """A device that is this machine, but for what `change` makes of its arrays; Pi-like in what it says."""

    def __init__(self, bundle, change=lambda _name, array: array, features=("asimd", "fphp", "asimdhp")):
        self.bundle, self.change = bundle, change
        self.features = frozenset(features)
        self.requests = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def put_bundle(self, bundle):
        return str(bundle)

    def run_program(self, files, words, *, result, limit_s, keep):
        assert result == "outputs.npz"
        assert limit_s > 0
        assert not keep
        assert words == ["{files}/remote_replay.py", "{files}/request.json", str(self.bundle)]
        self.requests.append(request_of(files))
        data = altered(on_this_machine(files, self.bundle), self.change)
        return ProgramEnd(status=0, result=data, told=(), elapsed_s=1.0, clock_jump_s=0.0)

    def host_facts(self):
        return dataclasses.replace(
            read_host(), architecture="aarch64", board="a fake", features=self.features
        )

    def python(self):
        return SimpleNamespace(runtime_version=read_host().runtime_version)


def with_sums(played, job, stage, kernel):
    """A played job with the result of its sum of two uint8 tensors (0.5 and 1.5 per step) by this kernel."""
    if not isinstance(job.model, bytes) or len(job.inputs) != 2:
        return played
    outputs = []
    for names in job.feeds:
        left, right = (np.load(stage.folder / name) for name in names)
        parts = [
            Quantized(values, np.float32(scale), np.uint8(128))
            for values, scale in ((left, 0.5), (right, 1.5))
        ]
        outputs.append((kernel(*parts, Affine(np.float32(1), np.uint8(0))),))
    return dataclasses.replace(played, outputs=tuple(outputs))
