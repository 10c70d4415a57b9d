"""Tiny named models in ONNX's text form, and what every test of graph/ does with a model."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from edgepress.graph.load import load_model
from edgepress.graph.passes import run_passes
from edgepress.graph.save import to_bytes
from onnx.reference import ReferenceEvaluator

SIZES = ({"N": 2, "M": 3, "S": 5}, {"N": 1, "M": 1, "S": 1}, {"N": 3, "M": 4, "S": 2})


def parse(text, opset=17, ir_version=8):
    """A model from its text; the header may be left out."""
    if not text.lstrip().startswith("<"):
        text = f'<ir_version: {ir_version}, opset_import: ["" : {opset}, "com.microsoft" : 1]> {text}'
    proto = onnx.parser.parse_model(text)
    for node in proto.graph.node:  # the text form cannot say that something is left out
        node.input[:] = ["" if name == "omitted" else name for name in node.input]
        node.output[:] = ["" if name == "omitted" else name for name in node.output]
    return proto


def load(model, opset=17):
    """A `Model` from text or from a protobuf."""
    proto = parse(model, opset) if isinstance(model, str) else model
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(proto.SerializeToString())
        return load_model(path)


def apply(model, *passes):
    """Run passes; returns the last one's record."""
    return run_passes(model, passes)[-1]


def operators(model):
    """The operators in order, those of subgraphs behind their node."""
    return [node.op_type for node in model.graph.all_nodes()]


def feeds(proto, sizes, seed=0):
    """Random inputs for a model whose dynamic axes have the given sizes."""
    random = np.random.default_rng(seed)
    weights = {tensor.name for tensor in proto.graph.initializer}
    made = {}
    for value in proto.graph.input:
        if value.name in weights:
            continue
        kind = value.type.tensor_type
        shape = [
            dim.dim_value if dim.HasField("dim_value") else sizes[dim.dim_param] for dim in kind.shape.dim
        ]
        made[value.name] = _random(kind.elem_type, shape, random)
    return made


def _random(elem_type, shape, random):
    if elem_type == onnx.TensorProto.STRING:
        return random.choice(np.array(["a", "bc", "ü"], object), shape)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(elem_type)
    if dtype.kind == "f":
        return random.standard_normal(shape).astype(dtype)
    return np.asarray(random.integers(0, 2 if dtype.kind == "b" else 4, shape)).astype(dtype)


def run(model, inputs):
    """The outputs of a `Model`, protobuf or bytes in onnxruntime, with none of its own optimisations."""
    import onnxruntime

    if not isinstance(model, bytes):
        model = model.SerializeToString() if isinstance(model, onnx.ModelProto) else to_bytes(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def assert_same(proto, model, sizes=SIZES, *, reference=True):
    """The changed model is valid, has the same inputs and outputs, and computes the same."""
    onnx.checker.check_model(onnx.load_from_string(to_bytes(model)))
    assert interface(onnx.load_from_string(to_bytes(model))) == interface(proto)
    for seed, size in enumerate(sizes):
        inputs = feeds(proto, size, seed)
        wanted = ReferenceEvaluator(proto).run(None, inputs) if reference else run(proto, inputs)
        for expected, found in zip(map(np.asarray, wanted), run(model, inputs), strict=True):
            assert found.shape == expected.shape
            assert found.dtype.kind == "O" or found.dtype == expected.dtype
            if expected.dtype.kind == "f":
                np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)
            else:
                np.testing.assert_array_equal(found, expected)


