"""What the tests of compress/ share: models in text form, plain running, quantizing with true ranges."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
from edgepress.compress.lower import apply_plan
from edgepress.compress.propose import Request, propose
from edgepress.compress.quantize.static import static_layout
from edgepress.graph.load import load_model
from edgepress.graph.passes import run_passes
from edgepress.graph.rewrite import Rewrite
from edgepress.graph.save import to_bytes
from edgepress.graph.shapes import InferShapes
from edgepress.targets.registry import load_target

X86 = "x86-64-avx512-vnni"
ARM = "raspberry-pi-5"


def random(seed, *shape, scale=1.0):
    """Normal float32 numbers."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def parse(text, weights=None, opset=20):
    """A `Model` of a graph in onnx's text form ("[name] y = Op(x)"), as loaded from a file."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>\ng {text}'
    )
    for name, array in (weights or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.onnx"
        path.write_bytes(proto.SerializeToString())
        model = load_model(path)
    run_passes(model, [InferShapes()])
    return model


def run(model, feeds, *, optimise=False, config=None):
    """Outputs in order, by default as the graph says (no optimisation by the runtime)."""
    return session(model, optimise=optimise, config=config).run(None, feeds)


def session(model, *, optimise=False, config=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    data = model if isinstance(model, bytes) else to_bytes(model)
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def operators(model):
    return Counter(node.op_type for node in model.graph.all_nodes())


def node_of(model, op_type):
    """The only node of a type."""
    (node,) = (node for node in model.graph.all_nodes() if node.op_type == op_type)
    return node


def rewrite(model, *rules):
    """Apply rules to a fork: (fork, {rule: times}, [reasons])."""
    changed = model.fork()
    (record,) = run_passes(changed, [Rewrite(rules=tuple(rules))])
    onnx.checker.check_model(onnx.load_from_string(to_bytes(changed)), full_check=True)
    return changed, record.applied, [item.reason for item in record.refused]


def assert_rewritten(model, rule, feeds_list, *, times=1, tolerance=1e-5):
    """The rule fires `times` times, changes no number, and has nothing left to do afterwards."""
    before = session(model)
    changed, applied, _ = rewrite(model, rule)
    assert applied == {rule.name: times}
    after = session(changed)
    for feeds in feeds_list:
        for wanted, found in zip(before.run(None, feeds), after.run(None, feeds), strict=True):
            assert found.dtype == wanted.dtype
            np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)
    assert (changed.inputs, changed.outputs) == (model.inputs, model.outputs)
    again, applied_again, _ = rewrite(changed, rule)
    assert applied_again == {}
    assert again.structure_hash() == changed.structure_hash()
    return changed


def assert_refused(model, rule, *reasons):
    """The rule leaves the graph alone, for exactly these reasons."""
    changed, applied, refused = rewrite(model, rule)
    assert applied == {}
    assert refused == list(reasons)
    assert changed.structure_hash() == model.structure_hash()


def plan_of(model, profile=X86, **asked):
    """A plan for a target's name or a profile."""
    profile = load_target(profile) if isinstance(profile, str) else profile
    return propose(model, profile, Request(**({"calibrated": True} | asked)))


def by_node(plan):
    return {item.node: item for item in plan.decisions}


def true_ranges(model, names, feeds_list):
    """Smallest and largest value of each tensor over all feeds."""
    watched = model.fork()
    values = {value.name: value for node in watched.graph for value in node.outputs}
    shown = [name for name in names if name in values and not values[name].is_graph_output()]
    watched.graph.outputs.extend(values[name] for name in shown)
    runner = session(watched)
    found: dict[str, tuple[float, float]] = {}
    for feeds in feeds_list:
        results = dict(
            zip((item.name for item in runner.get_outputs()), runner.run(None, feeds), strict=True)
        )
        for name in names:
            array = (results | feeds)[name]
            low, high = found.get(name, (np.inf, -np.inf))
            found[name] = min(low, float(array.min())), max(high, float(array.max()))
    return found


def quantized(model, plan, feeds_list=()):
    """The plan carried out with true ranges."""
    observed = static_layout(model, plan.decisions).observed
    ranges = true_ranges(model, observed, feeds_list) if observed else {}
    lowered, _ = apply_plan(model, plan, ranges)
    onnx.checker.check_model(onnx.load_from_string(to_bytes(lowered)), full_check=True)
    return lowered


def sqnr_db(reference, found):
    noise = float(np.square(reference.astype(np.float64) - found).sum())
    return (
        np.inf if noise == 0 else 10 * np.log10(float(np.square(reference.astype(np.float64)).sum()) / noise)
    )


def relative_l2(reference, found):
    return float(np.linalg.norm(reference - found) / np.linalg.norm(reference))


def changed(profile, name, **fields):
    """A profile with some fields of one kernel replaced."""
    kernels = tuple(
        msgspec.structs.replace(kernel, **fields) if kernel.name == name else kernel
        for kernel in profile.kernels
    )
    return msgspec.structs.replace(profile, kernels=kernels)


def without(profile, *names):
    """A profile without some kernels."""
    kernels = tuple(kernel for kernel in profile.kernels if kernel.name not in names)
    return msgspec.structs.replace(profile, kernels=kernels)


def _conv_weights(**shapes):
    """Weights and biases by name: {"w": (8, 4, 3, 3), "b": (8,)}."""
    return {name: random(place, *shape, scale=0.3) for place, (name, shape) in enumerate(shapes.items())}


