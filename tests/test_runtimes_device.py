"""The device seam: this machine runs, times and describes itself; forms may have inputs of their own."""

import numpy as np
import onnx_ir as ir
import pytest
from edgepress.graph.errors import DataError, ModelError
from edgepress.graph.model import Model, Origin
from edgepress.graph.save import save_model, to_bytes
from edgepress.runtimes.base import SessionOptions
from edgepress.runtimes.device import Device, DeviceFeatures, Form, LocalDevice
from edgepress.runtimes.timing import Schedule
from edgepress.targets.host import read_host

SHORT = Schedule(pairs=2, runs=3, warm_up_runs=1)
OPTIONS = SessionOptions()


def negation(dtype=ir.DataType.FLOAT):
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape([4]))
    node = ir.node("Neg", [x])
    node.outputs[0].name = "y"
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), ir.Shape([4])
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20})
    return Model(ir.Model(graph, ir_version=10), origin=Origin(kind="memory", name="negation"))


def test_this_machine_says_what_it_is():
    device: Device = LocalDevice()
    features, host = device.features(), read_host()
    assert device.evidence == "measured-on-target"
    assert (features.core, features.isa_features) == (host.core, tuple(sorted(host.features)))
    assert features.runtime_version == host.runtime_version
    assert isinstance(features, DeviceFeatures)


def test_a_file_is_put_and_run(tmp_path):
    files = save_model(negation(), tmp_path / "m.onnx")
    device = LocalDevice()
    there = device.put(files)
    x = np.arange(4, dtype=np.float32)
    np.testing.assert_array_equal(device.run(there, {"x": x}, OPTIONS)["y"], -x)
    with pytest.raises(ModelError, match="does not exist"):
        device.put([tmp_path / "absent.onnx"])


def test_forms_are_timed_against_the_first_with_inputs_of_their_own():
    x = np.ones(4, np.float32)
    forms = [
        Form(name="float", model=to_bytes(negation()), options=OPTIONS),
        Form(
            name="double",
            model=to_bytes(negation(ir.DataType.DOUBLE)),
            options=OPTIONS,
            feeds={"x": x.astype(np.float64)},
        ),
    ]
    told = []
    result = LocalDevice().time(forms, {"x": x}, SHORT, progress=lambda *done: told.append(done))
    assert [item.name for item in result.timings] == ["float", "double"]
    assert [item.candidate for item in result.comparisons] == ["double"]
    assert told == [(1, 2), (2, 2)]
    assert result.timing("float").throughput_per_s == pytest.approx(
        4000 / result.timing("float").mean_ms
    )  # four samples a run


def test_two_forms_of_one_name_are_refused():
    form = Form(name="a", model=to_bytes(negation()), options=OPTIONS)
    with pytest.raises(DataError, match="one name"):
        LocalDevice().time([form, form], {"x": np.ones(4, np.float32)}, SHORT)
