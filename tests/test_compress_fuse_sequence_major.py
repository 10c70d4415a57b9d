"""Attention sequence first: the same numbers at several shapes, fewer copies in the runtime, refusals."""

import compress_case as case
import numpy as np
import onnx
import pytest
from edgepress.compress.fuse.sequence_major import SEQUENCE_MAJOR, SequenceMajor
from edgepress.graph.passes import run_passes
from edgepress.graph.save import to_bytes

H = 8
VECTORS = ("gamma", "beta", "bq", "bk", "bv", "bo", "bd")
WEIGHTS = (
    {name: case.random(place, H, scale=0.4) for place, name in enumerate(VECTORS)}
    | {name: case.random(20 + place, H, H, scale=0.4) for place, name in enumerate(("wq", "wk", "wv", "wo"))}
    | {
        "wu": case.random(30, H, 16, scale=0.4),
        "wd": case.random(31, 16, H, scale=0.4),
        "table": case.random(32, 11, H),
        "places": case.random(33, 1, 6, H),
    }
)


def attention(source, result, tag=""):
    """Self-attention of two heads with a residual connection and a normalization."""
    return f"""
    q{tag}m = MatMul({source}, wq) q{tag}a = Add(q{tag}m, bq) q{tag}r = Reshape(q{tag}a, heads)
    q{tag} = Transpose <perm = [0, 2, 1, 3]> (q{tag}r)
    k{tag}m = MatMul({source}, wk) k{tag}a = Add(k{tag}m, bk) k{tag}r = Reshape(k{tag}a, heads)
    k{tag} = Transpose <perm = [0, 2, 3, 1]> (k{tag}r)
    v{tag}m = MatMul({source}, wv) v{tag}a = Add(v{tag}m, bv) v{tag}r = Reshape(v{tag}a, heads)
    v{tag} = Transpose <perm = [0, 2, 1, 3]> (v{tag}r)
    s{tag} = MatMul(q{tag}, k{tag}) p{tag} = Softmax <axis = -1> (s{tag}) c{tag} = MatMul(p{tag}, v{tag})
    t{tag} = Transpose <perm = [0, 2, 1, 3]> (c{tag}) j{tag} = Reshape(t{tag}, joined)
    o{tag}m = MatMul(j{tag}, wo) o{tag} = Add(o{tag}m, bo) e{tag} = Add(o{tag}, {source})
    {result} = LayerNormalization <axis = 2> (e{tag}, gamma, beta)"""


FORWARD = """fm = MatMul(n, wu) fu = Gelu(fm) fd = MatMul(fu, wd) fa = Add(fd, bd) fe = Add(fa, n)
    y = LayerNormalization <axis = -1> (fe, gamma, beta)"""
SIZES = "<int64[4] heads = {0, 0, 2, 4}, int64[3] joined = {0, 0, 8}>"


def parse(body, inputs="float[B,S,8] x", output="float[B,S,8] y"):
    used = {
        name: array for name, array in WEIGHTS.items() if any(f"{sep}{name}" in body for sep in ("(", " "))
    }
    return case.parse(f"({inputs}) => ({output}) {SIZES} {{ {body} }}", used)


def arrays(*shapes):
    return [{"x": case.random(40 + place, *shape, H)} for place, shape in enumerate(shapes)]


def turned(model, feeds_list, *, tolerance=1e-5):
    """The fork that the pass made, equal on all feeds and left alone by a second run."""
    changed = model.fork()
    (record,) = run_passes(changed, [SequenceMajor()])
    assert record.applied == {SEQUENCE_MAJOR: 1}
    assert (changed.inputs, changed.outputs) == (model.inputs, model.outputs)
    onnx.checker.check_model(onnx.load_from_string(to_bytes(changed)), full_check=True)
    for feeds in feeds_list:
        for wanted, found in zip(case.run(model, feeds), case.run(changed, feeds), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)
    again = changed.fork()
    assert run_passes(again, [SequenceMajor()])[0].applied == {}
    return changed


SHAPES = arrays((1, 5), (3, 4), (2, 1), (4, 6))


def test_an_encoder_layer():
    model = parse(attention("x", "n") + FORWARD)
    changed = turned(model, SHAPES)
    ranks = {node.op_type: len(node.outputs[0].shape) for node in changed.graph if node.op_type == "Gelu"}
    assert ranks == {"Gelu": 2}


def test_two_layers_share_their_sizes():
    changed = turned(parse(attention("x", "n", "1") + attention("n", "y", "2")), SHAPES)
    assert case.operators(changed)["Shape"] == 1
    assert case.operators(changed)["Transpose"] == 10  # eight of heads, one in, one out


def test_the_runtime_turns_no_queries_keys_or_values_any_more():
    model = parse(attention("x", "n", "1") + attention("n", "y", "2"))
    assert turns_left(model) > turns_left(turned(model, SHAPES)) == 4


