"""GlobalPool: means over whole images become GlobalAveragePool, all other means stay."""

import compress_case as case
import numpy as np
import pytest
from edgepress.compress.fuse.pooling import GlobalPool


def pooled(body, opset=20, shape="float[N,3,4,6] x", result="float[N,C,A,B] y", **weights):
    return case.parse(f"({shape}) => ({result}) {{ {body} }}", weights, opset)


FEEDS = [{"x": case.random(seed, seed, 3, 4, 6)} for seed in (1, 3)]


@pytest.mark.parametrize("axes", [[2, 3], [-1, -2], [3, 2], [-2, 3]])
@pytest.mark.parametrize("opset", [13, 20])
def test_a_mean_over_height_and_width_is_a_global_pool(axes, opset):
    if opset == 13:
        model = pooled(f"y = ReduceMean <axes = {axes}> (x)", opset)
    else:
        model = pooled("y = ReduceMean(x, axes)", axes=np.array(axes))
    changed = case.assert_rewritten(model, GlobalPool(), FEEDS)
    assert case.operators(changed) == {"GlobalAveragePool": 1}


@pytest.mark.parametrize(
    "attributes",
    [
        "kernel_shape = [4, 6]",
        "kernel_shape = [4, 6], strides = [4, 6], count_include_pad = 1",
        'kernel_shape = [4, 6], auto_pad = "VALID"',
        "kernel_shape = [9, 9], strides = [9, 9], ceil_mode = 1",
        "kernel_shape = [9, 9], strides = [9, 9], ceil_mode = 1, count_include_pad = 1",
    ],
)
def test_a_window_of_the_whole_image_is_a_global_pool(attributes):
    model = pooled(f"y = AveragePool <{attributes}> (x)", result="float[N,3,1,1] y")
    changed = case.assert_rewritten(model, GlobalPool(), FEEDS)
    assert case.operators(changed) == {"GlobalAveragePool": 1}
    for feeds in FEEDS:
        np.testing.assert_allclose(
            case.run(changed, feeds)[0], feeds["x"].mean(axis=(2, 3), keepdims=True), atol=1e-6
        )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = ReduceMean <keepdims = 0> (x, axes)", "the axes of the image are dropped"),
        ("y = ReduceMean(x, last)", None),
        ("y = ReduceMean(x)", None),
        ("y = AveragePool <kernel_shape = [4, 5]> (x)", None),
        ("y = AveragePool <kernel_shape = [4, 6], pads = [1, 1, 1, 1], strides = [9, 9]> (x)", None),
        ('y = AveragePool <kernel_shape = [4, 6], auto_pad = "SAME_UPPER", strides = [4, 6]> (x)', None),
        ("y = AveragePool <kernel_shape = [2, 2], dilations = [3, 5]> (x)", None),
    ],
)
def test_other_means_stay(body, reason):
    known = {"axes": np.array([2, 3]), "last": np.array([3])}
    result = "float[N,3] y" if "keepdims" in body else "float[A,B,C,D] y"
    model = pooled(
        body, result=result, **{name: array for name, array in known.items() if f"{name})" in body}
    )
    case.assert_refused(model, GlobalPool(), *([reason] if reason else []))


def test_unknown_sizes_ranks_and_types_stay():
    body = "y = AveragePool <kernel_shape = [4, 6]> (x)"
    case.assert_refused(pooled(body, shape="float[N,3,H,W] x"), GlobalPool())
    body, axes = "y = ReduceMean(x, axes)", np.array([2, 3])
    case.assert_refused(
        pooled(body, shape="float[N,3,4,6,5] x", result="float[A,B,C,D,E] y", axes=axes), GlobalPool()
    )
    model = case.parse(f"(double[N,3,4,6] x) => (double[N,3,1,1] y) {{ {body} }}", {"axes": axes})
    case.assert_refused(model, GlobalPool(), "x is not known to be float32")
