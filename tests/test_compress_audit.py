"""The audit: what the runtime really makes of a plan, without false praise and without false alarms."""

import compress_case as case
import msgspec
import numpy as np
import pytest
from edgepress.compress.audit import INTEGER_OPS, Audit, Finding, audit, demote_silent_floats
from edgepress.compress.plan import Decision, Plan
from edgepress.graph.save import save_model
from edgepress.graph.scheme import Scheme
from edgepress.targets.registry import load_target

TARGETS = (case.X86, case.ARM)


def audited(model, plan, feeds, target, tmp_path):
    lowered = case.quantized(model, plan, feeds)
    save_model(lowered, tmp_path / "m.onnx")
    profile = load_target(target) if isinstance(target, str) else target
    return audit(tmp_path / "m.onnx", plan, profile)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "name", ["residual", "classifier", "concat", "silu", "average-pool", "leaky", "matmul-3d"]
)
def test_integer_kernels_are_recognised(name, target, tmp_path):
    model, feeds = case.zoo(name)
    plan = case.plan_of(model, target, quantization="static")
    result = audited(model, plan, feeds, target, tmp_path)
    assert result.silent_floats == ()
    assert result.unplanned == ()
    assert [item.node for item in result.findings] == [item.node for item in plan.quantized()]


def test_every_runtime_op_of_the_profiles_is_recognised(tmp_path):
    """The kernels that can be planned: each form and operator has a net above or here that shows its name."""
    shown = set()
    for name in ("residual", "classifier", "concat", "silu", "average-pool", "leaky", "matmul-3d"):
        model, feeds = case.zoo(name)
        plan = case.plan_of(model, quantization="static")
        shown |= {item.runtime_op for item in audited(model, plan, feeds, case.X86, tmp_path).findings}
    for quantization in ("dynamic", "weight-only", "static"):
        for text in (CHAIN, SHARED):
            model, feeds = chain(text)
            plan = case.plan_of(model, quantization=quantization)
            result = audited(model, plan, feeds, case.X86, tmp_path)
            assert result.silent_floats == ()
            shown |= {item.runtime_op for item in result.findings}
    planned = {
        "MatMul",
        "Gemm",
        "Conv",
        "Add",
        "Mul",
        "Concat",
        "AveragePool",
        "GlobalAveragePool",
        "LeakyRelu",
    }
    profile = load_target(case.X86)
    promised = {
        op
        for kernel in profile.kernels
        if kernel.op in planned | {"Sigmoid", "Gather"} and kernel.grade != "refused"
        for op in kernel.runtime_ops
    }
    assert promised - shown <= {"MatMulInteger"}  # what is left only where no Mul follows it
    assert shown <= promised
    assert shown - INTEGER_OPS == {"Gather"}


CHAIN = """(float[N,S,64] x, int64[N] i) => (float[N,S,64] y) { [g] e = Gather(t, i) f = Unsqueeze(e, axis)
    h = Add(x, f) [m1] a = MatMul(h, w) d = Add(a, b) k = Gelu(d) [m2] c = MatMul(k, v) [m3] y =
    MatMul(c, v) }"""
SHARED = CHAIN.replace("k = Gelu(d) [m2] c = MatMul(k, v)", "k = Gelu(d) [m2] r = MatMul(h, v) c = Add(k, r)")


def chain(text=CHAIN):
    weights = {"t": case.random(0, 100, 64), "w": case.random(1, 64, 64), "b": case.random(2, 64)}
    weights |= {"v": case.random(3, 64, 64), "axis": np.array([1])}
    return case.parse(text, weights), [{"x": case.random(4, 2, 3, 64), "i": np.array([1, 99])}]


def conv_relu(symmetric):
    text = (
        "(float[N,4,8,8] x) => (float[N,8,6,6] y) { [c1] a = Conv(x, w, b) r = Relu(a) [c2] y = Conv(r, v) }"
    )
    text = text.replace("8,6,6] y", "8,4,4] y")
    weights = {"w": case.random(0, 8, 4, 3, 3), "b": case.random(1, 8), "v": case.random(2, 8, 8, 3, 3)}
    model = case.parse(text, weights)
    plan = case.plan_of(model, case.ARM, quantization="static")
    scheme = Scheme(dtype="int8", symmetric=symmetric)
    decisions = tuple(msgspec.structs.replace(item, activation=scheme) for item in plan.decisions)
    return model, plan.with_decisions(decisions), [{"x": case.random(3, 2, 4, 8, 8)}]