def turns_left(model):
    import tempfile
    from pathlib import Path

    from edgepress.graph.save import save_model
    from edgepress.runtimes.ort_runtime import optimised_graph

    with tempfile.TemporaryDirectory() as folder:
        (file,) = save_model(model, Path(folder) / "model.onnx", with_shapes=False)
        return case.operators(type("Opened", (), {"graph": optimised_graph(file).graph})())["Transpose"]


def test_ids_are_turned_instead_of_what_is_looked_up():
    body = "g = Gather(table, ids) x = Add(g, places)" + attention("x", "n") + FORWARD
    model = parse(body, "int64[B,6] ids")
    feeds = [{"ids": np.random.default_rng(batch).integers(0, 11, (batch, 6))} for batch in (1, 3)]
    changed = turned(model, feeds)
    assert [
        list(value.shape) for node in changed.graph if node.op_type == "Gather" for value in node.outputs
    ] == [[6, "B", 8]]


def test_what_others_read_is_turned_back():
    body = attention("x", "n", "1") + attention("n", "z", "2") + "r = Neg(z) y = ReduceMax <axes = [1]> (r)"
    body += " f = Gather <axis = 1> (n, first) w = Tanh(z)"
    outputs = "float[B,1,8] y, float[B,8] f, float[B,S,8] w"
    text = f"(float[B,S,8] x) => ({outputs}) {SIZES[:-1]}, int64 first = {{0}}> {{ {body} }}"
    used = {name: array for name, array in WEIGHTS.items() if f" {name}" in body or f"({name}" in body}
    turned(case.parse(text, used, 17), SHAPES)


def test_fixed_sizes_need_no_shape_arithmetic():
    model = parse(attention("x", "n") + FORWARD, "float[3,4,8] x", "float[3,4,8] y")
    assert "Shape" not in case.operators(turned(model, arrays((3, 4))))


def test_a_body_that_reads_the_stream_gets_it_as_it_was():
    body = attention("x", "n") + FORWARD.replace("y =", "l =")
    body += """ y = If (f) <
        then_branch = t () => (float[B,S,8] y1) { y1 = ReduceSum <keepdims = 1> (l, one) },
        else_branch = e () => (float[B,S,8] y2) { y2 = Neg(l) }>"""
    text = f"(bool f, float[B,S,8] x) => (float[B,T,8] y) {SIZES[:-1]}, int64[1] one = {{1}}> {{ {body} }}"
    used = {name: array for name, array in WEIGHTS.items() if f" {name}" in body or f"({name}" in body}
    model = case.parse(text, used)
    for flag in (True, False):
        turned(model, [{"f": np.array(flag), **feeds} for feeds in SHAPES])


def test_the_plan_knows_how_many_rows_there_are():
    changed = turned(parse(attention("x", "n") + FORWARD), SHAPES)
    products = [node for node in changed.graph if node.op_type == "MatMul" and node.inputs[1].name == "wu"]
    assert products[0].outputs[0].shape[0].evaluate({"B": 3, "S": 5}) == 15


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        # Every product has a Softmax over the sequence around it: each would have to be turned back.
        (
            attention("x", "n").replace("qm = MatMul(x, wq)", "i = Softmax <axis = 1> (x) qm = MatMul(i, wq)")
            .replace("km = MatMul(x, wk)", "l = CumSum(x, axis) km = MatMul(l, wk)")
            + "z = Softmax <axis = 1> (n) y = Add(z, x)",
            "turning what goes in and out would cost more than it saves",
        ),
    ],
)  # fmt: skip
def test_where_it_would_not_pay(body, reason):
    text = f"(float[B,S,8] x) => (float[B,S,8] y) {SIZES[:-1]}, int64 axis = {{1}}> {{ {body} }}"
    used = {name: array for name, array in WEIGHTS.items() if f" {name}" in body or f"({name}" in body}
    model = case.parse(text, used)
    (record,) = run_passes(model, [SequenceMajor()])
    assert record.applied == {}
    assert [item.reason for item in record.refused] == [reason]


@pytest.mark.parametrize(
    "body",
    [
        "y = LayerNormalization <axis = -1> (x, gamma, beta)",  # no attention
        attention("x", "n").replace("axis = 2> (e", "axis = 1> (e").replace("gamma, beta)", "full)")
        + "y = Relu(n)",
    ],
)
def test_what_is_no_stream(body):
    used = WEIGHTS | {"full": case.random(50, 4, H)}
    used = {name: array for name, array in used.items() if f" {name}" in body or f"({name}" in body}
    model = case.parse(f"(float[3,4,8] x) => (float[3,4,8] y) {SIZES} {{ {body} }}", used)
    before = case.run(model, arrays((3, 4))[0])
    run_passes(model, [SequenceMajor()])
    np.testing.assert_allclose(case.run(model, arrays((3, 4))[0])[0], before[0], rtol=1e-5, atol=1e-5)
