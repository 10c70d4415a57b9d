"""Every exact rule: what it makes of its pattern, what it leaves and why, and the same results."""

import hypothesis
import numpy as np
import onnx
import pytest
import zoo
from edgepress.graph.cleanup import InferShapes, MergeDuplicates, exact_cleanup
from edgepress.graph.cleanup_rules import EXACT_RULES
from edgepress.graph.edit import Editor, permutation
from edgepress.graph.passes import run_passes
from edgepress.graph.rewrite import Refused, Rewrite
from hypothesis import strategies as st
from onnx import helper

RULES = {rule.name: rule for rule in EXACT_RULES}


def rewrite(name, text, opset=17):
    """(protobuf, model after the rule, its record)."""
    proto = zoo.parse(text, opset)
    model = zoo.load(proto)
    record = zoo.apply(model, InferShapes(), Rewrite(rules=(RULES[name],)))
    return proto, model, record


# A mask as current exporters write it: rows and columns by Range, joined to indices of GatherND.
MASK = """g (bool[N,S] m) => (bool[A,B,C,D] y) <int64[1] i0 = {0}, int64[1] i1 = {1}, int64 zero = {0},
    int64 one = {1}, int64[N] r, int64[S] c, int64[3] rows = {1,2,3}, int64[3] columns = {0,1,2},
    int64[1] last = {-1}, int64[1] none = {0}> {
    s = Shape(m)  n0 = Gather(s, i0)  n1 = Gather(s, i1)  n = Squeeze(n0, none)  k = Squeeze(n1, none)
    r = Range(zero, n, one)  c = Range(zero, k, one)
    ru = Unsqueeze(r, rows)  cu = Unsqueeze(c, columns)
    b = Max(ru, cu)  bs = Shape(b)
    re = Expand(ru, bs)  ce = Expand(cu, bs)  rl = Unsqueeze(re, last)  cl = Unsqueeze(ce, last)
    idx = Concat <axis = -1> (rl, cl)  a = GatherND (m, idx)  y = Not(a) }"""
SDPA = """g (float[N,3,S,4] x) => (float[N,3,4,S] y) <int64[1] i0 = {0}, int64[1] i2 = {2},
    int64[1] rest = {-1}, int64[1] three = {3}, int64[1] four = {4}> {
    s = Shape(x)  n = Gather(s, i0)  l = Gather(s, i2)
    a = Concat <axis = 0> (rest, l, four)  f = Reshape(x, a)  t = Transpose <perm = [0,2,1]> (f)
    b = Concat <axis = 0> (n, three, four, l)  y = Reshape(t, b) }"""
POSITIONS = """g (int64[N,S] x) => (float[1,P,2] y) <int64[1,4] pos = {0,1,2,3}, int64[1] zero = {0},
    float[4,2] table = {1,2,3,4,5,6,7,8}, int64[1] one = {1}, int64 axis = {1}> {
    s = Shape(x)  n = Gather(s, one)  p = Slice(pos, zero, n, one)  y = Gather(table, p) }"""
PARTS = """g (float[N,5] x) => (float[N,2] y, float[N,1] z) <int64 two = {2}, int64 first = {0},
    int64 last = {-1}> {
    q = SplitToSequence <axis = 1> (x, two)  y = SequenceAt(q, first)  z = SequenceAt(q, last) }"""