def test_a_symmetric_zero_point_that_leaves_the_relu_in_float_is_found(tmp_path):
    """With the middle as zero point the Relu is not absorbed, and Conv + Relu computes in float."""
    model, plan, feeds = conv_relu(symmetric=True)
    result = audited(model, plan, feeds, case.ARM, tmp_path)
    assert [(item.node, item.integer) for item in result.findings] == [("c1", False), ("c2", True)]
    assert result.findings[0].runtime_op in ("Conv", "FusedConv")
    demoted = demote_silent_floats(plan, result)
    by_name = case.by_node(demoted)
    assert by_name["c1"].form == "float"
    assert by_name["c1"].activation is by_name["c1"].weight_scheme is None
    assert by_name["c1"].reason == (
        "the runtime does not turn it into an integer kernel "
        f"(its optimised graph has {result.findings[0].runtime_op})"
    )
    assert by_name["c2"] == case.by_node(plan)["c2"]
    again = audited(model, demoted, feeds, case.ARM, tmp_path)
    assert again.silent_floats == ()
    assert again.operators["QLinearConv"] == 1


def test_the_same_net_with_a_free_zero_point_has_nothing_to_find(tmp_path):
    model, plan, feeds = conv_relu(symmetric=False)
    result = audited(model, plan, feeds, case.ARM, tmp_path)
    assert result.silent_floats == ()
    assert demote_silent_floats(plan, result) == plan


QUANTIZED_X = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
STORED = {
    "w.int8": np.ones((64, 64), np.int8),
    "w.s": np.full(64, 0.01, np.float32),
    "w.z": np.zeros(64, np.int8),
    "s": np.float32(0.05),
    "z": np.uint8(128),
}


def stored(**more):
    return {name.replace(".", "_"): array for name, array in STORED.items()} | more


def rename(model):
    """onnx's text form has no dots in names: w_int8 becomes w.int8."""
    for value in list(model.graph.initializers.values()):
        if value.name == "w_int8":
            model.graph.initializers.pop("w_int8")
            value.name = value.const_value.name = "w.int8"
            model.graph.register_initializer(value)
    return model


def audit_by_hand(text, planned, tmp_path, **more):
    model = rename(case.parse(text, stored(**more)))
    save_model(model, tmp_path / "m.onnx")
    decisions = tuple(
        Decision(node=node, op=op, group=node, form="static", weight=weight, reason="")
        for node, op, weight in planned
    )
    plan = Plan(target="t", precision="int8", quantization="static", decisions=decisions)
    return plan, audit(tmp_path / "m.onnx", plan, load_target(case.X86))


def test_a_gemm_with_only_its_input_quantized_is_found(tmp_path):
    text = f"""(float[N,64] x) => (float[N,64] y) {{ {QUANTIZED_X} e = DequantizeLinear <axis = 0>
    (w_int8, w_s, w_z)
        [g1] y = Gemm <transB = 1> (d, e, b) }}"""
    plan, result = audit_by_hand(text, [("g1", "Gemm", "w")], tmp_path, b=case.random(0, 64))
    assert result.findings == (Finding(node="g1", runtime_op="Gemm", integer=False),)
    assert demote_silent_floats(plan, result).quantization == "none"
    assert demote_silent_floats(plan, result).precision == "fp32"


def test_a_float_gemm_made_of_matmul_and_add_is_named(tmp_path):
    text = f"""(float[N,64] x) => (float[N,64] y) {{ {QUANTIZED_X} e = DequantizeLinear <axis = 1>
    (w_int8, w_s, w_z)
        [m1] a = MatMul(d, e) y = Add(a, b) }}"""
    _, result = audit_by_hand(text, [("m1", "MatMul", "w")], tmp_path, b=case.random(0, 64))
    assert result.findings == (Finding(node="m1", runtime_op="Gemm", integer=False),)


