"""Real networks through clean-up, fusion, plan and lowering: exact counts of integer kernels."""

import compress_case as case
import numpy as np
import pytest
from edgepress.compress.audit import audit
from edgepress.compress.lower import fusion_passes
from edgepress.graph.cleanup import exact_cleanup
from edgepress.graph.load import load_model
from edgepress.graph.passes import run_passes
from edgepress.graph.save import save_model
from edgepress.targets.registry import load_target

pytestmark = pytest.mark.slow


def lowered(path, target, tmp_path, **asked):
    profile = load_target(target)
    model = load_model(path)
    source = load_model(path)
    run_passes(model, exact_cleanup())
    run_passes(model, fusion_passes(model, profile, {}))
    plan = case.plan_of(model, profile, **asked)
    rng = np.random.default_rng(0)
    spec = model.inputs[0]
    shape = [size if isinstance(size, int) else 2 for size in spec.shape]
    feeds = [{spec.name: rng.standard_normal(shape).astype(np.float32)} for _ in range(3)]
    made = case.quantized(model, plan, feeds)
    save_model(made, tmp_path / "m.onnx")
    reference = np.concatenate([case.run(source, item)[0] for item in feeds])
    found = np.concatenate([case.run(made, item, optimise=True)[0] for item in feeds])
    return plan, audit(tmp_path / "m.onnx", plan, profile), reference, found


@pytest.mark.parametrize("target", [case.X86, case.ARM])
@pytest.mark.parametrize(
    ("file", "kernels"),
    [
        (
            "cifar10-resnet/resnet20.onnx",
            {"QLinearConv": 19, "QLinearAdd": 9, "Gemm": 1, "ReduceMean": 1, "Pad": 2, "Slice": 4}
            | {"QuantizeLinear": 1, "DequantizeLinear": 1, "Transpose": 2},
        ),
        (
            "mnist/cnn_mnist_pytorch.onnx",
            {"QLinearConv": 2, "NhwcMaxPool": 2, "Reshape": 1, "QGemm": 1, "FusedGemm": 1, "LogSoftmax": 1}
            | {"QLinearLeakyRelu": 2, "QuantizeLinear": 1, "DequantizeLinear": 1, "Transpose": 2},
        ),
        (
            "mnist/mnist_cntk_zoo.onnx",
            {"QLinearConv": 2, "NhwcMaxPool": 2, "Reshape": 1, "Gemm": 1}
            | {"QuantizeLinear": 1, "DequantizeLinear": 1, "Transpose": 2},
        ),
    ],
)
def test_integer_kernels_of_real_networks(file, kernels, target, data_folder, tmp_path):
    plan, result, reference, found = lowered(data_folder / file, target, tmp_path)
    assert result.silent_floats == ()
    assert result.unplanned == ()
    assert result.operators == kernels
    assert case.relative_l2(reference, found) < 0.1
    assert plan.integer_share() > 0.98
