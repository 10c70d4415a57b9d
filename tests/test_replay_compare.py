"""Comparing two machines' results: bits, steps and ulps, who is right, and how a bias was rounded."""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import replay_case
from edgepress.compress.emulate.saturation import matmul_vpmaddubsw
from edgepress.export import replay_results
from edgepress.export.replay_compare import Judgement, compare, judge, ulps_between
from edgepress.export.replay_results import UnitResult
from edgepress.export.replay_rounding import bias_rounding
from edgepress.export.replay_units import cut_units
from edgepress.runtimes.replay import Played
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper


def steps(first, second, dtype, limit=70_000):
    """How often nextafter leads from one to the other: a slow loop."""
    value, count = dtype(first), 0
    while value != second:
        value, count = np.nextafter(value, dtype(second)), count + 1
        assert count < limit
    return count


@pytest.mark.parametrize(
    ("first", "second"), [(1.0, 1.0), (0.0, -0.0), (1.0, 1.01), (-1e-3, 1e-3), (-65504.0, -65000.0)]
)
def test_ulps_are_counted_as_steps_of_the_type(first, second):
    pair = [np.array([value], np.float16) for value in (first, second)]
    assert ulps_between(*pair)[0] == steps(pair[0][0], pair[1][0], np.float16)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(0, 40))
def test_so_many_neighbours_are_so_many_ulps(value, count):
    moved = np.float32(value)
    for _ in range(count):
        moved = np.nextafter(moved, np.float32(np.inf))
    if np.isfinite(moved):
        assert ulps_between(np.array([value], np.float32), np.array([moved], np.float32))[0] == count


def test_what_is_counted():
    mine = [np.array([1, 2, 250], np.uint8), np.array([1.0, 2.0], np.float32)]
    other = [np.array([1, 5, 0], np.uint8), np.array([1.0, np.nextafter(np.float32(2), 3)], np.float32)]
    found = compare(mine, other)
    assert (found.elements, found.differing, found.integers_differing, found.steps) == (5, 3, 2, 250)
    assert found.ulps == 1
    assert found.max_abs == pytest.approx(2.4e-7, rel=0.1)
    assert compare(mine, mine).identical
    assert not compare(mine, mine[:1]).identical
    assert not compare(mine, [mine[0].astype(np.int8), mine[1]]).shapes


def test_nan_is_the_same_as_itself_and_as_nothing_else():
    nan, one = np.array([np.nan], np.float32), np.array([1.0], np.float32)
    assert compare([nan], [nan]).identical
    found = compare([nan], [one])
    assert not found.identical
    assert found.ulps is None


def product_model():
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["y"])],
        "product",
        [
            helper.make_tensor_value_info("a", TensorProto.UINT8, [2, 8]),
            helper.make_tensor_value_info("b", TensorProto.INT8, [8, 3]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [2, 3])],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()


@pytest.mark.parametrize("wrong", ["host", "device", "neither"])
def test_the_definition_says_who_is_wrong(wrong):
    left = np.full((2, 8), 255, np.uint8)
    right = np.full((8, 3), 127, np.int8)
    exact = left.astype(np.int32) @ right.astype(np.int32)
    saturated = matmul_vpmaddubsw(left, right)
    host, device = (saturated if wrong == side else exact for side in ("host", "device"))
    if wrong == "neither":
        device = exact + 1
    found = judge(product_model(), [left, right], [host], [device])
    assert found.wrong == wrong


def float_product_model():
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["y"])],
        "product",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in "ab"],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 9.0])
def test_a_device_whose_floats_are_none_is_wrong(bad):
    one = np.eye(2, dtype=np.float32)
    device = one.copy()
    device[0, 1] = bad
    assert judge(float_product_model(), [one, one], [one], [device]).wrong == "device"
    assert judge(float_product_model(), [one, one], [one], []).wrong == "device"
    assert judge(float_product_model(), [one, one], [one], [one[:1]]).wrong == "device"


def test_what_is_rightly_infinite_is_right():
    huge = np.eye(2, dtype=np.float32) * np.float32(3e38)
    right = np.where(huge > 0, np.float32(np.inf), np.float32(0))
    assert judge(float_product_model(), [huge, huge], [right], [right]).wrong == "neither"


def test_this_machine_is_not_to_blame_alone_where_the_device_is_wrong_too():
    left = np.full((2, 8), 255, np.uint8)
    right = np.full((8, 3), 127, np.int8)
    exact = left.astype(np.int32) @ right.astype(np.int32)
    found = judge(product_model(), [left, right], [exact + 100], [exact + 2])
    assert (found.wrong, found.host, found.device) == ("both", 100, 2)
    assert judge(product_model(), [left, right], [exact + 2], [exact + 100]).wrong == "device"


