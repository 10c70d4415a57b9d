"""Saturation of 8-bit products on x86 without VNNI: the arithmetic, the bound, prediction and the choice."""

import numpy as np
import pytest
from compress_case import parse, random
from edgepress.compress.emulate.integer import matmul_integer
from edgepress.compress.emulate.predict import isa_notes, observe_saturation, predict_saturation
from edgepress.compress.emulate.saturation import matmul_vpmaddubsw, observed, worst_case
from edgepress.compress.lower import apply_plan
from edgepress.compress.propose import Request, propose
from edgepress.graph.edit import name_nodes
from edgepress.targets.registry import load_target
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

AVX2, VNNI = "x86-64-avx2", "x86-64-avx512-vnni"
CNN = """(float[N,4,8,8] x) => (float[N,6,8,8] y) {
    c = Conv<pads = [1, 1, 1, 1]>(x, k)
    d = Conv<pads = [1, 1, 1, 1], group = 16>(c, kd)
    y = Conv(d, kp)
}"""


def slow(left, right, zero):
    """The kernel step by step: pairs of products, clipped to 16 bits, added up in 32."""
    rows, columns = left.shape[0], right.shape[1]
    result = np.zeros((rows, columns), np.int64)
    for row in range(rows):
        for column in range(columns):
            total = 0
            for k in range(0, left.shape[1], 2):
                pair = sum(
                    int(left[row, place]) * int(right[place, column])
                    for place in (k, k + 1)
                    if place < left.shape[1]
                )
                total += max(-32768, min(32767, pair))
            result[row, column] = total - zero * int(right[:, column].astype(int).sum())
    return result


def crafted():
    """A layer in which two large weights of one sign stand side by side."""
    left = np.full((1, 4), 255, np.uint8)
    right = np.array([[127, 1], [127, 2], [3, -1], [4, -2]], np.int8)
    return left, right


def test_a_crafted_layer_saturates_with_eight_bits_and_is_exact_with_seven():
    left, right = crafted()
    exact = matmul_integer(left, right)
    assert exact.tolist() == [[255 * (127 + 127 + 3 + 4), 0]]
    # 255 * 254 = 64,770 is clipped to 32,767; as onnxruntime computed it under QEMU -cpu Haswell.
    assert matmul_vpmaddubsw(left, right).tolist() == [[32767 + 255 * 7, 0]]
    reduced = np.clip(right, -64, 63)
    np.testing.assert_array_equal(matmul_vpmaddubsw(left, reduced), matmul_integer(left, reduced))
    assert worst_case(right).saturating == 1
    assert not worst_case(reduced).possible
    assert observed(left, right) == (1, 4)


@pytest.mark.parametrize("inner", [7, 16])
@pytest.mark.parametrize("zero", [0, 100])
def test_saturating_products_against_a_slow_loop(inner, zero):
    rng = np.random.default_rng(inner)
    left = rng.integers(0, 256, (5, inner)).astype(np.uint8)
    right = rng.integers(-128, 128, (inner, 6)).astype(np.int8)
    found = matmul_vpmaddubsw(left, right, zero)
    np.testing.assert_array_equal(found, slow(left, right, zero))
    assert (found != matmul_integer(left, right, zero)).any()


def test_signed_activations_count_as_shifted_by_128():
    rng = np.random.default_rng(0)
    left = rng.integers(-128, 128, (5, 16)).astype(np.int8)
    right = rng.integers(-128, 128, (16, 6)).astype(np.int8)
    shifted = (left.astype(np.int16) + 128).astype(np.uint8)
    np.testing.assert_array_equal(matmul_vpmaddubsw(left, right, 3), matmul_vpmaddubsw(shifted, right, 131))


def pair_of_matrices(low, high):
    return st.integers(1, 9).flatmap(
        lambda inner: st.tuples(
            hnp.arrays(np.uint8, (2, inner)),
            hnp.arrays(np.int8, (inner, 3), elements=st.integers(low, high)),
        )
    )


@given(pair_of_matrices(-64, 63))
def test_weights_of_seven_bits_never_saturate(matrices):
    left, right = matrices
    np.testing.assert_array_equal(matmul_vpmaddubsw(left, right), matmul_integer(left, right))
    assert not worst_case(right).possible


