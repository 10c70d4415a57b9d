"""Plans as data, counting work, and the same bytes from two processes."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import compress_case as case
import msgspec
import numpy as np
import pytest
from edgepress.compress.cost import bind_axes, concrete_shape, node_macs
from edgepress.compress.lower import apply_plan
from edgepress.compress.plan import Decision, Plan, quantization_of
from hypothesis import given
from hypothesis import strategies as st


def decision(node="n", form="static", op="Conv", **more):
    return Decision(**({"node": node, "op": op, "group": node, "form": form, "reason": "r"} | more))


def plan(*decisions):
    empty = Plan(target="t", precision="fp32", quantization="none", decisions=())
    return empty.with_decisions(decisions)


def test_what_a_plan_is_called():
    assert (plan().quantization, plan().precision) == ("none", "fp32")
    assert quantization_of([decision(form="float")]) == "none"
    table = decision("t", "weight-only", "Gather")
    assert quantization_of([table, decision(form="float")]) == "weight-only"
    assert quantization_of([table, decision(form="dynamic")]) == "dynamic"
    assert quantization_of([decision(form="dynamic"), decision(form="static")]) == "mixed"
    assert plan(decision()).precision == "int8"


def test_going_back_to_float_group_by_group():
    first = decision("a", evidence="modelled", source="s", weight="w", macs=10)
    whole = plan(first, decision("b", "dynamic", group="shared"), decision("c", "dynamic", group="shared"))
    assert whole.groups == ("a", "shared")
    assert whole.quantization == "mixed"
    less = whole.revert(frozenset({"shared"}), "drift")
    assert [item.form for item in less.decisions] == ["static", "float", "float"]
    assert (less.quantization, less.groups, less.decisions[0]) == ("static", ("a",), first)
    assert less.decisions[1].reason == "drift"
    none = less.revert(frozenset({"a", "unknown"}), "slow")
    assert (none.quantization, none.precision, none.groups, none.quantized()) == ("none", "fp32", (), ())
    gone = none.decisions[0]
    assert (gone.evidence, gone.source, gone.weight, gone.macs) == ("none", "", "w", 10)
    assert none.revert(frozenset({"a"}), "again").decisions[0].reason == "slow"


def test_going_back_agrees_with_a_plan_made_without():
    """A table beside dynamic products: the plan is called dynamic before and after one goes back."""
    whole = plan(decision("g", "weight-only", "Gather"), decision("a", "dynamic"), decision("b", "dynamic"))
    assert whole.quantization == whole.revert(frozenset({"a"}), "r").quantization == "dynamic"


def test_integer_share():
    assert plan().integer_share() is None
    assert plan(decision(macs=None), decision(macs=0)).integer_share() is None
    mixed = plan(
        decision(macs=30),
        decision(form="float", macs=50),
        decision(form="dynamic", macs=10),
        decision(form="weight-only", macs=10),
    )
    assert mixed.integer_share() == pytest.approx(0.4)


def test_json_round_trip():
    for name in ("residual", "classifier", "matmul-3d"):
        made = case.plan_of(case.zoo(name)[0], keep_float=("c1", "nothing"))
        text = msgspec.json.encode(made)
        assert msgspec.json.decode(text, type=Plan) == made
        assert msgspec.json.encode(msgspec.json.decode(text, type=Plan)) == text
    with pytest.raises(msgspec.ValidationError, match="unknown"):
        msgspec.json.decode(msgspec.json.encode(made)[:-1] + b',"extra":1}', type=Plan)


def macs(text, weights=None, shapes=None, node="n"):
    model = case.parse(text, weights)
    (found,) = (item for item in model.graph.all_nodes() if item.name == node)
    return node_macs(found, bind_axes(model, shapes or {}))


@pytest.mark.parametrize(
    ("text", "weight", "expected"),
    [
        # 6 x 6 places, 8 filters of 4 x 3 x 3
        ("(float[2,4,8,8] x) => (float[2,8,6,6] y) { [n] y = Conv(x, w) }", (8, 4, 3, 3), 2 * 36 * 8 * 4 * 9),
        (("(float[1,4,8,8] x) => (float[1,8,3,3] y) { [n] y = Conv <strides = "
"[2, 2], group = 2> (x, w) }"), (8, 2, 3, 3), 9 * 8 * 2 * 9),
        ("(float[1,4,8] x) => (float[1,4,6] y) { [n] y = Conv <group = 4> (x, w) }", (4, 1, 3), 6 * 4 * 3),
        # each of the 4 x 5 x 5 inputs meets 3 filters per group of 2 x 2
        (("(float[1,4,5,5] x) => (float[1,6,6,6] y) { [n] y = "
"ConvTranspose <group = 2> (x, w) }"), (4, 3, 2, 2), 100 * 3 * 4),
        ("(float[3,5] x) => (float[3,7] y) { [n] y = Gemm(x, w) }", (5, 7), 3 * 7 * 5),
        ("(float[3,5] x) => (float[3,7] y) { [n] y = Gemm <transB = 1> (x, w) }", (7, 5), 3 * 7 * 5),
        ("(float[2,3,5] x) => (float[2,3,7] y) { [n] y = MatMul(x, w) }", (5, 7), 2 * 3 * 7 * 5),
        ("(float[3,5] x) => (float[3] y) { [n] y = MatMul(x, w) }", (5,), 3 * 5),
        ("(float[5] x) => (float[7] y) { [n] y = MatMul(x, w) }", (5, 7), 7 * 5),
        ("(float[4,2,5] x) => (float[4,2,7] y) { [n] y = MatMul(x, w) }", (4, 5, 7), 4 * 2 * 7 * 5),
    ],
)  # fmt: skip
def test_counts_by_hand(text, weight, expected):
    assert macs(text, {"w": case.random(0, *weight)}) == expected


def test_named_axes_are_bound():
    text = "(float[N,S,16] x) => (float[N,S,32] y) { [n] y = MatMul(x, w) }"
    weights = {"w": case.random(0, 16, 32)}
    assert macs(text, weights) == 128 * 16 * 32
    assert macs(text, weights, {"x": (3, 10, 16)}) == 30 * 16 * 32
    assert macs(text, weights, {"x": (3,)}) == 3 * 128 * 16 * 32
    two = case.parse("(float[N,S] a, float[N,S] b) => (float[N,S] y) { y = Add(a, b) }")
    assert bind_axes(two, {}) == {"N": 1, "S": 128}
    assert bind_axes(two, {"b": (2, 5)}) == bind_axes(two, {"a": (2, 5)}) == {"N": 2, "S": 5}


def test_what_is_not_known_is_none():
    assert (
        macs(
            "(float[N,4,H,W] x, float[8,4,3,3] w, int64[4] p) => (float[A,B,C,D] y) { q "
            "= Reshape(x, p) [n] y = Conv(q, w) }"
        )
        is None
    )
    text = "(float[N,S,16] x, int64[2] p) => (float[A,B] y) { q = Reshape(x, p) [n] y = MatMul(q, q) }"
    assert macs(text) is None
    assert macs("(float[N] x) => (float[N] y) { [n] y = Relu(x) }") is None
    assert concrete_shape(None, {}) is None


DETERMINISM = """
import sys
import compress_case as case
from edgepress.compress.lower import apply_plan, fusion_passes
from edgepress.compress.quantize.static import static_layout
from edgepress.graph.cleanup import exact_cleanup
from edgepress.graph.passes import run_passes
from edgepress.graph.save import to_bytes
from edgepress.targets.registry import load_target
import hashlib, msgspec
for name, quantization in (("squeeze-excite", "static"), ("classifier", "static"), ("matmul-3d", "dynamic"),
                           ("matmul-3d", "static"), ("matmul-3d", "weight-only")):
    model, feeds = case.zoo(name)
    profile = load_target(case.X86)
    run_passes(model, [*exact_cleanup(), *fusion_passes(model, profile, {"packed-qkv": True})])
    plan = case.plan_of(model, profile, quantization=quantization)
    ranges = case.true_ranges(model, static_layout(model, plan.decisions).observed, feeds)
    lowered, records = apply_plan(model, plan, ranges)
    print(name, quantization, hashlib.sha256(to_bytes(lowered)).hexdigest(),
          hashlib.sha256(msgspec.json.encode(plan)).hexdigest())