def test_a_tied_weight_with_one_reader_in_float(tmp_path):
    """m2's name is gone and its weight has an integer reader as well: that proves nothing."""
    text = f"""(float[N,64] x) => (float[N,64] y, float[N,64] u) {{ {QUANTIZED_X}
        e = DequantizeLinear <axis = 1> (w_int8, w_s, w_z) [m1] y = MatMul(d, e)
        f = DequantizeLinear <axis = 1> (w_int8, w_s, w_z) [m2] a = MatMul(d, f) u = Add(a, b) }}"""
    planned = [("m1", "MatMul", "w"), ("m2", "MatMul", "w")]
    _, result = audit_by_hand(text, planned, tmp_path, b=case.random(0, 64))
    assert result.findings == (
        Finding(node="m1", runtime_op="MatMulIntegerToFloat", integer=True),
        Finding(node="m2", runtime_op="Gemm", integer=False),
    )


def test_a_dequantized_weight_alone_is_no_integer_kernel(tmp_path):
    text = """(float[N,64] x) => (float[N,64] y) { e = DequantizeLinear <axis = 1> (w_int8, w_s, w_z)
        [m1] y = MatMul(x, e) }"""
    _, result = audit_by_hand(text, [("m1", "MatMul", "w")], tmp_path)
    assert not result.findings[0].integer


def test_a_node_that_is_gone_is_no_integer_kernel(tmp_path):
    text = "(float[N,64] x) => (float[N,64] y) { y = Relu(x) }"
    plan, result = audit_by_hand(text, [("gone", "MatMul", "w")], tmp_path)
    assert result.findings == (Finding(node="gone", runtime_op=None, integer=False),)
    reason = demote_silent_floats(plan, result).decisions[0].reason
    assert reason.endswith("(its optimised graph has another form of it)")


def test_an_integer_kernel_of_another_operator_does_not_count(tmp_path):
    model, feeds = case.zoo("residual")
    plan = case.plan_of(model, quantization="static")
    wrong = plan.with_decisions(
        msgspec.structs.replace(item, op="Mul") if item.node == "add" else item for item in plan.decisions
    )
    lowered = case.quantized(model, plan, feeds)
    save_model(lowered, tmp_path / "m.onnx")
    found = {
        item.node: item.integer for item in audit(tmp_path / "m.onnx", wrong, load_target(case.X86)).findings
    }
    assert found == {"c1": True, "c2": True, "add": False, "c3": True}


def test_integers_that_nobody_planned_are_told(tmp_path):
    model, feeds = case.zoo("residual")
    plan = case.plan_of(model, quantization="static")
    lowered = case.quantized(model, plan, feeds)
    save_model(lowered, tmp_path / "m.onnx")
    claimed = plan.revert(frozenset({"c2", "add"}), "test")
    result = audit(tmp_path / "m.onnx", claimed, load_target(case.X86))
    assert [(item.node, item.runtime_op) for item in result.unplanned] == [
        ("c2", "QLinearConv"),
        ("add", "QLinearAdd"),
    ]


def test_a_profile_that_names_no_runtime_ops(tmp_path):
    model, feeds = case.zoo("relu")
    profile = load_target(case.X86)
    kernels = tuple(msgspec.structs.replace(kernel, runtime_ops=()) for kernel in profile.kernels)
    profile = msgspec.structs.replace(profile, kernels=kernels)
    plan = case.plan_of(model, profile, quantization="static")
    assert audited(model, plan, feeds, profile, tmp_path).silent_floats == ()


def test_a_weight_whose_stored_name_was_taken(tmp_path):
    """A float weight called w.int8 exists already: the stored one is w.int8_1, and is still found."""
    text = "(float[N,S,64] x) => (float[N,S,64] y) { [m1] a = MatMul(x, w) [n] y = Add(a, w_int8) }"
    model = rename(case.parse(text, {"w": case.random(0, 64, 64), "w_int8": case.random(1, 64)}))
    plan = case.plan_of(model, quantization="dynamic", keep_float=("^n$",))
    result = audited(model, plan, [], case.X86, tmp_path)
    assert result.findings[0].runtime_op == "DynamicQuantizeMatMul"


def test_an_audit_is_plain_data():
    result = Audit(findings=(Finding(node="a", runtime_op=None, integer=False),), operators={"Conv": 1})
    assert msgspec.json.decode(msgspec.json.encode(result), type=Audit) == result
