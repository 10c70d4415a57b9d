"""Operator by operator: which units a small graph has, why others stay, and that a cut equals the mask."""

import numpy as np
import prune_case as case
import pytest

IMAGE = "(float[N,3,6,6] x) => (float[N,O,P,Q] y)"
ROWS = "(float[N,5] x) => (float[N,4] y)"
TOKENS = "(float[N,7,16] x) => (float[N,7,16] y)"
X4 = {"x": case.random(90, 2, 3, 6, 6)}
X2 = {"x": case.random(91, 3, 5)}
X3 = {"x": case.random(92, 2, 7, 16)}


def convolutions(middle, inner="a", outer="b", **shapes):
    """A convolution that makes 8 channels, what is done with them, and one that sums over the result."""
    text = f"{IMAGE} {{ {inner} = Conv (x, w) {middle} y = Conv ({outer}, v) }}"
    return text, {"w": (8, 3, 1, 1), "v": (4, 8, 1, 1)} | shapes


def products(middle, inner="a", outer="b", **shapes):
    """A product that makes 6 neurons, what is done with them, and one that sums over the result."""
    text = f"{ROWS} {{ {inner} = MatMul (x, w) {middle} y = MatMul ({outer}, v) }}"
    return text, {"w": (5, 6), "v": (6, 4)} | shapes


HEADS = """q0 = MatMul (x, q) k0 = MatMul (x, k) v0 = MatMul (x, v)
    q1 = Reshape (q0, qs) k1 = Reshape (k0, ks) v1 = Reshape (v0, ks)
    q2 = Transpose <perm = [0, 2, 1, 3]> (q1) k2 = Transpose <perm = [0, 2, 3, 1]> (k1)
    v2 = Transpose <perm = [0, 2, 1, 3]> (v1)"""
PROJECTIONS = {"q": (16, 16), "k": (16, 16), "v": (16, 16), "o": (16, 16)}
INT = np.int64

