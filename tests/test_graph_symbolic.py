"""What a graph's integers say about its sizes, and where they say nothing."""

import numpy as np
import onnx_ir as ir
import pytest
from edgepress.graph.symbolic import (
    axis_terms,
    constant_sizes,
    reshape_terms,
    scalar_term,
    size_terms,
    starts_at_zero,
    unsqueezed_axis,
)

INT64, INT32, INT8, BOOL, FLOAT = (ir.DataType[name] for name in ("INT64", "INT32", "INT8", "BOOL", "FLOAT"))


def value(shape, name="x", dtype=FLOAT):
    return ir.Value(name=name, shape=None if shape is None else ir.Shape(shape), type=ir.TensorType(dtype))


def constant(array, dtype=np.int64):
    tensor = ir.tensor(np.array(array, dtype))
    return ir.Value(
        name="c", shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )


def node(op_type, *inputs, shape="none", dtype=INT64, **attributes):
    made = ir.node(op_type, list(inputs), attributes=attributes)
    made.outputs[0].type = ir.TensorType(dtype)
    if shape != "none":
        made.outputs[0].shape = ir.Shape(shape)
    return made


def out(op_type, *inputs, **options):
    return node(op_type, *inputs, **options).outputs[0]


def shape_of(*axes, **options):
    return out("Shape", value(axes), **options)


def test_axes():
    x = value(["N", 4, None])
    assert axis_terms(x) == ["N", 4, (id(x), 2)]
    assert axis_terms(value(None)) is None
    assert axis_terms(None) is None


@pytest.mark.parametrize("name", ["?", "None", "unk", "unknown", ""])
def test_names_that_say_nothing_are_not_equal_to_each_other(name):
    x, y = value([name]), value([name])
    assert axis_terms(x) != axis_terms(y)


def test_sizes():
    s = shape_of("N", 4, "M")
    assert size_terms(s) == ["N", 4, "M"]
    assert size_terms(shape_of("N", 4, "M", start=1)) == [4, "M"]
    assert size_terms(shape_of("N", 4, "M", start=-2, end=-1)) == [4]
    assert size_terms(shape_of("N", 4, "M", start=5)) == []
    assert size_terms(out("Gather", s, constant([2, -3]))) == ["M", "N"]
    assert size_terms(out("Concat", out("Gather", s, constant([0])), constant([-1, 2]), axis=0)) == [
        "N",
        -1,
        2,
    ]
    assert size_terms(out("Slice", s, constant([-2]), constant([2**31 - 1]), constant([0]))) == [4, "M"]
    assert size_terms(out("Slice", s, constant([0]), constant([9]), constant([0]), constant([2]))) == [
        "N",
        "M",
    ]
    assert size_terms(out("Unsqueeze", out("Gather", s, constant(1)), constant([0]))) == [4]
    assert size_terms(out("Unsqueeze", out("Gather", s, constant(1)), axes=[-1])) == [4]
    assert size_terms(out("Reshape", out("Gather", s, constant(0)), constant([1]))) == ["N"]
    assert size_terms(out("Cast", s, to=INT32.value)) == ["N", 4, "M"]
    assert size_terms(out("Identity", s)) == ["N", 4, "M"]


@pytest.mark.parametrize(
    "made",
    [
        lambda _: value([3], dtype=INT64),
        lambda _: None,
        lambda _: out("Shape", value(None)),
        lambda s: out("Gather", s, constant(0)),  # a scalar is no vector
        lambda s: out("Gather", s, constant([[0]])),
        lambda s: out("Gather", s, constant([3])),
        lambda s: out("Gather", s, value([1], dtype=INT64)),
        lambda s: out("Unsqueeze", s, constant([0])),  # a matrix of sizes
        lambda s: out("Gather", out("Unsqueeze", s, constant([0])), constant([0])),
        lambda s: out("Gather", out("Reshape", s, constant([1, -1])), constant([0])),
        lambda s: out("Reshape", s, constant([1])),  # three numbers are not one
        lambda s: out("Squeeze", s),
        lambda s: out("Slice", s, constant([0, 0]), constant([1, 1])),
        lambda s: out("Slice", s, constant([2]), constant([0]), constant([0]), constant([-1])),
        lambda s: out("Slice", s, starts=[0], ends=[2]),
        lambda s: out("Cast", s, to=INT8.value),
        lambda s: out("Cast", s, to=BOOL.value),
        lambda s: out("Add", s, s),
        lambda s: out("Concat", s, value([1], dtype=INT64), axis=0),
        lambda s: out("Concat", s, out("Gather", s, constant(0)), axis=0),
        lambda _: constant([1.0, 2.0], np.float32),
        lambda _: constant([[1, 2]]),
    ],
)
def test_what_says_nothing(made):
    assert size_terms(made(shape_of("N", 4, "M"))) is None


def test_what_a_graph_input_holds_by_default_is_not_known():
    overridable = constant([1, 2])
    graph = ir.Graph([overridable], [], nodes=[], initializers=[overridable])
    assert graph.inputs
    assert size_terms(overridable) is None


