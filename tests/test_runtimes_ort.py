"""onnxruntime sessions: what they give, what they refuse and how they explain it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from edgepress.graph.errors import DataError, EdgepressError, ModelError, NotSupported, RuntimeUnavailable
from edgepress.graph.model import Model, Origin, TensorSpec
from edgepress.graph.save import to_bytes
from edgepress.runtimes import ort_runtime
from edgepress.runtimes.base import SessionOptions
from edgepress.runtimes.ort_runtime import OrtSession, measure_limits, optimised_graph, runtime_version
from edgepress.targets.registry import load_target

_LINEAR = """
<ir_version: 9, opset_import: ["" : 17]>
linear (float[batch, 4] x) => (float[batch, 3] y, float[batch, 3] z)
{
  y = MatMul (x, w)
  z = Relu (y)
}
"""


def _model(text: str, **weights: np.ndarray) -> Model:
    parsed = ir.from_onnx_text(
        text, initializers=[ir.Tensor(value, name=name) for name, value in weights.items()]
    )
    return Model(parsed, origin=Origin(kind="memory", name="test"))


def _linear() -> tuple[Model, np.ndarray]:
    weight = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    return _model(_LINEAR, w=weight), weight


def test_run_gives_outputs_by_name() -> None:
    model, weight = _linear()
    session = OrtSession.from_model(model)
    x = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    outputs = session.run({"x": x})
    assert list(outputs) == ["y", "z"]
    np.testing.assert_allclose(outputs["y"], x @ weight, rtol=1e-5)
    np.testing.assert_array_equal(outputs["z"], np.maximum(outputs["y"], 0))
    assert list(session.run({"x": x}, ["z"])) == ["z"]
    assert session.load_ms > 0
    assert session.inputs == (TensorSpec(name="x", dtype="float32", shape=("batch", 4)),)
    assert [spec.name for spec in session.outputs] == ["y", "z"]


def test_path_bytes_and_model_agree(tmp_path: Path) -> None:
    model, _ = _linear()
    path = tmp_path / "m.onnx"
    path.write_bytes(to_bytes(model))
    x = np.ones((2, 4), np.float32)
    expected = OrtSession.from_model(model).run({"x": x})["y"]
    for source in (path, to_bytes(model)):
        np.testing.assert_array_equal(OrtSession(source).run({"x": x})["y"], expected)


def test_large_weights_go_through_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ort_runtime, "INLINE_LIMIT_BYTES", 16)
    monkeypatch.setattr(ort_runtime.tempfile, "tempdir", str(tmp_path))
    model, weight = _linear()
    session = OrtSession.from_model(model)
    assert list(tmp_path.iterdir()) == []
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(session.run({"x": x})["y"], x @ weight, rtol=1e-5)


@pytest.mark.parametrize(
    ("feeds", "where", "text"),
    [
        ({}, "x", "missing: x"),
        ({"X": np.ones((1, 4), np.float32)}, "x", "rename X -> x"),
        ({"x": np.ones((1, 4), np.float32), "extra": np.ones(1)}, "extra", "not an input: extra"),
        ({"x": np.ones((1, 4))}, "x", "float64"),
        ({"x": np.ones((1, 4), np.int64)}, "x", "astype('float32')"),
        ({"x": np.ones(4, np.float32)}, "x", "float32[batch, 4]"),
        ({"x": np.ones((1, 5), np.float32)}, "x", "size 5 instead of 4"),
        ({"x": np.array([["a"] * 4])}, "x", "string"),
    ],
)
def test_wrong_inputs_say_what_is_expected(feeds: dict[str, np.ndarray], where: str, text: str) -> None:
    session = OrtSession.from_model(_linear()[0])
    with pytest.raises(DataError) as caught:
        session.run(feeds)
    assert caught.value.where == where
    assert text in str(caught.value)
    assert caught.value.remedy


def test_an_unknown_output_is_named() -> None:
    with pytest.raises(DataError, match="'q'"):
        OrtSession.from_model(_linear()[0]).run({"x": np.ones((1, 4), np.float32)}, ["q"])


def test_scalars_strings_and_unknown_ranks_run() -> None:
    scalar = _model(
        """
        <ir_version: 9, opset_import: ["" : 17]>
        g (float x, string[n] s) => (float y, string[n] t)
        { y = Neg (x)
          t = Identity (s) }
        """
    )
    session = OrtSession.from_model(scalar)
    assert session.inputs[0].shape == ()
    outputs = session.run({"x": np.array(2, np.float32), "s": np.array(["a", "b"])})
    assert outputs["y"] == -2
    assert list(outputs["t"]) == ["a", "b"]
    with pytest.raises(DataError, match="axes"):
        session.run({"x": np.ones(3, np.float32), "s": np.array(["a"])})
    assert OrtSession(to_bytes(scalar)).inputs[0].shape is None


@pytest.mark.parametrize(
    ("text", "error", "where"),
    [
        ("g (float[1] x) => (float[1] y) { [the_node] y = Nope (x) }", ModelError, "Nope"),
        (
            "g (bfloat16[2,2] x) => (bfloat16[2,2] y) { [the_node] y = MatMul (x, x) }",
            RuntimeUnavailable,
            "the_node",
        ),
    ],
)
def test_refused_models_name_the_node(text: str, error: type[EdgepressError], where: str) -> None:
    model = _model(f'<ir_version: 9, opset_import: ["" : 17]>\n{text}')
    with pytest.raises(error) as caught:
        OrtSession.from_model(model)
    assert where in (caught.value.where or "")
    assert caught.value.remedy


def test_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        OrtSession(tmp_path / "none.onnx")
    for content in (b"", b"not a model", to_bytes(_linear()[0])[:-20]):
        path = tmp_path / "bad.onnx"
        path.write_bytes(content)
        with pytest.raises(ModelError):
            OrtSession(path)


def test_a_failing_node_is_named() -> None:
    model = _model(
        """
        <ir_version: 9, opset_import: ["" : 17]>
        g (float[a, b] x, float[c, d] w) => (float[a, d] y) { [product] y = MatMul (x, w) }
        """
    )
    session = OrtSession.from_model(model)
    with pytest.raises(ModelError) as caught:
        session.run({"x": np.ones((2, 3), np.float32), "w": np.ones((2, 3), np.float32)})
    assert "'product' (MatMul)" in (caught.value.where or "")
    assert "/onnxruntime" not in str(caught.value)


def test_inputs_that_are_no_tensors_are_not_supported() -> None:
    model = _model(
        """
        <ir_version: 9, opset_import: ["" : 17]>
        g (seq(float[1]) x, int64 i) => (float[1] y) { y = SequenceAt (x, i) }
        """
    )
    with pytest.raises(NotSupported, match="not a tensor"):
        OrtSession.from_model(model)


def test_running_out_of_memory_is_said() -> None:
    model = _model(
        """
        <ir_version: 9, opset_import: ["" : 17]>
        g (int64[n] shape) => (float[k] y) { y = ConstantOfShape (shape) }
        """
    )
    with pytest.raises(RuntimeUnavailable, match="memory"):
        OrtSession.from_model(model).run({"shape": np.array([1 << 50], np.int64)})


def test_options_reach_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    seen: dict[str, object] = {"with_config": True}
    original = onnxruntime.InferenceSession

    def spy(model: object, settings: onnxruntime.SessionOptions, **more: object) -> object:
        seen.update(more, threads=settings.intra_op_num_threads, level=settings.graph_optimization_level)
        if "with_config" in seen:
            seen["config"] = settings.get_session_config_entry("session.qdqisint8allowed")
        return original(model, settings, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    config = {"session.qdqisint8allowed": "1"}
    for level in ("basic", "ORT_ENABLE_BASIC"):
        OrtSession.from_model(
            _linear()[0], SessionOptions(threads=2, graph_optimization_level=level, config=config)
        )
        assert seen["level"] == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert (seen["threads"], seen["config"], seen["providers"]) == (2, "1", ["CPUExecutionProvider"])
    del seen["with_config"]
    OrtSession.from_model(_linear()[0])
    assert seen["level"] == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL


def test_threads_must_be_positive() -> None:
    with pytest.raises(ValueError, match="threads"):
        SessionOptions(threads=0)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    session = OrtSession.from_model(_linear()[0])
    with pytest.raises(EdgepressError):
        OrtSession(b"junk")
    session.run({"x": np.ones((1, 4), np.float32)})
    assert capfd.readouterr() == ("", "")


def _quantized(dtype: str) -> Model:
    """x -> Q/DQ -> MatMul with int8 weights, big enough for its weight to leave the graph."""
    rng = np.random.default_rng(0)
    zero = np.array(0 if dtype == "int8" else 128, dtype)
    return _model(
        """
        <ir_version: 9, opset_import: ["" : 17]>
        g (float[n, 128] x) => (float[n, 128] y)
        {
          q = QuantizeLinear (x, s, z)
          d = DequantizeLinear (q, s, z)
          v = DequantizeLinear <axis = 1> (w, ws, wz)
          y = MatMul (d, v)
        }
        """,
        s=np.array(0.02, np.float32),
        z=zero,
        w=rng.integers(-127, 128, (128, 128)).astype(np.int8),
        ws=np.full(128, 0.01, np.float32),
        wz=np.zeros(128, np.int8),
    )


def test_optimised_graph_shows_the_integer_kernel_and_keeps_no_weights() -> None:
    config = load_target("raspberry-pi-5").audit_config
    optimised = optimised_graph(_quantized("int8"), SessionOptions(config=config))
    kinds = [node.op_type for node in optimised.graph]
    assert "MatMulIntegerToFloat" in kinds
    assert "MatMul" not in kinds
    weights = [
        value for value in optimised.graph.initializers.values() if value.shape and value.shape.rank() == 2
    ]
    assert weights
    assert all(value.const_value is None for value in weights)
    scales = [
        value.const_value for value in optimised.graph.initializers.values() if value.const_value is not None
    ]
    assert any(np.allclose(tensor.numpy(), 0.02) for tensor in scales if tensor.size == 1)


def test_optimised_graph_without_optimization_is_the_graph() -> None:
    options = SessionOptions(graph_optimization_level="disable_all")
    kinds = [node.op_type for node in optimised_graph(_quantized("uint8"), options).graph]
    assert kinds.count("DequantizeLinear") == 2
    assert "MatMul" in kinds


def test_optimised_graph_leaves_no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ort_runtime.tempfile, "tempdir", str(tmp_path))
    optimised_graph(to_bytes(_linear()[0]))
    with pytest.raises(ModelError):
        optimised_graph(b"junk")
    assert list(tmp_path.iterdir()) == []


def test_profiles_state_the_limits_of_the_installed_runtime() -> None:
    runtime = load_target("x86-64").runtime
    if runtime.version != runtime_version():
        pytest.skip("another onnxruntime is installed than the profiles were made with")
    assert measure_limits() == (runtime.max_opset, runtime.max_ir)


@pytest.mark.parametrize(
    ("op", "weight_type", "expected"),
    [("MatMul", "int8", "matmul-dynamic-u8s8"), ("MatMul", "uint8", "matmul-dynamic-u8u8")],
)
def test_dynamic_kernels_appear_as_the_profile_says(op: str, weight_type: str, expected: str) -> None:
    kernel = load_target("x86-64").kernel(op, "dynamic", weight=weight_type)  # type: ignore[arg-type]
    assert kernel is not None
    assert kernel.name == expected
    model = _model(
        """
        <ir_version: 9, opset_import: ["" : 17]>
        g (float[n, 16] x) => (float[n, 8] y)
        {
          q, s, z = DynamicQuantizeLinear (x)
          i = MatMulInteger (q, w, z, wz)
          f = Cast <to = 1> (i)
          k = Mul (s, ws)
          y = Mul (f, k)
        }
        """,
        w=np.ones((16, 8), weight_type),
        wz=np.zeros(8, weight_type),
        ws=np.full(8, 0.01, np.float32),
    )
    kinds = {node.op_type for node in optimised_graph(model).graph}
    assert kinds & set(kernel.runtime_ops)
