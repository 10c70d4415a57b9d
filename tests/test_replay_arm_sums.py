"""Sums of integers as 64-bit Arm computes them: the formula, and the graph that spells it out."""

from fractions import Fraction

import numpy as np
import onnxruntime as ort
import pytest
import replay_case
from edgepress.compress.emulate import arm, integer
from edgepress.compress.emulate.integer import Affine, Quantized
from edgepress.driver.cli import main
from edgepress.driver.devices import kernel_replay
from edgepress.export.arm_sums import with_arm_sums
from edgepress.export.replay_rounding import rounding_of
from edgepress.export.replay_units import cut_units
from edgepress.graph.save import to_bytes
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto


def slow_sum(left, right, ratios, zeros, limits):
    """One element, in Python's integers: multipliers of 22 bits, halves away from zero."""
    exponent = 0
    larger = Fraction(float(max(ratios)))
    while Fraction(2) ** (exponent + 1) <= larger:
        exponent += 1
    while Fraction(2) ** exponent > larger:
        exponent -= 1
    shift = 21 - exponent
    total = 0
    for value, ratio, zero in zip((left, right), ratios, zeros, strict=False):
        total += round(Fraction(float(ratio)) * 2**shift) * (value - zero)
    steps = (abs(total) + 2 ** (shift - 1)) // 2**shift
    level = (steps if total >= 0 else -steps) + zeros[2]
    return min(max(level, limits[0]), limits[1])


scales = st.floats(2.0**-3, 8.0, width=32)


@settings(max_examples=60, deadline=None)
@given(scales, scales, scales, st.tuples(*[st.integers(0, 255)] * 3), st.integers(0, 2**32 - 1))
def test_the_formula_is_that_of_a_slow_loop(first, second, third, zeros, seed):
    left, right = np.random.default_rng(seed).integers(0, 256, (2, 40)).astype(np.uint8)
    given = zip((left, right), (first, second), zeros[:2], strict=True)
    parts = [Quantized(values, np.float32(scale), np.uint8(zero)) for values, scale, zero in given]
    found = arm.qlinear_add(*parts, Affine(np.float32(third), np.uint8(zeros[2])))
    assume(found is not None)
    ratios = [np.float32(scale) / np.float32(third) for scale in (first, second)]
    pairs = zip(left.tolist(), right.tolist(), strict=True)
    assert found.tolist() == [slow_sum(a, b, ratios, zeros, (0, 255)) for a, b in pairs]


def test_halves_go_away_from_zero_and_not_to_even():
    values = np.array([-3, -1, 1, 3, 5], np.int8)
    part = Quantized(values, np.float32(0.5), np.int8(0))
    nothing = Quantized(np.zeros(5, np.int8), np.float32(0.5), np.int8(0))
    result = Affine(np.float32(1), np.int8(0))
    assert arm.qlinear_add(part, nothing, result).tolist() == [-2, -1, 1, 2, 3]
    assert integer.qlinear_add(part, nothing, result).tolist() == [-2, 0, 0, 2, 2]


@pytest.mark.parametrize("ratio", [2.0**-15, 2.0**8])
def test_far_scales_have_another_path(ratio):
    part = Quantized(np.zeros(1, np.int8), np.float32(ratio), np.int8(0))
    assert arm.qlinear_add(part, part, Affine(np.float32(1), np.int8(0))) is None


