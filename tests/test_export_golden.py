"""Golden samples: generated inputs, distances, tolerances, and files with repeatable bytes."""

import io
import math

import export_case as case
import ml_dtypes
import numpy as np
import pytest
from edgepress.export import golden as golden_module
from edgepress.export.golden import arithmetic, difference, failures, measure_golden
from edgepress.export.manifest import OutputTolerance, session_settings
from edgepress.export.npz import npz_bytes, read_npz
from edgepress.export.nudged import nudged
from edgepress.export.samples import candidate_inputs, index_bounds, probe_inputs
from edgepress.graph.errors import DataError, ModelError
from edgepress.graph.model import TensorSpec
from edgepress.graph.save import save_model
from edgepress.runtimes.base import SessionOptions
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

info = helper.make_tensor_value_info


def golden_of(model, folder, *, level=None, **options):
    (file,) = save_model(model, folder / "model.onnx")
    settings = session_settings(SessionOptions(graph_optimization_level=level))
    return measure_golden(model, file, settings, **options)


def test_generated_inputs_have_several_sizes_and_stay_in_the_table(tmp_path):
    model = case.text_model(tmp_path)
    assert index_bounds(model) == {"input_ids": case.ROWS}
    first = next(candidate_inputs(model, seed=1))
    again = next(candidate_inputs(model, seed=1))
    other = next(candidate_inputs(model, seed=2))
    shapes = [sample["input_ids"].shape for sample in first]
    assert len({shape[0] for shape in shapes}) > 1
    assert len({shape[1] for shape in shapes}) > 1
    for sample, same, different in zip(first, again, other, strict=True):
        assert list(sample) == ["input_ids", "attention_mask"]
        assert sample["attention_mask"].shape == sample["input_ids"].shape
        assert 0 <= sample["input_ids"].min() <= sample["input_ids"].max() < case.ROWS
        assert set(np.unique(sample["attention_mask"])) <= {0, 1}
        assert sample["attention_mask"][0].all()
        assert np.array_equal(sample["input_ids"], same["input_ids"])
        assert not np.array_equal(sample["input_ids"], different["input_ids"])
    assert not first[1]["attention_mask"].all()
    assert max(probe["input_ids"].shape[1] for probe in probe_inputs(model, seed=0)) == 128


def test_table_behind_dequantize_and_embedding_operators(tmp_path):
    table = np.zeros((30, 4), np.uint8)
    nodes = [
        helper.make_node("DequantizeLinear", ["table", "scale", "zero"], ["wide"]),
        helper.make_node("Transpose", ["segments"], ["turned"]),
        helper.make_node("Gather", ["wide", "ids"], ["a"]),
        helper.make_node("Gather", ["narrow", "ids"], ["b"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [info("ids", TensorProto.INT64, ["n"]), info("segments", TensorProto.INT64, ["n", 2])],
        [info("a", TensorProto.FLOAT, ["n", 4]), info("b", TensorProto.FLOAT, [3, "n"])],
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(np.float32(0.1), "scale"),
            numpy_helper.from_array(np.uint8(0), "zero"),
            numpy_helper.from_array(np.zeros((3, 70), np.float32), "narrow"),
        ],
    )
    assert index_bounds(case.onnx_model(tmp_path, graph)) == {"ids": 30}


def identity_model(folder, dtype, shape):
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [info("x", dtype, shape)],
        [info("y", dtype, shape)],
    )
    return case.onnx_model(folder, graph)


@pytest.mark.parametrize(
    ("dtype", "name", "low", "high"),
    [
        (TensorProto.UINT8, "uint8", 0, 255),
        (TensorProto.BOOL, "bool", 0, 1),
        (TensorProto.INT32, "int32", 0, 1),
        (TensorProto.FLOAT16, "float16", -6, 6),
        (TensorProto.BFLOAT16, "bfloat16", -6, 6),
    ],
)
def test_generated_values_fit_their_type(tmp_path, dtype, name, low, high):
    model = identity_model(tmp_path, dtype, ["n", 3, "h", "w"])
    for sample in next(candidate_inputs(model, seed=0)):
        x = sample["x"]
        assert x.dtype.name == name
        assert low <= float(x.astype(np.float64).min())
        assert float(x.astype(np.float64).max()) <= high
        assert len(np.unique(x.astype(np.float64))) > 1


