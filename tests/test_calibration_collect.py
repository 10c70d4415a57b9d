"""Ranges of intermediate tensors, through onnxruntime."""

from __future__ import annotations

import calibration_case as case
import numpy as np
import pytest
from edgepress.calibration.collect import check_observable, collect_channel_limits, collect_ranges
from edgepress.calibration.data import open_data
from edgepress.graph.errors import DataError, ModelError
from edgepress.runtimes.ort_runtime import OrtSession

CHAIN = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 3] x) => (float[N, 3] y)
<float two = {2.0}, float[3] shift = {-1.0, 0.5, 3.0}>
{ a = Mul (x, two)  b = Add (a, shift)  c = Relu (b)  d = Sub (c, two)  y = Tanh (d) }"""

BRANCH = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 3] x, bool cond) => (float[N, 3] y)
{ a = Neg (x)
  y = If (cond) <then_branch = t () => (float[N, 3] p) { p = Relu (a) },
                 else_branch = e () => (float[N, 3] q) { q = Abs (a) }> }"""


@pytest.fixture
def data(tmp_path):
    x = np.random.default_rng(0).standard_normal((40, 3)).astype("f4")
    np.save(tmp_path / "x.npy", x)
    return open_data(str(tmp_path / "x.npy"), case.VECTOR)


def everything(data):
    x = np.concatenate([sample["x"] for sample in data])
    a = x * np.float32(2)
    b = a + np.array([-1, 0.5, 3], "f4")
    c = np.maximum(b, 0)
    d = c - np.float32(2)
    return {"x": x, "a": a, "b": b, "c": c, "d": d, "y": np.tanh(d)}


@pytest.mark.parametrize("budget", [None, 1, 30])
def test_ranges_are_those_of_the_tensors(data, budget):
    model = case.model_of(CHAIN)
    before = model.structure_hash()
    wanted = ["y", "c", "x", "a", "a"]
    found = collect_ranges(model, wanted, data, method="minmax", max_memory_bytes=budget)
    assert list(found) == ["y", "c", "x", "a"]
    for name, values in everything(data).items():
        if name in found:
            histogram = found[name].histogram
            assert histogram.total == values.size
            assert (histogram.minimum, histogram.maximum) == pytest.approx(
                (values.min(), values.max()), rel=1e-6
            )
    assert model.structure_hash() == before


def test_channel_limits_are_those_of_the_last_axis(data):
    found = collect_channel_limits(case.model_of(CHAIN), ["b", "x", "y"], data)
    assert set(found) == {"b", "x", "y"}
    for name, (low, high) in found.items():
        values = everything(data)[name]
        np.testing.assert_allclose(low, values.min(axis=0), rtol=1e-6)
        np.testing.assert_allclose(high, values.max(axis=0), rtol=1e-6)
        assert low.dtype == np.float32


def test_segments_keep_to_the_budget_and_to_few_passes(data):
    opened = []

    def open_session(part):
        opened.append([spec.name for spec in part.outputs])
        assert len(part.graph) <= 5
        return OrtSession.from_model(part)

    steps = []
    collect_ranges(
        case.model_of(CHAIN),
        ["a", "b", "c", "d"],
        data,
        max_memory_bytes=24,
        open_session=open_session,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert opened == [["a", "b"], ["c", "d"]]  # 12 bytes each at batch 1
    assert steps[-1] == (80, 80)
    assert steps == sorted(steps)


def test_a_segment_that_turns_out_too_large_is_halved(data):
    text = CHAIN.replace("a = Mul (x, two)", "n = NonZero (x)  s = Cast <to: int = 1> (n)  a = Mul (x, two)")
    opened = []

    def open_session(part):
        opened.append([spec.name for spec in part.outputs])
        return OrtSession.from_model(part)

    names = ["s", "a"]  # the size of s cannot be inferred: it is taken for nothing at first
    collect_ranges(case.model_of(text), names, data, max_memory_bytes=20, open_session=open_session)
    assert opened == [["s", "a"], ["s"], ["a"]]


def test_only_inputs_need_no_session(data):
    found = collect_ranges(case.model_of(CHAIN), ["x"], data, open_session=pytest.fail)
    assert found["x"].histogram.total == 120


def test_captured_values_are_observed_and_inner_ones_refused(tmp_path):
    model = case.model_of(BRANCH)
    np.savez(tmp_path / "d.npz", x=np.ones((2, 3), "f4"), cond=np.array([True, False]))
    data = open_data(str(tmp_path / "d.npz"), model.inputs)
    assert collect_ranges(model, ["a", "y"], data)["a"].histogram.minimum == -1
    with pytest.raises(ModelError, match="cannot be calibrated") as caught:
        check_observable(model, ["p"])
    assert "If, Loop or Scan" in str(caught.value)
    assert "'p'" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "word"), [("two", "weight"), ("yy", "did you mean 'y'"), ("nothing_like_it", "no such tensor")]
)
def test_what_cannot_be_observed_is_named(data, name, word):
    with pytest.raises(ModelError) as caught:
        collect_ranges(case.model_of(CHAIN), ["a", name], data)
    assert word in str(caught.value)
    assert name in str(caught.value)


def test_integer_tensors_are_refused(data):
    text = CHAIN.replace("a = Mul (x, two)", "n = Shape (x)  a = Mul (x, two)")
    model = case.model_of(text)
    next(node for node in model.graph if node.op_type == "Shape").outputs[0].dtype = model.graph.inputs[
        0
    ].dtype.INT64
    with pytest.raises(ModelError, match="calibrated") as caught:
        collect_ranges(model, ["n"], data)
    assert "INT64" in str(caught.value)


def test_nan_in_an_activation_names_the_tensor(data):
    text = CHAIN.replace("d = Sub (c, two)", "e = Log (x)  d = Sub (e, two)")
    with pytest.raises(DataError, match="NaN") as caught:
        collect_ranges(case.model_of(text), ["a", "e"], data)
    assert "'e'" in str(caught.value)


def test_fixed_batch(tmp_path):
    model = case.model_of(CHAIN.replace("float[N, 3]", "float[4, 3]"))
    np.save(tmp_path / "x.npy", np.arange(18, dtype="f4").reshape(6, 3))
    data = open_data(str(tmp_path / "x.npy"), model.inputs)
    found = collect_ranges(model, ["a"], data)["a"].histogram
    assert (found.minimum, found.maximum) == (0, 34)


def test_memory_does_not_grow_with_the_samples(tmp_path):
    tracemalloc = pytest.importorskip("tracemalloc")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((1024, 3)).astype("f4"))
    peaks = []
    for samples in (128, 1024):
        data = open_data(str(tmp_path / "x.npy"), case.VECTOR, samples=samples)
        tracemalloc.start()
        collect_ranges(case.model_of(CHAIN), ["a", "c", "y"], data)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] + 64_000
