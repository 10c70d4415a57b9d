"""Choosing kernels: whose evidence counts, what stays float without any, and what verdicts settle."""

import compress_case as case
import msgspec
import numpy as np
import pytest
from edgepress.compress.choice import SAME_ARITHMETIC, Verdict, choose_kernel, does_not_pay
from edgepress.compress.propose import Request, alternatives
from edgepress.graph.scheme import Scheme
from edgepress.targets.registry import load_target

U8, S8 = Scheme(dtype="uint8", symmetric=False), Scheme(dtype="int8", symmetric=False)
W = {"w": case.random(0, 64, 64), "v": case.random(1, 64, 64), "k": case.random(2, 64, 64, 3, 3)}
ENCODER = "(float[N,S,64] x) => (float[N,S,64] y) { [m1] a = MatMul(x, w) g = Gelu(a) [m2] y = MatMul(g, v) }"
CONV = (
    """(float[N,64,8,8] x) => (float[N,64,4,4] y) { [c1] a = Conv(x, k) r = Relu(a) [c2] y = Conv(r, k) }"""
)
LSTM = """(float[8,1,64] x) => (float[8,1,1,128] y) {
    [l] y = LSTM <hidden_size = 128> (x, w, r) }"""
LSTM_W = {"w": case.random(0, 1, 512, 64), "r": case.random(1, 1, 512, 128)}


def found(text, target=case.X86, weights=None, **asked):
    model = case.parse(text, {key: array for key, array in (weights or W).items() if key in text})
    return case.by_node(case.plan_of(model, target, **asked))


@pytest.mark.parametrize("board", ["raspberry-pi-4", "raspberry-pi-5"])
@pytest.mark.parametrize("op", ["Gemm", "ConvTranspose"])
def test_shared_arithmetic_shares_the_evidence(board, op):
    profile = load_target(board)
    other = choose_kernel(profile, SAME_ARITHMETIC[op], "static", S8)
    choice = choose_kernel(profile, op, "static", S8)
    assert choice.kernel.evidence == "none"
    assert choice.evidence == other.evidence == "modelled"
    assert choice.source == f"as {SAME_ARITHMETIC[op]}, whose kernel it shares: {other.source}"
    assert choice.kernel.speedup_over_float is None  # its own figure is not known all the same


def test_evidence_of_another_type_is_not_shared():
    profile = load_target("raspberry-pi-5")
    for kernel in profile.kernels:
        if kernel.op == "MatMul" and kernel.form == "static" and kernel.activation == "int8":
            profile = case.changed(profile, kernel.name, evidence="none")
    assert choose_kernel(profile, "Gemm", "static", S8).evidence == "none"
    assert choose_kernel(profile, "Gemm", "static", U8).evidence == "modelled"


def test_a_layer_that_nobody_measured_stays_float_unless_asked_for():
    item = found(LSTM, "raspberry-pi-5", LSTM_W)["l"]
    assert item.form == "float"
    assert item.reason == "nobody has measured whether dynamic LSTM is faster than float on raspberry-pi-5"
    assert item.remedy.startswith("pass --allow-unmeasured")
    item = found(LSTM, "raspberry-pi-5", LSTM_W, allow_unmeasured=True)["l"]
    assert (item.form, item.evidence) == ("dynamic", "none")
    assert found(LSTM, case.X86, LSTM_W)["l"].evidence == "measured-elsewhere"


def test_connecting_operators_follow_the_kernels_around_them():
    model, _ = case.zoo("residual")
    profile = load_target("raspberry-pi-5")
    kernel = profile.kernel("Add", "static", activation="int8")
    assert kernel.evidence == "none"
    assert case.by_node(case.plan_of(model, profile))["add"].form == "static"


def test_what_the_profile_knows_to_be_slower_is_told():
    profile = load_target(case.X86)
    slow = profile.kernel("Conv", "static", activation="int8")
    assert does_not_pay(slow).startswith("in static form it runs at 0.85x of float here (ResNet-20")
    assert does_not_pay(profile.kernel("Conv", "static", activation="uint8")) is None


def test_a_verdict_wins_over_the_profile():
    timed = Verdict(form="float", reason="timed here: 0.90x of float")
    items = found(ENCODER, verdicts={"m1": timed})
    assert (items["m1"].form, items["m1"].reason) == ("float", timed.reason)
    assert items["m2"].form == "dynamic"
    other = Verdict(form="weight-only", reason="timed here: 1.50x of float", source="here")
    item = found(ENCODER, verdicts={"m1": other})["m1"]
    assert (item.form, item.evidence, item.source) == ("weight-only", "measured-on-target", "here")
    assert item.reason == "kernel matmul-weight-only-8bit: timed here: 1.50x of float"
    lstm = found(LSTM, "raspberry-pi-5", LSTM_W, verdicts={"l": Verdict(form="dynamic", reason="timed")})["l"]
    assert (lstm.form, lstm.evidence) == ("dynamic", "measured-on-target")


def test_a_verdict_cannot_do_what_the_node_or_the_user_forbids():
    timed = {"m1": Verdict(form="dynamic", reason="timed here")}
    item = found(ENCODER, verdicts=timed, keep_float=("m1",))["m1"]
    assert item.reason.startswith("kept in float by --keep-float")
    narrow = {"w": case.random(0, 64, 4), "v": case.random(1, 4, 64)}
    item = found(ENCODER, weights=narrow, verdicts=timed)["m1"]
    assert item.form == "float"
    assert "too small to pay" in item.reason


def test_alternatives_are_the_forms_that_a_node_could_take():
    model = case.parse(ENCODER, {key: W[key] for key in "wv"})
    offered = alternatives(model, load_target(case.X86), Request())
    assert {name: [item.form for item in items] for name, items in offered.items()} == {
        "m1": ["dynamic", "weight-only"], "m2": ["dynamic", "weight-only"],
    }  # fmt: skip
    asked = alternatives(model, load_target(case.X86), Request(quantization="dynamic"))
    assert [item.form for item in asked["m1"]] == ["dynamic"]
    # On a core without dot products the blocks are known to be slower than float.
    pi4 = alternatives(model, load_target("raspberry-pi-4"), Request())
    assert [item.form for item in pi4["m1"]] == ["dynamic"]
    lstm = case.parse(LSTM, LSTM_W)
    offered = alternatives(lstm, load_target("raspberry-pi-5"), Request())
    assert [item.form for item in offered["l"]] == ["dynamic"]  # to be timed, though nobody has yet


def test_the_type_of_static_activations_can_be_chosen():
    pi5 = load_target("raspberry-pi-5")
    assert found(CONV, pi5)["c1"].activation.dtype == "int8"
    assert found(CONV, pi5, static_activation="uint8")["c1"].activation.dtype == "uint8"
    kernels = [kernel for kernel in pi5.kernels if kernel.activation != "uint8" or kernel.form != "static"]
    only = msgspec.structs.replace(pi5, kernels=tuple(kernels))
    assert found(CONV, only, static_activation="uint8")["c1"].form == "float"
    assert np.all([item.form == "static" for item in found(CONV, only).values()])