def test_given_shapes_are_kept_where_an_axis_is_free(tmp_path):
    model = case.text_model(tmp_path)
    given_shapes = {"input_ids": (1, 5), "attention_mask": (1, 5)}
    samples = next(candidate_inputs(model, seed=0, shapes=given_shapes))
    assert [sample["input_ids"].shape for sample in samples] == [(1, 5), (3, 5), (2, 5)]


def test_rank_that_nobody_knows(tmp_path):
    model = identity_model(tmp_path, TensorProto.FLOAT, ["n"])
    model.graph.inputs[0].shape = None
    with pytest.raises(ModelError, match="no known rank") as caught:
        next(candidate_inputs(model, seed=0))
    assert "--shape" in caught.value.remedy


def slow_difference(reference, candidate):
    dot = r2 = c2 = d2 = 0.0
    for r, c in zip(reference.ravel().tolist(), candidate.ravel().tolist(), strict=True):
        dot, r2, c2, d2 = dot + r * c, r2 + r * r, c2 + c * c, d2 + (c - r) ** 2
    return 1 - dot / math.sqrt(r2 * c2), math.sqrt(d2 / r2)


arrays = hnp.arrays(np.float32, (3, 4), elements=st.floats(0.5, 100, width=32))


@given(arrays, arrays)
def test_difference_is_the_formula(reference, candidate):
    found = difference(reference, candidate)
    cosine, l2 = slow_difference(reference, candidate)
    assert found.cosine_distance == pytest.approx(max(cosine, 0.0), abs=1e-9)
    assert found.relative_l2 == pytest.approx(l2, rel=1e-9)
    assert found.identical == (reference == candidate).all()


def test_difference_at_the_edges():
    x = np.array([1.0, np.nan, np.inf, -np.inf], np.float32)
    assert difference(x, x).relative_l2 == 0.0
    assert difference(x, x).identical
    assert difference(x, np.array([1, np.nan, -np.inf, -np.inf], np.float32)).relative_l2 == math.inf
    assert difference(x, np.zeros(4, np.float32)).cosine_distance == math.inf
    zero = np.zeros(4, np.float32)
    assert difference(zero, zero).relative_l2 == 0.0
    assert difference(zero, zero + 1).relative_l2 == math.inf
    assert difference(zero + 1, zero).relative_l2 == 1.0
    assert difference(zero, -zero).identical is False
    assert difference(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5])).mismatch_fraction == 0.25
    assert difference(np.array(["a", "b"], object), np.array(["a", "c"], object)).mismatch_fraction == 0.5
    b = np.array([1, 2], ml_dtypes.bfloat16)
    assert difference(b, b * 2).relative_l2 == 1.0
    assert difference(np.zeros((0, 3), np.int64), np.zeros((0, 3), np.int64)).mismatch_fraction == 0.0


def test_failures_name_each_exceeded_limit():
    tolerance = OutputTolerance(name="y", cosine_distance=(0.0, 0.001), relative_l2=(0.0, 0.1))
    x = np.array([1.0, 0.0])
    assert failures(tolerance, x, x * 1.05, exact=False) == []
    assert failures(tolerance, x, x * 1.05, exact=True) == [
        "not bit-identical on the runtime, CPU, options and threads that it was recorded with"
    ]
    assert failures(tolerance, x, x * 1.2, exact=False) == ["relative L2 0.2 exceeds 0.1"]
    turned = failures(tolerance, x, np.array([0.0, 1.0]), exact=False)
    assert [line.split(" exceeds")[0] for line in turned] == ["cosine distance 1", "relative L2 1.41"]
    assert "float64[2] instead of" in failures(tolerance, x.astype(np.float32), x, exact=False)[0]
    shape_only = OutputTolerance(name="y")
    assert failures(shape_only, x, x + 5, exact=True) == []
    assert failures(shape_only, x, x[:1], exact=True) != []


def test_float_model_gets_the_float_floor(tmp_path):
    golden = golden_of(case.text_model(tmp_path), tmp_path)
    (tolerance,) = golden.record.tolerances
    assert golden.record.numerics == "float32"
    assert tolerance.relative_l2[0] < 1e-5
    assert tolerance.relative_l2[1] == 1e-4
    assert golden.record.source == "generated"
    assert len(golden.samples) == len(golden.record.samples) == 3