# name: (text, shapes of random weights, other constants, feeds, opset, {weight: (kind, units, width)})
CASES = {
    "relu": (*convolutions("b = Relu (a)"), {}, X4, 20, {"w": ("channels", 8, 1)}),
    "bias": (
        f"{IMAGE} {{ a = Conv (x, w, c) b = Relu (a) y = Conv (b, v) }}",
        {"w": (8, 3, 1, 1), "c": (8,), "v": (4, 8, 1, 1)}, {}, X4, 20, {"w": ("channels", 8, 1)},
    ),
    "depthwise": (
        *convolutions("b = Conv <group = 8, pads = [1, 1, 1, 1]> (a, d, e)", d=(8, 1, 3, 3), e=(8,)),
        {}, X4, 20, {"w": ("channels", 8, 1)},
    ),
    "depthwise with a multiplier": (
        *convolutions("b = Conv <group = 8> (a, d)", d=(16, 1, 1, 1), v=(4, 16, 1, 1)),
        {}, X4, 20, {"w": ("channels", 8, 1)},
    ),
    "many groups": (
        *convolutions("b = Conv <group = 4> (a, d)", d=(12, 2, 1, 1), v=(4, 12, 1, 1)),
        {}, X4, 20, {"w": ("channels", 4, 2)},
    ),
    "few groups": (
        *convolutions("b = Conv <group = 2> (a, d)", d=(12, 4, 1, 1), v=(4, 12, 1, 1)),
        {}, X4, 20, {"w": ("channels", 4, 2), "d": ("channels", 6, 2)},
    ),
    "transposed convolution": (
        *convolutions("b = ConvTranspose <strides = [2, 2]> (a, d, e)", d=(8, 10, 2, 2), e=(10,), v=(4,
        10, 1, 1)),
        {}, X4, 20, {"w": ("channels", 8, 1), "d": ("channels", 10, 1)},
    ),
    "transposed convolution in groups": (
        *convolutions("b = ConvTranspose <group = 4> (a, d, e)", d=(8, 3, 1, 1), e=(12,), v=(4, 12, 1, 1)),
        {}, X4, 20, {"w": ("channels", 4, 2)},
    ),
    "batch normalisation": (
        *convolutions("b = BatchNormalization (a, s, t, m, p)", s=(8,), t=(8,), m=(8,)),
        {"p": np.linspace(0.5, 2, 8, dtype=np.float32)}, X4, 20, {"w": ("channels", 8, 1)},
    ),
    "instance normalisation": (
        *convolutions("b = InstanceNormalization (a, s, t)", s=(8,), t=(8,)),
        {}, X4, 20, {"w": ("channels", 8, 1)},
    ),
    "group normalisation": (
        *convolutions("b = GroupNormalization <num_groups = 4> (a, s, t)", s=(8,), t=(8,)),
        {}, X4, 21, {"w": ("channels", 4, 2)},
    ),
    "concatenation": (
        f"{IMAGE} {{ a = Conv (x, w) b = Conv (x, u) c = Concat <axis = 1> (a, x, b) y = Conv (c, v) }}",
        {"w": (8, 3, 1, 1), "u": (5, 3, 1, 1), "v": (4, 16, 1, 1)}, {}, X4, 20,
        {"w": ("channels", 8, 1), "u": ("channels", 5, 1)},
    ),
    "split": (
        *convolutions("c, d = Split <axis = 1> (a, n) b = Mul (c, d)", v=(4, 4, 1, 1)),
        {"n": INT([4, 4])}, X4, 20, {"w": ("channels", 4, 2)},
    ),
    "split without sizes": (
        *convolutions("c, d = Split <axis = 1, num_outputs = 2> (a) e = Relu (d) b = Concat <axis = 1>"
            " (c, e)"),
        {}, X4, 20, {"w": [("channels", 4, 1), ("channels", 4, 1)]},
    ),
    "slices": (
        *convolutions("c = Slice (a, z, h, one) d = Slice (a, h, e, one) g = Relu (c) b = Concat <axis"
            " = 1> (d, g)"),
        {"z": INT([0]), "h": INT([3]), "e": INT([2**62]), "one": INT([1])}, X4, 20, {"w": [("channels",
        3, 1), ("channels", 5, 1)]},
    ),
    "old slices": (
        *convolutions("b = Slice <starts = [2], ends = [6], axes = [1]> (a)", v=(4, 4, 1, 1)),
        {}, X4, 9, {"w": ("channels", 4, 1)},
    ),
    "gather of channels": (
        *convolutions("b = Gather <axis = 1> (a, i)"),
        {"i": INT([7, 6, 5, 4, 3, 2, 1, 0])}, X4, 20, {"w": ("channels", 8, 1)},
    ),
    "padding of channels": (
        *convolutions("b = Pad (a, n)", v=(4, 11, 1, 1)),
        {"n": INT([0, 1, 0, 0, 0, 2, 0, 0])}, X4, 20, {"w": ("channels", 8, 1)},
    ),
    "old padding": (
        *convolutions("b = Pad <pads = [0, 1, 0, 0, 0, 2, 0, 0]> (a)", v=(4, 11, 1, 1)),
        {}, X4, 9, {"w": ("channels", 8, 1)},
    ),
    "pooling and resizing": (
        *convolutions("c = MaxPool <kernel_shape = [2, 2]> (a) d = Resize (c, , , n) b = AveragePool"
            " <kernel_shape = [3, 3]> (d)"),
        {"n": INT([2, 8, 10, 10])}, X4, 20, {"w": ("channels", 8, 1)},
    ),
    "squeeze and excite": (
        *convolutions(
            "c = GlobalAveragePool (a) d = Conv (c, e) f = Relu (d) g = Conv (f, h) i = Sigmoid (g) b ="
            " Mul (a, i)",
            e=(3, 8, 1, 1), h=(8, 3, 1, 1),
        ), {}, X4, 20, {"w": ("channels", 8, 1), "e": ("channels", 3, 1)},
    ),
    "shuffle": (
        *convolutions(
            "c = Reshape (a, n) d = Transpose <perm = [0, 2, 1, 3, 4]> (c) b = Reshape (d, m)",
        ), {"n": INT([0, 2, 4, 6, 6]), "m": INT([0, 8, 6, 6])}, X4, 20, {"w": ("channels", 4, 2)},
    ),
    "depth to space": (
        *convolutions('b = DepthToSpace <blocksize = 2> (a)', v=(4, 2, 1, 1)),
        {}, X4, 20, {"w": ("channels", 2, 4)},
    ),
    "depth to space by columns": (
        *convolutions('b = DepthToSpace <blocksize = 2, mode = "CRD"> (a)', v=(4, 2, 1, 1)),
        {}, X4, 20, {"w": ("channels", 2, 4)},
    ),
    "space to depth": (
        *convolutions("b = SpaceToDepth <blocksize = 2> (a)", v=(4, 32, 1, 1)),
        {}, X4, 20, {"w": ("channels", 8, 1)},
    ),
    "flatten": (
        "(float[N,3,6,6] x) => (float[N,4] y) { a = Conv (x, w) b = Flatten (a) y = Gemm (b, v) }",
        {"w": (8, 3, 1, 1), "v": (288, 4)}, {}, X4, 20, {"w": ("channels", 8, 1)},
    ),
    "a residual connection": (
        *convolutions("b = Relu (a) c = Conv (b, u) d = Add (a, c)", outer="d", u=(8, 8, 1, 1)),
        {}, X4, 20, {"w": ("stream", 8, 1)},
    ),
    "transposed products": (
        f"{ROWS} {{ a = Gemm <transB = 1> (x, w, c) b = Tanh (a) y = Gemm (b, v, e) }}",
        {"w": (6, 5), "c": (6,), "v": (6, 4), "e": (1, 4)}, {}, X2, 20, {"w": ("neurons", 6, 1)},
    ),
    "a product from the left": (
        "(float[5,N] x) => (float[4,N] y) { a = MatMul (w, x) b = Relu (a) y = MatMul (v, b) }",
        {"w": (6, 5), "v": (4, 6)}, {}, {"x": case.random(4, 5, 3)}, 20, {"w": ("neurons", 6, 1)},
    ),
    "slopes and bounds": (
        *products("c = PRelu (a, s) d = Clip (c, low, high) e = Greater (a, t) b = Where (e, d, a)",
        s=(6,), t=(1, 6)),
        {"low": np.float32(-1), "high": np.float32(1)}, X2, 20, {"w": ("neurons", 6, 1)},
    ),
    "a gate from two halves": (
        f"{ROWS} {{ a = MatMul (x, w) c, d = Split <axis = -1> (a, n) e = Sigmoid (c) b = Mul (e, d) y"
        f" = MatMul (b, v) }}",
        {"w": (5, 12), "v": (6, 4)}, {"n": INT([6, 6])}, X2, 20, {"w": ("neurons", 6, 2)},
    ),
    "squeezed and unsqueezed": (
        *products("c = Unsqueeze (a, n) d = Relu (c) b = Squeeze (d, n)"),
        {"n": INT([1])}, X2, 20, {"w": ("neurons", 6, 1)},
    ),
    "copies": (
        *products("c = Shape <start = 0, end = 1> (x) d = Concat <axis = 0> (c, n) e = Expand (s, d) b"
            " = Add (a, e)"),
        {"n": INT([6]), "s": np.float32(0.5)}, X2, 20, {"w": ("stream", 6, 1)},
    ),
    "tiles": (
        *products("b = Tile (a, n)"), {"n": INT([1, 1])}, X2, 20, {"w": ("neurons", 6, 1)},
    ),
    "a transposed weight of the maker": (
        f"{ROWS} {{ u = Transpose (w) a = MatMul (x, u) b = Relu (a) y = MatMul (b, v) }}",
        {"w": (6, 5), "v": (6, 4)}, {}, X2, 20, {},
    ),
    "an einsum": (
        f"{ROWS} {{ a = Einsum <equation = \"nk,ck->nc\"> (x, w) b = Relu (a) y = Einsum <equation ="
        f" \"nc,cd->nd\"> (b, v) }}",
        {"w": (6, 5), "v": (6, 4)}, {}, X2, 20, {"w": ("neurons", 6, 1)},
    ),
    "heads": (
        f"{TOKENS} {{ {HEADS} s = MatMul (q2, k2) p = Softmax (s) c = MatMul (p, v2)"
        " d = Transpose <perm = [0, 2, 1, 3]> (c) e = Reshape (d, os) y = MatMul (e, o) }",
        PROJECTIONS, {"qs": INT([0, 0, 4, 4]), "ks": INT([0, 0, 4, 4]), "os": INT([0, 0, -1])}, X3, 20,
        {"q": ("heads", 4, 4)},
    ),
    "heads in packed projections": (
        f"{TOKENS} {{ a = MatMul (x, w) b = Reshape (a, n) c = Transpose <perm = [2, 0, 3, 1, 4]> (b)"
        " q = Gather <axis = 0> (c, zero) k = Gather <axis = 0> (c, one) v = Gather <axis = 0> (c, two)"
        " t = Transpose <perm = [0, 1, 3, 2]> (k) s = MatMul (q, t) p = Softmax (s) u = MatMul (p, v)"
        " d = Transpose <perm = [0, 2, 1, 3]> (u) e = Reshape (d, m) y = MatMul (e, o) }",
        {"w": (16, 48), "o": (16, 16)},
        {"n": INT([0, 0, 3, 4, 4]), "m": INT([0, 0, 16]), "zero": INT(0), "one": INT(1), "two": INT(2)},
        X3, 20, {"w": ("heads", 4, 12)},
    ),
    "attention": (
        f"{TOKENS} {{ a = MatMul (x, q) b = MatMul (x, k) c = MatMul (x, v)"
        " d = Attention <q_num_heads = 4, kv_num_heads = 2> (a, b, c) y = MatMul (d, o) }",
        PROJECTIONS | {"k": (16, 8), "v": (16, 8)}, {}, X3, 23, {"q": ("heads", 2, 8)},
    ),
    "attention of the runtime": (
        f"{TOKENS} {{ a = MatMul (x, q) b = MatMul (x, k) c = MatMul (x, v)"
        " d = com.microsoft.MultiHeadAttention <num_heads = 4> (a, b, c) y = MatMul (d, o) }",
        PROJECTIONS, {}, X3, 20, {"q": ("heads", 4, 4)},
    ),
}  # fmt: skip
for kind, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1)):
    CASES[kind] = (
        f"(float[S,N,5] x) => (float[S,1,N,4] y) {{ a = {kind} <hidden_size = 6> (x, w, r, c)"
        " y = MatMul (a, v) }",
        {"w": (1, gates * 6, 5), "r": (1, gates * 6, 6), "c": (1, 2 * gates * 6), "v": (6, 4)},
        {},
        {"x": case.random(93, 4, 2, 5)},
        20,
        {"w": ("neurons", 6, gates)},
    )