APPLIED = [
    (
        "no-op-arithmetic",
        "g (float[N,4] x) => (float[N,4] y) <float c = {0}> { a = Add(x, c)  y = Relu(a) }",
        ["Relu"],
    ),
    (
        "no-op-arithmetic",
        "g (float[N,4] x) => (float[N,4] y) <float c = {0}> { a = Add(c, x)  y = Relu(a) }",
        ["Relu"],
    ),
    (
        "no-op-arithmetic",
        "g (float[N,4] x) => (float[N,4] y) <float[1,1] c = {0}> { a = Sub(x, c)  y = Relu(a) }",
        ["Relu"],
    ),
    (
        "no-op-arithmetic",
        "g (int64[N] x) => (int64[N] y) <int64 c = {1}> { a = Mul(c, x)  y = Neg(a) }",
        ["Neg"],
    ),
    ("no-op-arithmetic", "g (uint8[N] x) => (uint8[N] y) <uint8[1] c = {1}> { y = Div(x, c) }", ["Identity"]),
    (
        "full-slice",
        """g (float[N,4] x) => (float[N,4] y) <int64[2] s = {0,0},
        int64[2] e = {9223372036854775807,2147483647},
        int64[2] a = {0,1}> { b = Slice(x, s, e, a)  y = Relu(b) }""",
        ["Relu"],
    ),
    (
        "transpose",
        "g (float[N,4] x) => (float[N,4] y) { a = Transpose <perm = [0,1]> (x)  y = Relu(a) }",
        ["Relu"],
    ),
    (
        "transpose",
        """g (float[N,M,S] x) => (float[S,N,M] y) {
        a = Transpose <perm = [1,0,2]> (x)  y = Transpose <perm = [2,1,0]> (a) }""",
        ["Transpose"],
    ),
    (
        "transpose",
        "g (float[N,M] x) => (float[N,M] y) { a = Transpose(x)  b = Transpose(a)  y = Neg(b) }",
        ["Neg"],
    ),
    (
        "shape-round-trip",
        """g (float[N,4] x) => (int64[1] y) <int64[1] r = {-1}> {
        s = Shape <start = 0, end = 1> (x)  a = Squeeze(s)  b = Reshape(a, r)  y = Neg(b) }""",
        ["Shape", "Neg"],
    ),
    (
        "shape-round-trip",
        """g (float[N,4] x) => (int64[1] y) <int64[1] z = {0}> {
        s = Shape <start = 0, end = 1> (x)  a = Squeeze(s, z)  b = Unsqueeze(a, z)  y = Neg(b) }""",
        ["Shape", "Neg"],
    ),
    (
        "merge-unsqueeze",
        """g (float[N,M] x) => (float[1,N,1,M,1] y) <int64[2] a = {1,-1}, int64[1] b = {0}> {
        c = Unsqueeze(x, a)  y = Unsqueeze(c, b) }""",
        ["Unsqueeze"],
    ),
    ("swap-last-two", SDPA, ["Shape", "Gather", "Gather", "Concat", "Transpose"][:0] or ["Transpose"]),
    (
        "no-op-reshape",
        "g (float[N,4] x) => (float[N,4] y) <int64[2] s = {0,-1}> { a = Reshape(x, s)  y = Relu(a) }",
        ["Relu"],
    ),
    (
        "no-op-reshape",
        "g (float[N,M] x) => (float[N,M] y) { s = Shape(x)  a = Reshape(x, s)  y = Relu(a) }",
        ["Relu"],
    ),
    ("split-without-sequence", PARTS, ["Split"]),
    (
        "always-true",
        "g (bool[N,4] x) => (bool[N,4] y) <bool c = {1}> { a = And(c, x)  y = Not(a) }",
        ["Not"],
    ),
    (
        "always-true",
        """g (bool[N,1] m, bool[N,S] x, int64 n) => (bool[N,S] y) <int64[S] r, int64 zero = {0},
        int64 one = {1}, int64[1] ax = {0}> {
        s = Shape <start = 1, end = 2> (x)  k = Squeeze(s, ax)  r = Range(zero, k, one)
        g = GreaterOrEqual(r, zero)
        t = And(g, g)  a = And(m, t)  y = And(a, x) }""",
        ["And"],
    ),
    (
        "needless-expand",
        "g (float[1,M] x, float[N,M] z) => (float[N,M] y) { s = Shape(z)  a = Expand(x, s)  y = Add(a, z) }",
        ["Add"],
    ),
    (
        "needless-expand",
        """g (float[1,M] x, float[N,M] z) => (float[N,M] y) {
        s = Shape(z)  a = Expand(x, s)  b = Mul(a, a)  c = Sub(b, a)  y = Add(c, z) }""",
        ["Mul", "Sub", "Add"],
    ),
    (
        "needless-expand",
        "g (float[N,M] x) => (float[N,M] y) { s = Shape(x)  a = Expand(x, s)  y = Relu(a) }",
        ["Relu"],
    ),
    ("gather-whole-mask", MASK.replace("bool[A,B,C,D]", "bool[N,1,1,S]"), ["Unsqueeze", "Not"]),
    ("slice-of-positions", POSITIONS, ["Shape", "Gather", "Slice", "Unsqueeze"]),
]