def chaotic_model(folder):
    """Eight dynamically quantized layers with residuals and norms that onnxruntime fuses."""
    rng = np.random.default_rng(3)
    weights = [
        numpy_helper.from_array(np.ones(64, np.float32), "gain"),
        numpy_helper.from_array(np.zeros(64, np.float32), "bias"),
    ]
    nodes, value = [], "x"
    for layer in range(8):
        matrix = rng.standard_normal((64, 64)).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{layer}"))
        steps = [
            ("DynamicQuantizeLinear", [value], ["q", "s", "z"]),
            ("DequantizeLinear", ["q", "s", "z"], ["d"]),
            ("MatMul", ["d", "w"], ["m"]),
            ("Add", ["m", value], ["r"]),
            ("LayerNormalization", ["r", "gain", "bias"], ["y"]),
        ]
        for op, sources, results in steps:
            named = [name if name in {value, "gain", "bias"} else f"{name}{layer}" for name in sources]
            nodes.append(helper.make_node(op, named, [f"{name}{layer}" for name in results]))
        value = f"y{layer}"
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, ["n", "m", 64])],
        [info(value, TensorProto.FLOAT, ["n", "m", 64])],
        weights,
    )
    return case.onnx_model(folder, graph)


def test_quantized_model_is_measured_and_has_margin(tmp_path):
    golden = golden_of(chaotic_model(tmp_path), tmp_path)
    (tolerance,) = golden.record.tolerances
    assert golden.record.numerics == "int8"
    measured, allowed = tolerance.relative_l2
    assert 1e-5 < measured < 0.5, "the fused norms move some 8-bit values"
    assert allowed == pytest.approx(max(4 * measured, 1 / 127), rel=0.01)
    # A file run without optimizations is measured against the default ones all the same.
    other = golden_of(chaotic_model(tmp_path), tmp_path, level="ORT_DISABLE_ALL")
    assert other.record.tolerances[0].relative_l2[0] > 1e-5


def test_random_operators_are_held_to_their_shape_only(tmp_path):
    graph = helper.make_graph(
        [
            helper.make_node("RandomNormalLike", ["x"], ["noise"]),
            helper.make_node("ArgMax", ["x"], ["best"], axis=1, keepdims=0),
        ],
        "g",
        [info("x", TensorProto.FLOAT, ["n", 4])],
        [info("noise", TensorProto.FLOAT, ["n", 4]), info("best", TensorProto.INT64, ["n"])],
    )
    golden = golden_of(case.onnx_model(tmp_path, graph), tmp_path)
    assert golden.record.tolerances == (
        OutputTolerance(name="noise"),
        OutputTolerance(name="best", mismatch_fraction=(0.0, 0.0)),
    )


def test_arithmetic_of_a_graph(tmp_path):
    assert arithmetic(case.text_model(tmp_path)) == "float32"
    assert arithmetic(case.text_model(tmp_path, quantized=True)) == "int8"
    assert arithmetic(identity_model(tmp_path, TensorProto.FLOAT16, [1])) == "float16"
    assert arithmetic(identity_model(tmp_path, TensorProto.BFLOAT16, [1])) == "bfloat16"


def test_sizes_that_the_graph_refuses_are_replaced(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        "g",
        [info("x", TensorProto.FLOAT, ["n", "m"])],
        [info("y", TensorProto.FLOAT, ["k", 64])],
        [numpy_helper.from_array(np.array([-1, 64]), "shape")],
    )
    golden = golden_of(case.onnx_model(tmp_path, graph), tmp_path)
    assert [inputs["x"].shape[1] % 32 for inputs, _ in golden.samples] == [0, 0, 0]


def test_model_that_takes_no_generated_input(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        "g",
        [info("x", TensorProto.FLOAT, ["n", "m"])],
        [info("y", TensorProto.FLOAT, [7, 11, 13])],
        [numpy_helper.from_array(np.array([7, 11, 13]), "shape")],
    )
    model = case.onnx_model(tmp_path, graph)
    with pytest.raises(ModelError, match="none of the generated") as caught:
        golden_of(model, tmp_path)
    assert "--shape" in caught.value.remedy
    own = {"x": np.ones((7, 143), np.float32)}
    golden = golden_of(model, tmp_path, inputs=[own])
    assert golden.record.source == "data"
    assert np.array_equal(golden.samples[0][0]["x"], own["x"])
    with pytest.raises(DataError, match="no sample"):
        golden_of(model, tmp_path, inputs=[])