def interface(proto):
    """Names, order, types and shapes of inputs (weights left out) and outputs."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in weights]
    return [
        (value.name, value.type.SerializeToString(deterministic=True))
        for value in (*inputs, *proto.graph.output)
    ]


# Models with a trap each; every one goes through every pass.
ZOO = {
    "two consumers": """g (float[N,4] x) => (float[N,4] y, float[N,4] z) <float[1] one = {1}> {
        a = Mul(x, one)  y = Relu(a)  z = Neg(a) }""",
    "tied weights": """g (float[N,2] x) => (float[N,2] y) <float[2,2] w = {1,2,3,4}> {
        t = Transpose(w)  a = MatMul(x, t)  y = MatMul(a, w) }""",
    "weight behind identity twice": """g (float[N,2] x) => (float[N,2] y) <float[2,2] w = {1,2,3,4}> {
        i = Identity(w)  a = MatMul(x, i)  j = Identity(w)  b = MatMul(a, j)  y = MatMul(b, w) }""",
    "the output is the input": """g (float[N,2] x) => (float[N,2] y) <float zero = {0}> {
        y = Add(x, zero) }""",
    "one value, three outputs": """g (float[N,2] x) => (float[N,2] p, float[N,2] q, float[N,2] r) {
        p = Relu(x)  q = Relu(x)  r = Identity(p) }""",
    "an output that others read": """g (float[N,2] x) => (float[N,2] y, float[N,2] z) <float one = {1}> {
        a = Relu(x)  y = Mul(a, one)  z = Neg(y) }""",
    "constant output": """g (float[N,2] x) => (float[2] y, float[N,2] z)
        <float[2] a = {1,2}, float[2] b = {3,4}> { y = Add(a, b)  z = Relu(x) }""",
    "weight as output": """g (float[N,2] x) => (float[2] w, float[N,2] z) <float[2] w = {1,2}> {
        z = Add(x, w) }""",
    "captures in a branch": """g (float[N,2] x, bool c) => (float[N,2] y) <float one = {1}> {
        a = Exp(x)  b = Mul(a, one)  d = Mul(x, one)
        y = If (c) <then_branch = t () => (float[N,2] o) { o = Neg(b) },
                    else_branch = e () => (float[N,2] o) { o = Mul(d, one) }> }""",
    "captures only in a branch of a dead node": """g (float[N,2] x, bool c) => (float[N,2] y) {
        a = Exp(x)
        u = If (c) <then_branch = t () => (float[N,2] o) { o = Neg(a) },
                    else_branch = e () => (float[N,2] p) { p = Identity(a) }>
        y = Relu(x) }""",
    "constant conditions": """g (float[N] x) => (float[N] z) <bool yes = {1}, bool no = {0}> {
        a = If (yes) <then_branch = t () => (float[N] o) { t = Neg(x) o = Abs(t) },
                      else_branch = e () => (float[N] o) { o = Identity(x) }>
        b = If (no) <then_branch = t () => (float[N] o) { t = Exp(x) o = Relu(t) },
                     else_branch = e () => (float[N] o) <float[1] k = {5}> { t = Mul(x, k) o = Sqrt(t) }>
        z = Add(a, b) }""",
    "a loop that captures": """g (float[N] x, int64 trips) => (float[N] y) <bool go = {1}, float one = {1}> {
        w = Mul(x, one)
        y = Loop (trips, go, x) <body = b (int64 i, bool c, float[N] s) => (bool d, float[N] t) {
            d = Identity(c)  u = Mul(w, one)  v = Transpose(u)  t = Add(s, v) }> }""",
    "a scan": """g (float[N] s, float[M,N] x) => (float[N] e, float[M,N] y) <float zero = {0}> {
        e, y = Scan (s, x) <num_scan_inputs = 1, body = b (float[N] a, float[N] r) =>
          (float[N] o, float[N] p) { q = Add(r, zero)  o = Add(a, q)  p = Identity(o) }> }""",
    "omitted outputs": """g (float[S,N,2] x) => (float[1,N,3] h)
        <float[1,3,2] w = {1,2,3,4,5,6}, float[1,3,3] r = {1,0,0,0,1,0,0,0,1}> {
        omitted, h = RNN <hidden_size = 3> (x, w, r) }""",
    "unused optional outputs": """g (float[N,1,4,4] x) => (float[N,1,2,2] y) {
        y, i = MaxPool <kernel_shape = [2,2], strides = [2,2]> (x) }""",
    "strings": """g (string[N] x) => (string[N] y, string[P] z) {
        i = Identity(x)  y = Identity(i)  k = Constant <value_strings = ["bc", "ü"]> ()
        z = Concat <axis = 0> (i, k) }""",
    "integers": """g (int64[N] x) => (int64[N] y) <int64 zero = {0}, int64[1] one = {1}, int64[2] c = {-7, 7},
        int64 two = {2}> { a = Add(x, zero)  b = Div(a, one)  q = Div(c, two)
        s = ReduceSum <keepdims = 0> (q)  y = Add(b, s) }""",
    "names like fresh ones": """g (float[N,M] axes, float[N,M] x) => (float[1,1,N,M] y)
        <int64[1] axes_1 = {0}, float[1] axes_2 = {3}> {
        b = Add(axes, axes_2)  c = Mul(b, x)  t = Unsqueeze(c, axes_1)  y = Unsqueeze(t, axes_1) }""",
    "a shape chain": """g (float[N,M,6] x) => (float[N,M,2,3] y) <int64[1] i = {0}, int64[1] j = {1},
        int64[2] k = {2,3}> { s = Shape(x)  a = Gather(s, i)  b = Gather(s, j)
        t = Concat <axis = 0> (a, b, k)  u = Reshape(x, t)  v = Shape(u)  y = Reshape(u, v) }""",
    "an empty tensor": """g (float[N,0] x) => (float[N,0] y) <float one = {1}> {
        a = Mul(x, one)  y = Relu(a) }""",
}