"""


@pytest.mark.slow
def test_two_processes_write_the_same_bytes():
    outputs = set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent)}
        done = subprocess.run(
            [sys.executable, "-c", DETERMINISM], env=environment, capture_output=True, check=True
        )
        outputs.add(done.stdout)
    assert len(outputs) == 1
    assert len(outputs.pop().splitlines()) == 5


@pytest.mark.parametrize("name", ["residual", "matmul-3d"])
def test_one_process_writes_the_same_bytes_twice_and_leaves_the_model_alone(name):
    from edgepress.graph.save import to_bytes

    model, feeds = case.zoo(name)
    before = model.fingerprint()
    made = case.plan_of(model)
    digests = {hashlib.sha256(to_bytes(case.quantized(model, made, feeds))).hexdigest() for _ in range(2)}
    assert len(digests) == 1
    assert model.fingerprint() == before


@st.composite
def networks(draw):
    """A random small net: convolutions with what stands around them, or an MLP on tokens."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    weights = {}

    def weight(name, *shape):
        fan_in = int(np.prod(shape[1:])) if len(shape) == 4 else shape[0]
        weights[name] = (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
        return name

    lines, current, channels = [], "x", 4
    convolutional = draw(st.booleans())
    for place in range(draw(st.integers(1, 4))):
        out = f"t{place}"
        if not convolutional:
            weight(f"w{place}", 32, 32)
            weight(f"b{place}", 32)
            lines.append(
                f"[m{place}] p{place} = MatMul({current}, w{place}) a{place} = Add(p{place}, b{place})"
            )
            tail = draw(st.sampled_from(["Relu(a{0})", "Gelu(a{0})", "Tanh(a{0})", "Add(a{0}, {1})"]))
            lines.append(f"{out} = {tail.format(place, current)}")
        else:
            group = draw(st.sampled_from([1, 2, channels]))
            wide = channels if group == channels else draw(st.sampled_from([4, 8]))
            weight(f"w{place}", wide, channels // group, 3, 3)
            bias = f", b{place}" if draw(st.booleans()) else ""
            if bias:
                weights[f"b{place}"] = rng.standard_normal(wide).astype(np.float32)
            options = f"<pads = [1, 1, 1, 1], group = {group}>"
            lines.append(f"[c{place}] a{place} = Conv {options} ({current}, w{place}{bias})")
            choices = [
                "Relu(a{0})",
                "LeakyRelu(a{0})",
                "Clip(a{0}, low, high)",
                "Sigmoid(a{0})",
                "HardSwish(a{0})",
            ]
            choices += [
                "MaxPool <kernel_shape = [2, 2]> (a{0})",
                "Add(a{0}, a{0})",
                "Concat <axis = 1> (a{0}, a{0})",
            ]
            choices += ["Add(a{0}, {1})"] if wide == channels else []
            chosen = draw(st.sampled_from(choices))
            lines.append(f"{out} = {chosen.format(place, current)}")
            channels = wide * 2 if chosen.startswith("Concat") else wide
        current = out
    weights["low"], weights["high"] = np.float32(0), np.float32(draw(st.floats(0.0625, 6, width=32)))
    shape = "N,4,8,8" if convolutional else draw(st.sampled_from(["N,S,32", "N,32"]))
    rank = shape.count(",") + 1
    outputs = f"float[{','.join('ABCD'[:rank])}] {current}"
    if draw(st.booleans()):
        outputs += f", float[{','.join('EFGH'[:rank])}] {'a0'}"
    text = f"(float[{shape}] x) => ({outputs}) {{ {' '.join(lines)} }}"
    used = {name: array for name, array in weights.items() if f" {name})" in text or f" {name}," in text}
    feeds = rng.standard_normal({"N,4,8,8": (2, 4, 8, 8), "N,S,32": (2, 5, 32), "N,32": (6, 32)}[shape])
    return text, used, {"x": feeds.astype(np.float32)}


@pytest.mark.slow
@given(networks(), st.sampled_from([case.X86, case.ARM, "x86-64-avx2"]), st.sampled_from(["auto", "static"]))
def test_any_small_net_keeps_its_interface_and_most_of_its_signal(net, target, quantization):
    text, weights, feeds = net
    model = case.parse(text, weights)
    made = case.plan_of(model, target, quantization=quantization)
    lowered = case.quantized(model, made, [feeds])
    assert (lowered.inputs, lowered.outputs) == (model.inputs, model.outputs)
    expected = case.run(model, feeds)
    bound = 15 if target == "x86-64-avx2" else 20  # 7-bit weights: 6 dB less
    for optimise in (False, True):
        found = case.run(lowered, feeds, optimise=optimise)
        for wanted, got in zip(expected, found, strict=True):
            assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
            assert case.sqnr_db(wanted, got) > bound


def test_a_plan_is_carried_out_on_a_fork():
    model, _ = case.zoo("matmul-3d")
    nodes = case.operators(model)
    lowered, _ = apply_plan(model, case.plan_of(model))
    assert case.operators(model) == nodes
    assert case.operators(lowered) != nodes
    assert len(lowered.records) == len(model.records) + 1