@pytest.mark.parametrize(("name", "text", "left"), APPLIED)
def test_applied_once_with_the_same_results(name, text, left):
    sizes = [{**size, "S": min(size["S"], 4), "P": min(size["S"], 4)} for size in zoo.SIZES]
    proto, model, record = rewrite(name, text)
    assert set(record.applied) == {name}
    assert zoo.operators(model) == left
    zoo.assert_same(proto, model, sizes, reference=False)
    again = zoo.apply(model, Rewrite(rules=(RULES[name],)))
    assert (again.changed, again.applied) == (False, {})


LEFT = [
    ("no-op-arithmetic", "g (float[N,4] x) => (float[N,4] y) <float c = {0}> { y = Sub(c, x) }"),
    ("no-op-arithmetic", "g (float[N,4] x) => (float[N,4] y) <float c = {1}> { y = Div(c, x) }"),
    ("no-op-arithmetic", "g (float[N,4] x) => (float[N,4] y) <float c = {0}> { y = Mul(c, x) }"),
    ("no-op-arithmetic", "g (float[N,4] x) => (float[1,N,4] y) <float[1,1,1] c = {0}> { y = Add(c, x) }"),
    ("no-op-arithmetic", "g (float[N,4] x) => (float[N,4] y) <float[4] c = {0,0,0,0}> { y = Add(c, x) }"),
    ("no-op-arithmetic", "g (float[N,4] x) => (float[N,4] y) <float c = {1e-9}> { y = Add(c, x) }"),
    ("no-op-arithmetic", "g (float[N,4] x, float c) => (float[N,4] y) { y = Add(c, x) }"),
    (
        "full-slice",
        """g (float[N,4] x) => (float[N,3] y) <int64[1] s = {1}, int64[1] e = {2147483647}, int64[1] a = {1}>
         { y = Slice(x, s, e, a) }""",
    ),
    (
        "full-slice",
        """g (float[N,4] x) => (float[N,2] y) <int64[1] s = {0}, int64[1] e = {2147483647}, int64[1] a = {1},
        int64[1] t = {2}> { y = Slice(x, s, e, a, t) }""",
    ),
    (
        "full-slice",
        """g (float[N,4] x) => (float[N,3] y) <int64[1] s = {0}, int64[1] e = {-1}, int64[1] a = {1}> {
        y = Slice(x, s, e, a) }""",
    ),
    ("transpose", "g (float[N,4] x) => (float[4,N] y) { y = Transpose(x) }"),
    (
        "shape-round-trip",
        """g (float[1,M] x) => (float[1] y) <int64[1] z = {0}, int64[1] r = {-1}>
         { a = Squeeze(x, z)  y = Reshape(a, r) }""".replace("float[1] y", "float[M] y"),
    ),
    (
        "merge-unsqueeze",
        """g (float[N] x) => (float[1,N] y) <int64[1] a = {0}>
         { b = Unsqueeze(x, a)  c = Relu(b)  y = Neg(c) }""",
    ),
    (
        "no-op-reshape",
        """g (float[N,M] x) => (float[M,N] y) <int64[1] i = {0}, int64[1] j = {1}>
         { s = Shape(x)  a = Gather(s, j)  b = Gather(s, i)  t = Concat <axis = 0> (a, b)
        y = Reshape(x, t) }""",
    ),
    ("no-op-reshape", "g (float[N,4] x) => (float[P,2] y) <int64[2] s = {-1,2}> { y = Reshape(x, s) }"),
    ("always-true", "g (bool[N,4] x) => (bool[N,4] y) <bool c = {0}> { y = And(c, x) }"),
    ("always-true", "g (bool[N,4] x) => (bool[N,4] y) <bool[4] c = {1,1,0,1}> { y = And(c, x) }"),
    (
        "always-true",
        """g (bool[N] x, int64 n) => (bool[N] y) <int64 minus = {-1}, int64 zero = {0},
        int64 one = {1}, int64[1] ax = {0}> {
        s = Shape(x)  k = Squeeze(s, ax)  m = Sub(k, one)  r = Range(minus, m, one)
        g = GreaterOrEqual(r, zero)  y = And(g, x) }""",
    ),
    (
        "always-true",
        """g (bool[300] x) => (bool[300] y) <int64 zero = {0}, int64 one = {1}, int64[1] ax = {0},
        int8 z = {0}> {
        s = Shape(x)  k = Squeeze(s, ax)  r = Range(zero, k, one)  w = Cast <to = 3> (r)
        f = Cast <to = 7> (w)  o = Cast <to = 7> (z)  g = GreaterOrEqual(f, zero)  y = And(g, x) }""",
    ),
]


