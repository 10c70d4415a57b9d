"""Strided shortcuts as 1x1 convolutions: the same values in float, the same integers in INT8."""

import compress_case as case
import numpy as np
import pytest
from edgepress.compress.lower import apply_plan
from edgepress.compress.quantize.static import static_layout
from edgepress.compress.refine.channels import ChannelTies
from edgepress.compress.refine.shortcut import ConvolveShortcuts, convolved, copied_channels, shortcuts
from edgepress.graph.passes import run_passes

SAME = "<pads = [1, 1, 1, 1]>"
WEIGHTS = case._conv_weights(w=(8, 4, 3, 3), b=(8,), k=(16, 8, 3, 3), f=(16,), l=(8, 16, 3, 3), d=(8,))
PLACES = {
    "start": np.array([0]),
    "end": np.array([9999]),
    "rows": np.array([2]),
    "columns": np.array([3]),
    "two": np.array([2]),
    "pads": np.array([0, 4, 0, 0, 0, 4, 0, 0]),
}


def net(size=9, slices=("rows", "columns"), **more):
    chain, last = "", "r"
    for place, axis in enumerate(slices):
        chain += f" s{place} = Slice({last}, start, end, {axis}, two)"
        last = f"s{place}"
    text = (
        f"(float[N,4,{size},{size}] x) => (float[N,8,P,Q] y) {{ [c1] a = Conv {SAME} (x, w, b) r = Relu(a)"
        f" [c2] e = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (r, k, f){chain} [p] q = Pad({last}, pads)"
        f" [add] t = Add(e, q) u = Relu(t) [c3] y = Conv {SAME} (u, l, d) }}"
    )
    return case.parse(text, WEIGHTS | PLACES | more)


def converted(model):
    plan = case.plan_of(model, quantization="static")
    made = model.fork()
    run_passes(made, [ConvolveShortcuts(nodes=tuple(shortcuts(model, plan)))])
    return plan, made


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("slices", [("rows", "columns"), ("rows",)])
def test_slices_and_a_pad_become_one_convolution(size, slices):
    stride = [2, 2] if len(slices) == 2 else [2, 1]
    model = net(size, slices)
    if len(slices) == 1:  # the other branch halves rows and columns
        node = next(item for item in model.graph if item.name == "c2")
        node.attributes["strides"] = type(node.attributes["strides"])(
            "strides", node.attributes["strides"].type, stride
        )
    _, made = converted(model)
    assert case.operators(made)["Slice"] == case.operators(made)["Pad"] == 0
    assert case.operators(made)["Conv"] == 4
    feeds = {"x": case.random(1, 3, 4, size, size)}
    np.testing.assert_array_equal(case.run(model, feeds)[0], case.run(made, feeds)[0])


def test_in_integers_it_copies_exactly():
    model = net()
    plan, made = converted(model)
    feeds = [{"x": case.random(seed, 2, 4, 9, 9)} for seed in range(3)]
    ranges = case.true_ranges(model, static_layout(model, plan.decisions).observed, feeds)
    new_plan, new_ranges = convolved(plan, model, made, ranges)
    before, _ = apply_plan(model, plan, ranges)
    after, _ = apply_plan(made, new_plan, new_ranges)
    for item in feeds:
        found = [case.run(form, item, optimise=True)[0] for form in (before, after)]
        np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize(
    "changed",
    [
        {"start": np.array([1])},
        {"two": np.array([1])},
        {"end": np.array([8])},
        {"pads": np.array([0, 4, 0, 0, 0, 4, 0, 1])},
        {"pads": np.array([1, 4, 0, 0, 0, 4, 0, 0])},
    ],
)
def test_what_takes_or_adds_anything_else_stays(changed):
    text = (
        "(float[N,4,9,9] x) => (float[N,O,P,Q] q) { [c1] a = Conv <pads = [1, 1, 1, 1]> (x, w, b)"
        " r = Relu(a) s = Slice(r, start, end, rows, two) [p] v = Pad(s, pads) [c3] q = Conv (v, l, d) }"
    )
    model = case.parse(text, WEIGHTS | PLACES | changed)
    assert shortcuts(model, case.plan_of(model, quantization="static")) == []


def test_channels_keep_their_ties_through_it():
    _, made = converted(net())
    ties = ChannelTies(made)
    labels = {value.name: ties.of(value) for value in ties.tensors()}
    np.testing.assert_array_equal(labels["p/shortcut"][4:12], labels["r"])
    np.testing.assert_array_equal(labels["p/shortcut"], labels["u"])


def test_only_a_copying_weight_counts_as_one():
    model = net()
    _, made = converted(model)
    found = [node for node in made.graph if copied_channels(node) is not None]
    assert [node.outputs[0].name for node in found] == ["p/shortcut"]
    expected = np.concatenate([np.full(4, -1), np.arange(8), np.full(4, -1)])
    np.testing.assert_array_equal(copied_channels(found[0]), expected)
    assert all(copied_channels(node) is None for node in model.graph)