def result(found, wrong=None, **fields):
    judgement = None if wrong is None else Judgement(host=0.0, device=0.0, wrong=wrong)
    base = {"unit": "u", "places": 1, "kernel": "k", "kernel_here": "k", "integer": True, "state": "differs"}
    return UnitResult(**{**base, "difference": found, "judgement": judgement, **fields})


def test_which_differences_are_the_devices_fault():
    floats = np.linspace(-1, 1, 8, dtype=np.float32)
    near, far, none = floats * np.float32(1 + 1e-6), floats + np.float32(0.1), np.full(8, np.nan, np.float32)
    assert compare([floats], [far]).fraction == pytest.approx(0.1, rel=1e-4)
    assert not result(compare([floats], [near])).failed
    assert result(compare([floats], [near]), "device").failed
    for wrong in (far, none):
        assert result(compare([floats], [wrong])).failed
        assert result(compare([floats], [wrong]), "both").failed
        assert not result(compare([floats], [wrong]), "neither").failed
        assert not result(compare([floats], [wrong]), integer=False).failed
        assert not result(compare([floats], [wrong]), "host", state="this machine is wrong").failed
    # Another type or shape, or fewer results: no integer is compared then, and none is right.
    for other in ([floats[:4]], [floats.astype(np.float16)], []):
        assert result(compare([floats], other)).failed
    assert result(compare([np.zeros(2, np.uint8)], [np.ones(2, np.uint8)]), "neither").failed


def test_of_several_samples_the_worst_for_the_device_counts(tmp_path, monkeypatch):
    says = {0: "host", 1: "device", 2: "neither"}

    def judged(_data, feeds, *_):
        return Judgement(host=0.0, device=0.0, wrong=says[int(feeds[0][0])])

    monkeypatch.setattr(replay_results, "judge", judged)
    names = [(f"s{sample}.npy",) for sample in says]
    for sample, (name,) in enumerate(names):
        np.save(tmp_path / name, np.array([sample]))
    recording = SimpleNamespace(feeds=[names], folder=tmp_path, models=[SimpleNamespace(data=b"")])
    mine = Played(outputs=tuple((np.array([0]),) for _ in names))
    other = Played(outputs=tuple((np.array([1]),) for _ in names))
    assert replay_results._judged(recording, 0, mine, other).wrong == "device"


def test_an_operator_without_a_definition_has_no_judgement():
    graph = helper.make_graph(
        [helper.make_node("Unheard", ["a"], ["y"], domain="com.microsoft")],
        "none",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    data = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    one = np.ones(1, np.float32)
    assert judge(data, [one], [one], [one + 1]) is None


def nearest(value):
    """The float32 nearest to a fraction, ties to even: no arithmetic of NumPy's in between."""
    near = np.float32(float(value))
    around = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    return min(around, key=lambda item: (abs(Fraction(float(item)) - value), item.view(np.uint32) & 1))


def scaled(sums, factor, bias, *, fused):
    rows = []
    for row in sums:
        made = []
        for total, scale, added in zip(row, factor, bias, strict=True):
            exact = Fraction(float(np.float32(total))) * Fraction(float(scale))
            if not fused:
                exact = Fraction(float(nearest(exact)))
            made.append(nearest(exact + Fraction(float(added))))
        rows.append(made)
    return np.array(rows, np.float32)


def test_how_a_bias_was_rounded_is_told_from_the_bits(tmp_path):
    rng = np.random.default_rng(3)
    model = replay_case.dynamic_net(tmp_path)
    unit = cut_units(model)[1]
    by_name = {
        "x.q": rng.integers(0, 256, (9, 32)).astype(np.uint8),
        "x.s": np.float32(0.0173),
        "x.z": np.uint8(131),
    }
    feeds = [np.asarray(by_name[value.name]) for value in unit.inputs]
    weights = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    sums = (by_name["x.q"].astype(np.int64) - 131) @ weights["one.w"].astype(np.int64)
    factor = np.float32(0.0173) * weights["one.s"]
    results = {fused: scaled(sums, factor, weights["one.b"], fused=fused) for fused in (False, True)}
    assert results[True].tobytes() != results[False].tobytes()
    assert bias_rounding(unit, feeds, results[True]) == "fused"
    assert bias_rounding(unit, feeds, results[False]) == "separate"
    results[True][4, 7] = np.nextafter(results[True][4, 7], np.float32(9))
    assert bias_rounding(unit, feeds, results[True]) is None


def test_a_unit_of_another_form_has_no_bias_to_round(tmp_path):
    unit = cut_units(replay_case.static_net(tmp_path))[0]
    assert bias_rounding(unit, [np.zeros((1, 3, 8, 8), np.float32)], np.zeros((1, 3, 8, 8), np.uint8)) is None