@pytest.mark.parametrize("name", CASES)
def test_the_units_of_an_operator_can_be_cut(name):
    text, shapes, constants, feeds, opset, expected = CASES[name]
    coupling = case.coupled(text, constants, opset, **shapes)
    found = {}
    for item in coupling.prunable:
        found.setdefault(item.name, []).append((item.kind, len(item.units), item.width))
    assert found == {key: value if isinstance(value, list) else [value] for key, value in expected.items()}
    for seed in (0, 1):
        case.agree(coupling, case.half(coupling, seed), feeds)


INPUT = "it meets an axis that no cut may change: an input's, or one of unknown size"
# name: (text, shapes, constants, opset, weight, operator, reason)
KEPT = {
    "an output": (*convolutions("b = Relu (a)"), {}, 20, "v", "output", "the graph's output has this axis"),
    "an input": (
        *convolutions("c = Concat <axis = 1> (x, x, x, a) b = Relu (c)", v=(4, 17, 1, 1)), {}, 20,
        None, "Conv", INPUT,
    ),
    "a mean over channels": (
        *products("c = ReduceMean (a, n) b = Mul (a, c)"), {"n": INT([1])}, 20, "w", "ReduceMean",
        "it reduces over this axis",
    ),
    "softmax over channels": (
        *products("b = Softmax (a)"), {}, 20, "w", "Softmax", "it normalises or sums along this axis",
    ),
    "an old softmax": (
        *products("b = Softmax <axis = 1> (a)"), {}, 11, "w", "Softmax",
        "it normalises or sums along this axis",
    ),
    "a running sum": (
        *products("b = CumSum (a, n)"), {"n": INT(1)}, 20, "w", "CumSum",
        "it normalises or sums along this axis",
    ),
    "neighbours": (
        *convolutions("b = LRN <size = 3> (a)"), {}, 20, "w", "LRN",
        "it normalises over neighbours along this axis",
    ),
    "the place of the largest": (
        *products("c = ArgMax <axis = 1> (a) d = Cast <to = 1> (c) b = Mul (a, d)"), {}, 20, "w", "ArgMax",
        "it looks for a position along this axis",
    ),
    "an unknown operator": (
        *products("b = LpNormalization (a)"), {}, 20, "w", "LpNormalization",
        "no rule says how its axes hang together",
    ),
    "a size that is read": (
        *products("s = Shape <start = 1> (a) c = Cast <to = 1> (s) b = Mul (a, c)"), {}, 20, "w", "Shape",
        "its size is read at run time",
    ),
    "positions": (
        *products("c = GatherElements <axis = 1> (a, i) b = Mul (a, c)"), {"i": INT([[0, 0, 1, 2, 5,
        5]] * 3)}, 20,
        "w", "GatherElements", "it picks positions along this axis",
    ),
    "every second": (
        *products("b = Slice (a, z, e, o, t)", v=(3, 4)),
        {"z": INT([0]), "e": INT([6]), "o": INT([1]), "t": INT([2])}, 20, "w", "Slice",
        "it takes every so many elements of this axis",
    ),
    "repeated": (
        *products("b = Tile (a, n)", v=(12, 4)), {"n": INT([1, 2])}, 20, "w", "Tile", "it repeats this axis",
    ),
    "reflected": (
        *products('b = Pad <mode = "reflect"> (a, n)', v=(8, 4)), {"n": INT([0, 1, 0, 1])}, 20, "w", "Pad",
        "it repeats or drops elements at the ends of this axis",
    ),
    "resized": (
        *convolutions("b = Resize (a, , n)", v=(4, 16, 1, 1)), {"n": np.float32([1, 2, 1, 1])}, 20,
        "w", "Resize",
        "it resizes this axis",
    ),
    "one group": (
        *convolutions("b = GroupNormalization <num_groups = 1> (a, s, t)", s=(8,), t=(8,)), {}, 21, "w",
        "GroupNormalization", "it normalises over all channels",
    ),
    "computed weights": (
        "(float[N,3,6,6] x) => (float[N,4,P,Q] y) { a = Conv (x, w) r = Relu (v) y = Conv (a, r) }",
        {"w": (8, 3, 1, 1), "v": (4, 8, 1, 1)}, {}, 20, "w", "Conv", "its weights are computed at run time",
    ),
    "two computed factors": (
        "(float[N,5] x) => (float[N,N] y) { a = MatMul (x, w) b = Transpose (a) y = MatMul (a, b) }",
        {"w": (5, 6)}, {}, 20, "w", "MatMul", "two computed tensors are multiplied over this axis",
    ),
    "a letter in three terms": (
        '(float[N,5] x) => (float[N,5] y) { a = MatMul (x, w) y = Einsum <equation = "nk,nk,kj->nj">'
        ' (a, a, v) }',
        {"w": (5, 6), "v": (6, 5)}, {}, 20, "w", "Einsum", "computed tensors are summed over this axis",
    ),
    "an ellipsis": (
        '(float[N,5] x) => (float[N,4] y) { a = MatMul (x, w) y = Einsum <equation = "...k,kj->...j">'
        ' (a, v) }',
        {"w": (5, 6), "v": (6, 4)}, {}, 20, "w", "Einsum", "its equation has no rule",
    ),
    "a folded axis": (
        "(float[N,5] x) => (float[N,4] y) { a = MatMul (x, w) b = Reshape (a, n) y = MatMul (b, v) }",
        {"w": (5, 6), "v": (4, 4)}, {"n": INT([-1, 4])}, 20, "w", "Reshape",
        "it is folded into an axis of unknown size",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_cut_says_why(name):
    text, shapes, constants, opset, weight, op, reason = KEPT[name]
    coupling = case.coupled(text, constants, opset, **shapes)
    reasons = {
        (item.blocked.op, item.blocked.reason)
        for item in coupling.groups
        if item.blocked is not None and weight in (None, item.name)
    }
    assert (op, reason) in reasons
    assert weight not in {item.name for item in coupling.prunable} - {None}


def test_a_normalisation_over_channels_changes_when_some_go():
    coupling = case.coupled(
        f"{TOKENS} {{ a = MatMul (x, w) b = LayerNormalization (a, s, t) y = MatMul (b, v) }}",
        w=(16, 8), s=(8,), t=(8,), v=(8, 16),
    )  # fmt: skip
    item = case.group(coupling, "w")
    assert (item.normalised, item.kind, len(item.units)) == (True, "stream", 8)
    assert coupling.prunable == ()