@pytest.mark.parametrize(("name", "text"), LEFT)
def test_what_is_no_match_is_left_without_a_word(name, text):
    proto, model, record = rewrite(name, text)
    assert (record.changed, record.applied, record.refused) == (False, {}, ())
    sizes = [{**size, "P": size["N"] * 2} for size in zoo.SIZES]
    zoo.assert_same(proto, model, sizes, reference=False)


REFUSED = [
    (
        "swap-last-two",
        SDPA.replace("float[N,3,S,4] x", "float[N,3,S,T] x"),
        "the last two axes are regrouped before the transpose",
    ),
    (
        "swap-last-two",
        SDPA.replace("(n, three, four, l)", "(n, four, three, l)"),
        "the axes are regrouped after the transpose",
    ),
    (
        "swap-last-two",
        """g (float[N,2,3] x, int64[3] s) => (float[A,B,C] y)
        { f = Reshape(x, s)  t = Transpose <perm = [0,2,1]> (f)  y = Reshape(t, s) }""",
        "the reshapes around the transpose are not understood",
    ),
    (
        "always-true",
        "g (bool[N,1] x) => (bool[N,4] y) <bool[4] c = {1,1,1,1}> { y = And(c, x) }",
        "a reader needs the broadcast shape",
    ),
    (
        "always-true",
        "g (bool[N,1] x) => (bool[4,N] y) <bool[4] c = {1,1,1,1}> { a = And(c, x)  y = Transpose(a) }",
        "a reader needs the broadcast shape",
    ),
    (
        "needless-expand",
        "g (float[1,M] x, int64[2] s, float[N,M] z) => (float[A,B] y) { a = Expand(x, s)  y = Add(a, z) }",
        "a reader needs the broadcast shape",
    ),
    # Both readers lose the axis, and they are all that the sum has.
    (
        "needless-expand",
        """g (bool[1,M] x, bool[N,M] z) => (bool[N,M] y) {
        s = Shape(z)  e = Expand(x, s)  a = Not(e)  b = Cast <to = 9> (e)  y = And(a, b) }""",
        "a reader needs the broadcast shape",
    ),
    # The reader is a body, where a later rewrite would not see it.
    (
        "needless-expand",
        """g (float[1,M] x, float[N,M] z, bool c) => (float[N,M] y) { s = Shape(z)  e = Expand(x, s)
        y = If (c) <then_branch = t () => (float[N,M] o) { o = Add(e, z) },
                    else_branch = f () => (float[N,M] p) { p = Neg(z) }> }""",
        "a reader needs the broadcast shape",
    ),
    (
        "gather-whole-mask",
        MASK.replace("columns = {0,1,2}", "columns = {0,2,3}").replace("rows = {1,2,3}", "rows = {0,1,2}"),
        "the axes are transposed by the indices",
    ),
    (
        "gather-whole-mask",
        MASK.replace("rl = Unsqueeze(re, last)", "rk = Neg(re)  rl = Unsqueeze(rk, last)"),
        "the indices are not plain ranges",
    ),
    (
        "gather-whole-mask",
        MASK.replace("n1 = Gather(s, i1)", "n1 = Gather(s, i0)").replace("int64[S] c", "int64[N] c"),
        "a range does not cover its axis",
    ),
    (
        "gather-whole-mask",
        MASK.replace("Concat <axis = -1> (rl, cl)", "Concat <axis = 0> (rl, cl)"),
        "the indices are not joined on their last axis",
    ),
    # The indices are expanded along the second axis too: the result has three equal copies there.
    (
        "gather-whole-mask",
        MASK.replace("b = Max(ru, cu)", "w = Expand(ru, wide)  b = Max(w, cu)").replace(
            "int64 zero", "int64[4] wide = {1,3,1,1}, int64 zero"
        ),
        "a reader needs the broadcast shape",
    ),
    (
        "slice-of-positions",
        POSITIONS.replace("p = Slice(pos, zero, n, one)", "p = Slice(pos, zero, n, one, two)").replace(
            "int64 axis = {1}", "int64[1] two = {2}"
        ),
        "the positions are not one plain range",
    ),
    (
        "slice-of-positions",
        POSITIONS.replace(
            "float[4,2] table = {1,2,3,4,5,6,7,8}", "float[5,2] table = {1,2,3,4,5,6,7,8,9,10}"
        ),
        "the table has other rows than the positions",
    ),
    (
        "split-without-sequence",
        PARTS.replace("float[N,5] x", "float[N,S] x"),
        "the sizes of the parts are not known",
    ),
    (
        "split-without-sequence",
        """g (float[N,4] x, int64 i) => (float[N,2] y) <int64 two = {2}>
         { q = SplitToSequence <axis = 1> (x, two)  y = SequenceAt(q, i) }""",
        "the sequence is used as a whole",
    ),
]