IN, OUT = "(float[N,4,8,8] x)", "(float[N,O,P,Q] y)"
_W = _conv_weights(w=(8, 4, 3, 3), b=(8,), v=(8, 8, 3, 3), c=(8,))


def _cnn(body, outputs=OUT, more=None):
    """(text, weights) of a net on 4 x 8 x 8 images; SAME keeps the size of a 3 x 3 convolution."""
    return f"{IN} => {outputs} {{ {body} }}".replace("SAME", "<pads = [1, 1, 1, 1]>"), _W | (more or {})


_FIRST, _LAST = "[c1] a = Conv SAME (x, w, b)", "[c2] y = Conv SAME (r, v, c)"
ZOO = {
    "relu": _cnn(f"{_FIRST} r = Relu(a) {_LAST}"),
    "no-bias": _cnn("[c1] a = Conv SAME (x, w) r = Relu(a) [c2] y = Conv SAME (r, v)"),
    "clip": _cnn(
        f"{_FIRST} r = Clip(a, low, high) {_LAST}", more={"low": np.float32(0), "high": np.float32(1.5)}
    ),
    "grouped": _cnn(
        f"{_FIRST} r = Relu(a) [c2] y = Conv <pads = [1, 1, 1, 1], group = 2> (r, v, c)",
        more=_conv_weights(v=(8, 4, 3, 3)),
    ),
    "depthwise": _cnn(
        f"{_FIRST} r = Relu(a) [c2] d = Conv <pads = [1, 1, 1, 1], group = 8> (r, v, c) s = Relu(d)"
        " [c3] y = Conv(s, p)",
        more=_conv_weights(v=(8, 1, 3, 3), p=(8, 8, 1, 1)),
    ),
    "leaky": _cnn(f"{_FIRST} [l] r = LeakyRelu(a) {_LAST}"),
    "average-pool": _cnn(
        f"{_FIRST} q = Relu(a) [p] r = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (q) {_LAST}"
    ),
    "max-pool": _cnn(
        f"{_FIRST} r = Relu(a) q = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)"
        " [c2] y = Conv SAME (q, v, c)"
    ),
    "concat": _cnn(
        f"{_FIRST} r = Relu(a) [c2] s = Conv SAME (r, v, c) [k] t = Concat <axis = 1> (r, s)"
        " [c3] y = Conv(t, p)",
        more=_conv_weights(p=(8, 16, 1, 1)),
    ),
    "hard-swish": _cnn(f"{_FIRST} r = HardSwish(a) {_LAST}"),
    "hard-swish-parts": _cnn(
        f"{_FIRST} [plus] t = Add(a, three) k = Clip(t, low, six) [times] m = Mul(a, k)"
        f" [scaled] r = Mul(m, sixth) {_LAST}",
        more={"three": np.float32(3), "low": np.float32(0), "six": np.float32(6), "sixth": np.float32(1 / 6)},
    ),
    "silu": _cnn(f"{_FIRST} [s] g = Sigmoid(a) [m] r = Mul(a, g) {_LAST}"),
    "residual": _cnn(
        f"{_FIRST} r = Relu(a) [c2] d = Conv SAME (r, v, c) [add] t = Add(d, r) u = Relu(t)"
        " [c3] y = Conv SAME (u, v, c)"
    ),
    "two-heads": _cnn(
        f"{_FIRST} r = Relu(a) {_LAST} [c3] z = Conv <strides = [2, 2]> (r, p)",
        "(float[N,O,P,Q] y, float[N,R,S,T] z)",
        _conv_weights(p=(8, 8, 3, 3)),
    ),
    "output-in-the-middle": _cnn(f"{_FIRST} r = Relu(a) {_LAST}", "(float[N,O,P,Q] y, float[N,8,8,8] a)"),
    "pool-first": _cnn(
        "q = MaxPool <kernel_shape = [2, 2]> (x) [c1] a = Conv SAME (q, w, b) r = Relu(a)"
        " [c2] y = Conv SAME (r, v, c)"
    ),
    "squeeze-excite": _cnn(
        f"{_FIRST} r = Relu(a) [p] q = GlobalAveragePool(r) [c2] e = Conv(q, f) [s] g = Sigmoid(e)"
        " [m] t = Mul(r, g) [c3] y = Conv SAME (t, v, c)",
        more=_conv_weights(f=(8, 8, 1, 1)),
    ),
    "classifier": _cnn(
        "[c1] a = Conv (x, w, b) r = Relu(a) [p] q = GlobalAveragePool(r) f = Flatten(q)"
        " [g1] h = Gemm <transB = 1> (f, m, n) k = Relu(h) [g2] l = Gemm(k, o, e) y = Softmax(l)",
        "(float[N,32] y)",
        _conv_weights(m=(256, 8), n=(256,), o=(256, 32), e=(32,)),
    ),
    "matmul-3d": (
        "(float[N,S,64] x) => (float[N,S,64] y) { [m1] a = MatMul(x, w) d = Add(a, b) g = Gelu(d)"
        " [m2] e = MatMul(g, v) f = Add(e, b) y = Add(f, x) }",
        _conv_weights(w=(64, 64), b=(64,), v=(64, 64)),
    ),
}


def zoo(name):
    """(model, feeds) of one tiny net."""
    text, weights = ZOO[name]
    used = {key: array for key, array in weights.items() if f"({key}" in text or f" {key}" in text}
    shape = (2, 16, 64) if "S,64] x" in text else (4, 4, 8, 8)
    return parse(text, used), [{"x": random(100 + seed, *shape)} for seed in range(2)]