@given(pair_of_matrices(-128, 127))
def test_the_worst_case_is_reached_and_never_passed(matrices):
    left, right = matrices
    risk = worst_case(right)
    saturated, _ = observed(left, right)
    assert saturated == 0 or risk.possible
    drive = np.where(right.T > 0, 255, 0).astype(np.uint8)  # one row per column, and its opposite
    reached = sum(observed(rows, right[:, [place]])[0] for place in range(3)
                  for rows in (drive[[place]], (255 - drive[[place]]) * (right.T[[place]] != 0)))  # fmt: skip
    assert reached == risk.saturating


def test_the_bound_itself():
    corners = np.array([[63, -64], [63, -64]], np.int8)
    risk = worst_case(corners)
    assert (risk.highest, risk.lowest, risk.saturating) == (255 * 126, -255 * 128, 0)
    assert worst_case(np.array([[64], [65]], np.int8)).saturating == 1
    assert worst_case(np.array([[127], [127]], np.int8), largest_activation=129).saturating == 0


def dynamic(target, own):
    model = parse("(float[N,64] x) => (float[N,64] y) { y = MatMul(x, w) }", {"w": own})
    name_nodes(model.ir)
    profile = load_target(target)
    plan = propose(model, profile, Request(quantization="dynamic", allow_unmeasured=True))
    return apply_plan(model, plan)[0], plan, profile


def test_each_target_gets_the_weights_that_its_kernels_take():
    own = random(0, 64, 64)
    own[:2] = 3.0  # two largest weights side by side in every column
    left = np.full((1, 64), 255, np.uint8)
    for target, exact in ((AVX2, True), (VNNI, False)):
        lowered, plan, profile = dynamic(target, own)
        integers = lowered.graph.initializers["w.int8"].const_value.numpy()
        same = np.array_equal(matmul_vpmaddubsw(left, integers), matmul_integer(left, integers))
        assert same is exact
        (found,) = predict_saturation(lowered)
        assert (found.saturating == 0) is exact
        notes = isa_notes(lowered, plan, profile)
        assert notes == (
            ["no pair of products can saturate on x86-64-avx2: in 1 layers the largest possible sum of two "
             "is 32,130 of 32,767"] if exact else []
        )  # fmt: skip
    flagged = isa_notes(dynamic(VNNI, own)[0], plan, load_target(AVX2))
    assert "1 of 1 layers can saturate on x86-64-avx2" in flagged[0]


def test_recorded_activations_tell_what_saturates_in_fact():
    own = random(0, 64, 64)
    own[:2] = 3.0
    lowered = dynamic(VNNI, own)[0]
    high = np.zeros((3, 64), np.float32)
    high[:, :2] = 1.0
    (found,) = observe_saturation(lowered, {"x": high})
    assert found.observed_fraction == pytest.approx(1 / 32)
    high[:, 1] = 0.0
    (calm,) = observe_saturation(lowered, {"x": high})
    assert calm.observed_fraction == 0.0
    assert calm.saturating == found.saturating > 0


def test_convolutions_in_the_order_of_the_kernel_without_depthwise_ones():
    kernels = {
        "k": random(0, 16, 4, 3, 3, scale=0.1),
        "kd": random(1, 16, 1, 3, 3, scale=0.2),
        "kp": random(2, 6, 16, 1, 1, scale=0.2),
    }
    # Channels 0 and 1 of a pixel are neighbours along K, rows of the kernel are not.
    kernels["k"][0, 0, 0, 0] = kernels["k"][0, 1, 0, 0] = 2.0
    kernels["k"][1, 0, 0, 0] = kernels["k"][1, 0, 1, 0] = 2.0
    model = parse(CNN, kernels)
    name_nodes(model.ir)
    profile = load_target(VNNI)
    plan = propose(model, profile, Request(quantization="static", calibrated=True))
    ranges = dict.fromkeys(("x", "c", "d", "y"), (-3.0, 3.0))
    lowered = apply_plan(model, plan, ranges)[0]
    found = {item.node: item for item in predict_saturation(lowered)}
    assert len(found) == 2
    first = next(item for item in found.values() if item.pairs == 16 * 18)
    assert first.saturating >= 1
    assert first.highest == 255 * 254
    images = {"x": random(3, 1, 4, 8, 8)}
    observed_first = next(item for item in observe_saturation(lowered, images) if item.pairs == 16 * 18)
    assert 0.0 <= observed_first.observed_fraction < 0.5


def test_arm_targets_are_told_of_their_rounding():
    lowered, plan, profile = dynamic("raspberry-pi-5", random(0, 64, 64))
    (note,) = isa_notes(lowered, plan, profile)
    assert "exact on Arm" in note