@pytest.mark.parametrize(("name", "text", "reason"), REFUSED)
def test_refusals_have_their_reason(name, text, reason):
    proto, model, record = rewrite(name, text)
    before = zoo.operators(zoo.load(proto))
    assert not record.changed
    assert reason in [refusal.reason for refusal in record.refused if refusal.rule == name]
    assert zoo.operators(model) == before


def test_expanded_mask_indices_give_the_expanded_mask():
    text = next(text for _, text, reason in REFUSED if "wide" in text)
    proto = zoo.parse(text.replace("bool[A,B,C,D]", "bool[N,3,1,S]"))
    model = zoo.load(proto)
    run_passes(model, exact_cleanup())
    zoo.assert_same(proto, model, reference=False)


def test_narrow_readers_get_narrow_shapes():
    _, model, record = rewrite(
        "needless-expand",
        """g (float[1,M] x, float[N,M] z) => (float[N,M] y) {
        s = Shape(z)  a = Expand(x, s)  b = Mul(a, a)  c = Sub(a, b)  y = Add(c, z) }""",
    )
    assert record.applied == {"needless-expand": 1}
    assert [str(node.outputs[0].shape) for node in model.graph] == ["[1,M]", "[1,M]", "[N,M]"]


@pytest.mark.parametrize(
    ("opset", "text", "left"),
    [
        (
            9,
            """g (float[N,4] x) => (float[N,4] y)
            { s = Shape(x)  t = Slice <starts = [0], ends = [2]> (s)  y = Reshape(x, t) }""",
            None,
        ),
        (
            11,
            """g (float[N,M] x) => (float[1,1,N,M] y)
            { a = Unsqueeze <axes = [0]> (x)  y = Unsqueeze <axes = [0]> (a) }""",
            ["Unsqueeze", "Unsqueeze"],
        ),
        (12, POSITIONS, ["Shape", "Gather", "Slice", "Unsqueeze"]),
        (11, PARTS, ["Split"]),
        (6, "g (float[N,4] x) => (float[N,4] y) <float[1] c = {0}> { y = Add <broadcast = 1> (x, c) }", None),
    ],
)
def test_old_operator_sets(opset, text, left):
    proto = zoo.parse(text, opset)
    model = zoo.load(proto)
    run_passes(model, exact_cleanup())
    onnx.checker.check_model(onnx.load_from_string(zoo.to_bytes(model)))
    if left is not None:
        assert zoo.operators(model) == left
    if opset >= 7:
        sizes = [{**size, "S": min(size["S"], 4), "P": min(size["S"], 4)} for size in zoo.SIZES]
        zoo.assert_same(proto, model, sizes, reference=False)


def test_positions_of_32_bit_are_sliced_with_32_bit_axes():
    text = (
        POSITIONS.replace("int64[1] zero", "int32[1] zero")
        .replace("int64[1] one", "int32[1] one")
        .replace(
            "s = Shape(x)  n = Gather(s, one)", "s = Shape(x)  w = Cast <to = 6> (s)  n = Gather(w, one)"
        )
    )
    proto, model, record = rewrite("slice-of-positions", text)
    assert record.applied == {"slice-of-positions": 1}
    zoo.assert_same(proto, model, [{"N": 2, "S": 3, "P": 3}], reference=False)


def test_several_whole_masks_share_their_constants_over_sweeps():
    text = MASK.replace("bool[A,B,C,D] y", "bool[N,1,1,S] y").replace(
        "y = Not(a) }", "d = Not(a)  e = And(d, true)  y = Not(e) }"
    )
    proto = zoo.parse(text.replace("int64 zero", "bool true = {1}, int64 zero"))
    model = zoo.load(proto)
    run_passes(model, exact_cleanup())
    assert zoo.operators(model) == ["Unsqueeze", "Not", "Not"]
    zoo.assert_same(proto, model, reference=False)


