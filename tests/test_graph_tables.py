"""Which inputs index a table, and how many rows it has."""

import numpy as np
import pytest
import zoo
from edgepress.graph.tables import index_bounds
from onnx import numpy_helper


def bounds(text, **tables):
    proto = zoo.parse(text)
    for name, array in tables.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return index_bounds(zoo.load(proto))


TABLE = np.zeros((30, 4), np.float32)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("y = Gather(t, i)", {"i": 30}),
        ("y = Gather <axis = 1> (t, i)", {"i": 4}),
        ("y = Gather <axis = -1> (t, i)", {"i": 4}),
        ("c = Cast <to = 6> (i)  r = Reshape(c, s)  y = Gather(t, r)", {"i": 30}),
        ("a = Gather(t, i)  b = Gather(u, i)  y = Add(a, b)", {"i": 7}),
        ("n = Identity(t)  y = Gather(n, i)", {"i": 30}),
        ("y = Gather(i, s)", {}),
        ("a = Add(i, s)  y = Gather(t, a)", {}),
        ("y = Neg(i)", {}),
    ],
)
def test_bounds(body, found):
    text = f"g (int64[N] i) => (float[A,B] y) {{ {body} }}"
    small = np.zeros((7, 4), np.float32)
    assert bounds(text, t=TABLE, u=small, s=np.array([-1], np.int64)) == found


def test_a_table_that_is_stored_quantized():
    text = "g (int64[N] i) => (float[N,4] y) { d = DequantizeLinear(q, s, z)  y = Gather(d, i) }"
    parts = {"q": TABLE.astype(np.uint8), "s": np.array(1, np.float32), "z": np.array(0, np.uint8)}
    assert bounds(text, **parts) == {"i": 30}


def test_a_table_that_is_fed_has_no_known_size():
    assert bounds("g (int64[N] i, float[M,4] t) => (float[N,4] y) { y = Gather(t, i) }") == {}


def test_lookups_in_a_branch_count():
    text = """g (int64[N] i, bool c) => (float[N,4] y) {
        y = If (c) <then_branch = a () => (float[N,4] o) { o = Gather(t, i) },
                    else_branch = b () => (float[N,4] p) { p = Gather(u, i) }> }"""
    assert bounds(text, t=TABLE, u=np.zeros((9, 4), np.float32)) == {"i": 9}