def sum_net(folder, *, zero=0, behind="Relu"):
    """a + b between Q/DQ pairs whose scales make many halves, from floats to floats."""
    weights = {
        "s": np.float32(0.5), "t": np.float32(1.5), "u": np.float32(1),
        "z": np.uint8(128), "y0": np.uint8(zero), "low": np.float32(0), "high": np.float32(90),
    }  # fmt: skip
    nodes = [
        replay_case.node("QuantizeLinear", ["a", "s", "z"], "aq"),
        replay_case.node("DequantizeLinear", ["aq", "s", "z"], "ad"),
        replay_case.node("QuantizeLinear", ["b", "t", "z"], "bq"),
        replay_case.node("DequantizeLinear", ["bq", "t", "z"], "bd"),
        replay_case.node("Add", ["ad", "bd"], "sum"),
        replay_case.node(behind, ["sum", "low", "high"] if behind == "Clip" else ["sum"], "r"),
        replay_case.node("QuantizeLinear", ["r", "u", "y0"], "rq"),
        replay_case.node("DequantizeLinear", ["rq", "u", "y0"], "y"),
    ]
    kind = (TensorProto.FLOAT, ["N", 64])
    return replay_case.model_of(folder, nodes, {"a": kind, "b": kind}, {"y": kind}, weights)


def by_formula(kernel, left, right, zero=0):
    parts = Quantized(left, np.float32(0.5), np.uint8(128)), Quantized(right, np.float32(1.5), np.uint8(128))
    return kernel(*parts, Affine(np.float32(1), np.uint8(zero)))


def integers(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (2, 3, 64)).astype(np.uint8)


def test_the_graph_computes_the_formula(tmp_path):
    model = sum_net(tmp_path)
    before = model.structure_hash()
    spelled, count = with_arm_sums(model)
    assert count == 1
    assert model.structure_hash() == before
    left, right = integers()
    feeds = {"a": (left.astype(np.float32) - 128) * 0.5, "b": (right.astype(np.float32) - 128) * 1.5}
    session = ort.InferenceSession(to_bytes(spelled))
    result = session.run(None, {name: values.astype(np.float32) for name, values in feeds.items()})[0]
    expected = by_formula(arm.qlinear_add, left, right)
    assert np.array_equal(result, expected.astype(np.float32))
    assert not np.array_equal(expected, by_formula(integer.qlinear_add, left, right))


@pytest.mark.parametrize("more", [{"zero": 7}, {"behind": "Clip"}, {"behind": "Sigmoid"}])
def test_sums_that_are_no_plain_kernel_stay(tmp_path, more):
    assert with_arm_sums(sum_net(tmp_path, **more))[1] == 0


def test_the_arithmetic_is_told_from_the_bits(tmp_path):
    model = sum_net(tmp_path)
    unit = next(unit for unit in cut_units(model) if unit.operator == "Add")
    left, right = integers()
    named = {"aq": left, "bq": right}
    feeds = [named[value.name] for value in unit.inputs]
    results = [by_formula(kernel, left, right) for kernel in (arm.qlinear_add, integer.qlinear_add)]
    assert [rounding_of(unit, feeds, result) for result in results] == ["fixed point", "float"]
    wrong = results[0].copy()
    wrong.flat[5] ^= 1
    assert rounding_of(unit, feeds, wrong) is None
    # Where both are the same there is nothing to tell.
    even = [np.full_like(left, 130), np.full_like(right, 130)]
    assert rounding_of(unit, even, by_formula(arm.qlinear_add, *even)) is None


def test_a_board_that_sums_in_fixed_point_passes_and_is_told(tmp_path, capsys, monkeypatch):
    bundle = replay_case.bundle_of(sum_net(tmp_path), tmp_path)
    genuine = kernel_replay.play

    def play(jobs, stage, **more):
        """As the jobs run here, but for the sum: on the device in the other arithmetic."""
        here = stage.runs is kernel_replay.on_this_machine
        kernel = integer.qlinear_add if here else arm.qlinear_add
        pairs = zip(genuine(jobs, stage, **more), jobs, strict=True)
        return tuple(replay_case.with_sums(item, job, stage, kernel) for item, job in pairs)

    monkeypatch.setattr(kernel_replay, "play", play)
    monkeypatch.setattr(kernel_replay, "open_entry", lambda *_: replay_case.FakeDevice(bundle))
    assert main(["verify", str(bundle), "--kernels", "--device", "ssh://pi"]) == 0
    out = capsys.readouterr().out
    assert "rounds otherwise: 1 of QLinearAdd: there summed in fixed point" in out