@pytest.mark.parametrize(
    ("perm", "rank", "wanted"),
    [
        ([1, 0], 2, [1, 0]),
        ([0, 0], 2, None),
        ([2, 0], 2, None),
        ([], 0, []),
        (None, 3, [2, 1, 0]),
        (None, None, None),
    ],
)
def test_permutations(perm, rank, wanted):
    import onnx_ir as ir

    value = ir.Value(name="x", shape=None if rank is None else ir.Shape([None] * rank))
    attributes = [] if perm is None else [ir.AttrInt64s("perm", perm)]
    assert permutation(ir.Node("", "Transpose", [value], attributes)) == wanted


def test_a_rule_that_inserts_is_seen_by_the_rules_behind_it():
    class Double:
        name = "double"
        roots = frozenset({"Relu"})

        def apply(self, node, editor):
            if node.inputs[0].producer() is not None:
                return Refused("there is one already")
            made = editor.value("Neg", [node.inputs[0]], before=node, stem="n", like=node.outputs[0])
            node.replace_input_with(0, made)
            return True

    model = zoo.load("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    record = zoo.apply(model, Rewrite(rules=(Double(),)))
    assert record.applied == {"double": 1}
    assert [(item.node, item.reason) for item in record.refused] == [("Relu/y", "there is one already")]
    assert record.options == {"rules": ["double"]}


def test_replacing_an_output_keeps_its_name_and_declared_shape():
    model = zoo.load("g (float[N,4] x) => (float[A,B] y) { a = Relu(x)  y = Neg(a) }")
    relu, neg = model.graph
    editor = Editor(model)
    editor.replace(neg.outputs[0], relu.outputs[0])
    (output,) = model.graph.outputs
    assert (output.name, str(output.shape), output.producer()) == ("y", "[A,B]", relu)
    assert neg.outputs[0].name != "y"


# Random graphs of shape arithmetic: whatever the rules believe about sizes must be true.

SMALL = st.integers(-3, 3)


@st.composite
def shape_programs(draw):
    """A chain of operators on Shape(x), whose result is an output, and is a Reshape target if it can be."""
    nodes, weights, current = [], [], "s"
    kinds = draw(
        st.lists(
            st.sampled_from(["gather", "slice", "concat", "cast", "unsqueeze", "squeeze", "flat"]), max_size=6
        )
    )

    def weight(values, dtype=np.int64):
        name = f"w{len(weights)}"
        weights.append(onnx.numpy_helper.from_array(np.array(values, dtype), name))
        return name

    for place, kind in enumerate(kinds):
        out = f"v{place}"
        if kind == "gather":
            picks = draw(st.one_of(SMALL, st.lists(SMALL, min_size=1, max_size=3), st.just([[0]])))
            nodes.append(helper.make_node("Gather", [current, weight(picks)], [out], axis=0))
        elif kind == "slice":
            bounds = [weight([draw(st.one_of(SMALL, st.just(2**31 - 1)))]) for _ in range(2)]
            step = [weight([0]), weight([draw(st.sampled_from([1, 2, -1]))])]
            nodes.append(helper.make_node("Slice", [current, *bounds, *step], [out]))
        elif kind == "concat":
            nodes.append(helper.make_node("Concat", [current, weight([draw(SMALL)])], [out], axis=0))
        elif kind == "cast":
            middle = f"c{place}"
            to = draw(st.sampled_from([onnx.TensorProto.INT32, onnx.TensorProto.INT8, onnx.TensorProto.BOOL]))
            nodes.append(helper.make_node("Cast", [current], [middle], to=to))
            nodes.append(helper.make_node("Cast", [middle], [out], to=onnx.TensorProto.INT64))
        elif kind == "flat":
            target = draw(st.sampled_from([[-1], [1], [1, -1], []]))
            nodes.append(helper.make_node("Reshape", [current, weight(target).replace("w", "w")], [out]))
        else:
            axes = weight([draw(st.sampled_from([0, -1, 1]))])
            nodes.append(helper.make_node(kind.capitalize(), [current, axes], [out]))
        current = out
    used = draw(st.sampled_from(["Reshape", "Identity", "Identity"]))
    nodes.append(helper.make_node(used, ["x", current] if used == "Reshape" else ["x"], ["r"]))
    nodes.append(helper.make_node("Shape", ["r"], ["u"]))
    return nodes, weights, current


@hypothesis.settings(max_examples=30, suppress_health_check=[hypothesis.HealthCheck.filter_too_much])
@hypothesis.given(
    shape_programs(), st.sampled_from([("N", "M"), ("N", 6), (2, "M"), ("N", "N"), (3, 4), (0, "N")])
)
def test_beliefs_about_sizes_are_true(program, axes):
    nodes, weights, last = program
    graph = helper.make_graph(
        [helper.make_node("Shape", ["x"], ["s"]), *nodes],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, axes)],
        [
            helper.make_tensor_value_info(last, onnx.TensorProto.INT64, None),
            helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, None),
            helper.make_tensor_value_info("u", onnx.TensorProto.INT64, None),
        ],
        weights,
    )
    if last == "s":
        del graph.output[0]
    proto = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    inputs = [np.ones([{"N": 300, "M": 2}.get(axis, axis) for axis in axes], np.float32)]
    inputs.append(np.ones([{"N": 1, "M": 3}.get(axis, axis) for axis in axes], np.float32))
    try:
        wanted = [zoo.run(proto, {"x": item}) for item in inputs]
    except Exception:  # noqa: BLE001 - the runtime refuses programs that are none, with types of its own
        hypothesis.reject()
    model = zoo.load(proto)
    run_passes(model, exact_cleanup())
    for item, expected in zip(inputs, wanted, strict=True):
        for left, right in zip(expected, zoo.run(model, {"x": item}), strict=True):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)