SPECIMENS = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "float64": np.float64(3.5),
    "int64": np.array([], np.int64),
    "bool": np.array([[True, False]]),
    "bfloat16": np.array([1.5, -2], ml_dtypes.bfloat16),
    "string": np.array([["ü", ""]], object),
}


@pytest.mark.parametrize("dtype", SPECIMENS)
def test_arrays_survive_their_file(tmp_path, dtype):
    array = np.asarray(SPECIMENS[dtype])
    name = "in/put.npy: ü"
    (tmp_path / "x.npz").write_bytes(npz_bytes({name: array}))
    spec = TensorSpec(name=name, dtype=dtype, shape=None)
    back = read_npz(tmp_path / "x.npz", [spec])[name]
    assert (back.shape, back.dtype) == (array.shape, array.dtype)
    assert np.array_equal(back, array)


def test_npz_bytes_depend_on_nothing_else(monkeypatch):
    array = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    first = npz_bytes({"x": array})
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert npz_bytes({"x": np.ascontiguousarray(array)}) == first
    with np.load(io.BytesIO(first), allow_pickle=False) as archive:
        assert np.array_equal(archive["x"], array)


def test_golden_files_are_untrusted(tmp_path):
    spec = TensorSpec(name="x", dtype="float32", shape=None)
    path = tmp_path / "x.npz"
    np.savez(path, x=np.array([{"a": 1}], object))
    with pytest.raises(DataError, match="cannot be read"):
        read_npz(path, [spec])
    for arrays_there in ({"y": np.zeros(1, np.float32)}, {"x": np.zeros(1), "y": np.zeros(1)}, {}):
        path.write_bytes(npz_bytes(arrays_there))
        with pytest.raises(DataError, match="other arrays"):
            read_npz(path, [spec])
    path.write_bytes(npz_bytes({"x": np.zeros(1, np.int64)}))
    with pytest.raises(DataError, match="another type"):
        read_npz(path, [spec])


def test_what_is_moved_stays_finite_and_infinite_stays_so(tmp_path):
    largest = np.finfo(np.float32).max
    mask = np.array([0, -largest, -np.inf, np.inf, largest, np.nan] * 40, np.float32)
    weights = [numpy_helper.from_array(mask, "mask"), numpy_helper.from_array(mask[:1] + 1, "one")]
    nodes = [helper.make_node("Add", ["x", "mask"], ["m"]), helper.make_node("Add", ["m", "one"], ["y"])]
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, [240])], [info("y", TensorProto.FLOAT, [240])], weights
    )
    model = case.onnx_model(tmp_path, graph)
    moved = [nudged(model, seed).graph.initializers["mask"].const_value.numpy() for seed in range(3)]
    for array in moved:
        assert np.array_equal(np.isfinite(array), np.isfinite(mask))
        assert np.array_equal(array[~np.isfinite(mask)], mask[~np.isfinite(mask)], equal_nan=True)
        assert not np.array_equal(array, mask, equal_nan=True)
        assert np.array_equal(array[mask == 0], mask[mask == 0])


def test_roundings_of_constants_are_part_of_the_tolerance(tmp_path, monkeypatch):
    """Where the runtime's optimizations change no bit: a board's kernels round otherwise all the same."""
    monkeypatch.setattr(golden_module, "_other_lowerings", lambda *_: [])
    model = chaotic_model(tmp_path)
    measured, allowed = golden_of(model, tmp_path).record.tolerances[0].relative_l2
    assert measured > 1e-5
    assert allowed == pytest.approx(max(4 * measured, 1 / 127), rel=0.01)
    monkeypatch.setattr(golden_module, "_NUDGES", 0)
    assert golden_of(model, tmp_path).record.tolerances[0].relative_l2[0] == 0


def test_constants_move_by_a_unit_in_the_last_place_at_most(tmp_path):
    model = chaotic_model(tmp_path)
    before = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    first, again, other = (nudged(model, seed).graph.initializers for seed in (1, 1, 2))
    steps = {name: first[name].const_value.numpy() - array for name, array in before.items()}
    assert any(np.any(step) for step in steps.values())
    for name, array in before.items():
        assert np.all(np.abs(steps[name]) <= np.spacing(np.abs(array)))
        assert np.array_equal(first[name].const_value.numpy(), again[name].const_value.numpy())
        assert np.array_equal(model.graph.initializers[name].const_value.numpy(), array)
    assert any(
        not np.array_equal(first[name].const_value.numpy(), other[name].const_value.numpy())
        for name in before
    )