def test_long_chains_end():
    current = shape_of("N")
    for _ in range(40):
        current = out("Identity", current)
    assert size_terms(current) is None


def test_scalars():
    s = shape_of("N", 4)
    assert scalar_term(out("Gather", s, constant(0))) == "N"
    assert scalar_term(out("Squeeze", out("Gather", s, constant([1])))) == 4
    assert scalar_term(out("Squeeze", out("Gather", s, constant([1])), constant([0]))) == 4
    assert scalar_term(out("Squeeze", out("Gather", s, constant([1])), constant([1]))) is None
    assert scalar_term(out("Reshape", out("Gather", s, constant([0])), constant([], np.int64))) == "N"
    assert scalar_term(s) is None
    assert scalar_term(None) is None


def test_constant_sizes():
    s = shape_of("N", 4, 5)
    assert constant_sizes(s) is None
    assert constant_sizes(out("Gather", s, constant([2, 1]))) == [5, 4]
    assert constant_sizes(out("Gather", s, constant(1))) == 4
    assert constant_sizes(out("Gather", s, constant(0))) is None
    assert constant_sizes(out("Gather", s, constant([], np.int64))) == []


@pytest.mark.parametrize(
    ("source", "target", "attributes", "wanted"),
    [
        (["N", 6], [0, 2, 3], {}, ["N", 2, 3]),
        (["N", "M", 6], [0, -1, 6], {}, ["N", "M", 6]),
        (["N", 6], [0, -1, 3], {}, ["N", 2, 3]),
        ([2, 3, "N"], ["N", -1], {}, ["N", 6]),
        (["N", "M"], [-1], {}, [-1]),
        (["N", "M", 4], [-1, 4], {}, [-1, 4]),
        (["N", 1], [1, -1], {}, [1, "N"]),
        ([1], [1, -1], {}, [1, 1]),
        ([5], [2, -1], {}, [2, -1]),
        (["N", 0], [0, -1], {}, ["N", -1]),
        (["N", 4], [0, 4], {"allowzero": 1}, [0, 4]),
        (["N", 4], [4, 1, 0], {}, None),  # there is no third axis to copy
        (None, [2, 3], {}, [2, 3]),
        (None, [0, 3], {}, None),
        (None, [-1, 3], {}, [-1, 3]),
        (["N", 4], None, {}, None),
        ([None, 4], [-1, 4], {}, "own"),
    ],
)
def test_reshapes(source, target, attributes, wanted):
    x = value(source)
    if target is None:
        goal = value([2], dtype=INT64)
    elif "N" in target:
        parts = [shape_of(item) if isinstance(item, str) else constant([item]) for item in target]
        goal = out("Concat", *parts, axis=0)
    else:
        goal = constant(target)
    found = reshape_terms(node("Reshape", x, goal, **attributes))
    assert found == ([(id(x), 0), 4] if wanted == "own" else wanted)


def test_a_reshape_of_an_old_operator_set_has_no_target_input():
    assert reshape_terms(node("Reshape", value(["N", 4]), shape=[2], dtype=FLOAT)) is None


def ranged(start=0, step=1, dtype=np.int64):
    return out("Range", constant(start, dtype), value([], dtype=INT64), constant(step, dtype), shape=["N"])


def test_ranges():
    plain = ranged()
    assert starts_at_zero(plain) is plain.producer()
    laid_out = out("Unsqueeze", out("Cast", plain, to=INT32.value), constant([1]))
    assert starts_at_zero(laid_out) is plain.producer()
    assert starts_at_zero(ranged(dtype=np.int32)) is not None


@pytest.mark.parametrize(
    "made",
    [
        lambda: ranged(start=1),
        lambda: ranged(start=-1),
        lambda: ranged(step=2),
        lambda: ranged(step=-1),
        lambda: ranged(dtype=np.int16),  # wraps around
        lambda: ranged(start=0.0, dtype=np.float32),
        lambda: out("Cast", ranged(), to=INT8.value),
        lambda: out("Neg", ranged()),
        lambda: value(["N"], dtype=INT64),
        lambda: None,
    ],
)
def test_what_is_no_range_from_zero(made):
    assert starts_at_zero(made()) is None


def test_where_a_vector_lies():
    v = value(["N"])
    assert unsqueezed_axis(v) == (v, 0, 1)
    first = out("Unsqueeze", v, constant([0]), shape=[1, "N"])
    assert unsqueezed_axis(first) == (v, 1, 2)
    second = out("Unsqueeze", first, constant([1, -1]), shape=[1, 1, "N", 1])
    assert unsqueezed_axis(second) == (v, 2, 4)
    old = out("Unsqueeze", v, axes=[1], shape=["N", 1])
    assert unsqueezed_axis(old) == (v, 0, 2)


def test_what_is_no_vector():
    assert unsqueezed_axis(value(["N", "M"])) is None
    assert unsqueezed_axis(value(None)) is None
    dynamic = out("Unsqueeze", value(["N"]), value([1], dtype=INT64), shape=["N", 1])
    assert unsqueezed_axis(dynamic) is None