# Random element-wise graphs over broadcasts: no reader may see another shape.


@st.composite
def broadcast_programs(draw):
    """Nodes on e = Expand(x[1,M], Shape(z[N,M])) and on z, all outputs of the last ones."""
    values, nodes = ["e", "z", "x"], []
    for place in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["Add", "Mul", "Sub", "Neg", "Where", "Max", "Cast"]))
        count = {"Neg": 1, "Cast": 1, "Where": 2}.get(kind, 2)
        operands = [draw(st.sampled_from(values)) for _ in range(count)]
        attributes = {"to": onnx.TensorProto.FLOAT} if kind == "Cast" else {}
        if kind == "Where":
            operands = ["c", *operands]
        nodes.append(helper.make_node(kind, operands, [f"v{place}"], **attributes))
        values.append(f"v{place}")
    return nodes, draw(st.sets(st.sampled_from(values[3:]), min_size=1))


@hypothesis.settings(max_examples=60)
@hypothesis.given(broadcast_programs())
def test_no_reader_sees_another_shape(program):
    nodes, wanted = program
    graph = helper.make_graph(
        [helper.make_node("Shape", ["z"], ["s"]), helper.make_node("Expand", ["x", "s"], ["e"]), *nodes],
        "g",
        [
            helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, "M"]),
            helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["N", "M"]),
            helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, ["M"]),
        ],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in sorted(wanted)],
    )
    proto = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    model = zoo.load(proto)
    run_passes(model, exact_cleanup())
    for size in zoo.SIZES:
        inputs = zoo.feeds(proto, size)
        for left, right in zip(zoo.run(proto, inputs), zoo.run(model, inputs), strict=True):
            np.testing.assert_array_equal(left, right)


def test_minus_zero_is_the_one_exception():
    """-0.0 + 0.0 is 0.0; the rule keeps -0.0. All other numbers, NaN and infinities stay to the bit."""
    proto, model, _ = rewrite(
        "no-op-arithmetic", "g (float[5] x) => (float[5] y) <float c = {0}> { a = Add(x, c)  y = Neg(a) }"
    )
    x = np.array([0.0, np.inf, -np.inf, np.nan, 1e-45], np.float32)
    (before,), (after,) = zoo.run(proto, {"x": x}), zoo.run(model, {"x": x})
    np.testing.assert_array_equal(before.view(np.uint32), after.view(np.uint32))


def test_merging_after_rules_leaves_one_of_each():
    model = zoo.load(zoo.ZOO["names like fresh ones"])
    zoo.apply(model, InferShapes(), Rewrite(rules=EXACT_RULES), MergeDuplicates())
    names = [value.name for node in model.graph for value in node.outputs]
    names += [*model.graph.initializers, "x", "axes"]
    assert len(set(names)) == len(names)
