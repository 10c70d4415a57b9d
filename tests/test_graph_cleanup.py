"""Exact clean-up: every pass on every model of the zoo, and each pass's own cases."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import zoo
from edgepress.graph.cleanup import (
    FoldConstants,
    FoldMovedWeights,
    FoldWeights,
    InferShapes,
    LiftOpset,
    MergeDuplicates,
    RemoveUnused,
    exact_cleanup,
)
from edgepress.graph.edit import Editor, can_stand_for, remove_dead
from edgepress.graph.errors import ModelError
from edgepress.graph.passes import run_passes
from edgepress.graph.save import to_bytes
from onnx import helper

SINGLE = (
    RemoveUnused(), InferShapes(), FoldWeights(), FoldConstants(), FoldMovedWeights(), MergeDuplicates(),
)  # fmt: skip


@pytest.mark.parametrize("name", zoo.ZOO)
def test_clean_up_keeps_results_and_interface_and_a_second_run_changes_nothing(name):
    proto = zoo.parse(zoo.ZOO[name])
    model = zoo.load(proto)
    run_passes(model, exact_cleanup())
    zoo.assert_same(proto, model)
    before = model.fingerprint()
    again = run_passes(model, exact_cleanup())
    assert [record.applied for record in again if record.changed or record.applied] == []
    assert model.fingerprint() == before


@pytest.mark.parametrize("step", SINGLE, ids=lambda step: step.name)
@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_single_pass_keeps_results(name, step):
    proto = zoo.parse(zoo.ZOO[name])
    model = zoo.load(proto)
    zoo.apply(model, step)
    zoo.assert_same(proto, model, zoo.SIZES[:1])
    assert not zoo.apply(model, step).changed


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_fork_is_independent(name):
    model = zoo.load(zoo.ZOO[name])
    before = model.fingerprint()
    copy = model.fork()
    assert copy.fingerprint() == before
    run_passes(copy, exact_cleanup())
    assert model.fingerprint() == before
    assert model.records == []


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("two consumers", ["Relu", "Neg"]),
        ("tied weights", ["MatMul", "MatMul"]),
        ("the output is the input", ["Identity"]),
        ("one value, three outputs", ["Relu", "Identity", "Identity"]),
        ("an output that others read", ["Relu", "Neg"]),
        ("captures in a branch", ["Exp", "If", "Neg", "Identity"]),
        ("captures only in a branch of a dead node", ["Relu"]),
        ("constant conditions", ["Neg", "Abs", "Mul", "Sqrt", "Add"]),
        ("a loop that captures", ["Loop", "Identity", "Add"]),
        ("a scan", ["Scan", "Add", "Identity"]),
        ("integers", ["Identity"]),
        ("names like fresh ones", ["Add", "Mul", "Unsqueeze"]),
    ],
)
def test_what_is_left(name, left):
    model = zoo.load(zoo.ZOO[name])
    run_passes(model, exact_cleanup())
    assert zoo.operators(model) == left


# RemoveUnused


def test_unused_nodes_weights_and_outputs_go():
    model = zoo.load("""g (float[N,1,4,4] x) => (float[N,1,2,2] y) <float a = {1}, float b = {2}> {
        c = Add(x, a)  d = Relu(c)  y, i = MaxPool <kernel_shape = [2,2], strides = [2,2]> (x) }""")
    record = zoo.apply(model, RemoveUnused())
    assert record.applied == {"dead-node": 2, "unused-initializer": 2, "unused-output": 1}
    assert zoo.operators(model) == ["MaxPool"]
    assert len(next(iter(model.graph)).outputs) == 1


def test_a_used_last_output_keeps_the_ones_before_it():
    model = zoo.load(zoo.ZOO["omitted outputs"])
    assert zoo.apply(model, RemoveUnused()).applied == {}
    (node,) = model.graph
    assert [value.name for value in node.outputs] == ["", "h"]


@pytest.mark.parametrize("opset", [9, 13])
def test_outputs_that_say_how_a_batch_norm_runs_stay(opset):
    text = """g (float[N,2] x) => (float[N,2] y) <float[2] s = {1,1}, float[2] b = {0,0}, float[2] m = {0,0},
        float[2] v = {1,1}> { y, a, c, d, e = BatchNormalization (x, s, b, m, v) }"""
    model = zoo.load(text, opset)
    assert zoo.apply(model, RemoveUnused()).applied == {}


def test_unused_variadic_outputs_stay():
    model = zoo.load("g (float[N,4] x) => (float[N,2] y) { y, z = Split <axis = 1> (x) }", 11)
    assert zoo.apply(model, RemoveUnused()).applied == {}


def test_weights_of_a_branch_that_nobody_reads_go():
    model = zoo.load("""g (float[N] x, bool c) => (float[N] y) {
        y = If (c) <then_branch = t () => (float[N] o) <float[1] k = {5}> { o = Neg(x) },
                    else_branch = e () => (float[N] o) { o = Identity(x) }> }""")
    assert zoo.apply(model, RemoveUnused()).applied == {"unused-initializer": 1}


def test_a_removed_body_lets_go_of_what_it_captured():
    model = zoo.load(zoo.ZOO["captures only in a branch of a dead node"])
    captured = next(iter(model.graph)).outputs[0]
    assert remove_dead(model) == 2
    assert captured.uses() == ()


# InferShapes


def test_shapes_are_filled_in_and_the_declared_interface_stays():
    text = "g (float[N,4] x) => (float[A,B] y) { a = Relu(x)  b = Transpose(a)  y = Transpose(b) }"
    model = zoo.load(text)
    assert zoo.apply(model, InferShapes()).applied == {"shape": 2}
    assert zoo.apply(model, InferShapes()).applied == {}
    shapes = [str(node.outputs[0].shape) for node in model.graph]
    assert shapes == ["[N,4]", "[4,N]", "[A,B]"]


def test_shapes_inside_bodies_are_found():
    model = zoo.load(zoo.ZOO["captures in a branch"])
    zoo.apply(model, InferShapes())
    assert all(node.outputs[0].shape is not None for node in model.graph.all_nodes())


def test_what_cannot_be_inferred_is_left_open():
    text = "g (float[2,3] x, float[4,5] z) => (float[2,5] y) { a = MatMul(x, z)  y = Relu(a) }"
    model = zoo.load(text)
    assert zoo.apply(model, InferShapes()).applied == {}
    assert next(iter(model.graph)).outputs[0].shape is None


def test_large_weights_are_not_read_by_inference():
    model = zoo.load(
        "g (float[N,2] x) => (float[N,1] y) <float[2,1] w = {1,2}> { a = MatMul(x, w)  y = Relu(a) }"
    )

    def never():
        raise AssertionError("read")

    model.graph.initializers["w"].const_value = ir.LazyTensor(
        never, dtype=ir.DataType.FLOAT, shape=ir.Shape([2, 512])
    )
    zoo.apply(model, InferShapes())
    assert str(next(iter(model.graph)).outputs[0].shape) == "[N,512]"


# FoldWeights


def test_transposed_weights_keep_their_name():
    proto = zoo.parse("""g (float[N,3] x) => (float[N,2] y) <float[2,3] w = {1,2,3,4,5,6}> {
        t = Transpose <perm = [1,0]> (w)  y = MatMul(x, t) }""")
    model = zoo.load(proto)
    assert zoo.apply(model, FoldWeights()).applied == {"Transpose": 1}
    assert list(model.graph.initializers) == ["w"]
    assert model.graph.initializers["w"].const_value.numpy().tolist() == [[1, 4], [2, 5], [3, 6]]
    zoo.assert_same(proto, model)


@pytest.mark.parametrize("name", ["tied weights", "weight behind identity twice"])
def test_a_weight_with_other_readers_is_copied(name):
    proto = zoo.parse(zoo.ZOO[name])
    model = zoo.load(proto)
    assert sum(zoo.apply(model, FoldWeights()).applied.values()) in (1, 2)
    zoo.assert_same(proto, model)


@pytest.mark.parametrize("source", ["float16", "bfloat16", "float64"])
def test_casts_of_weights_to_float_are_folded(source):
    import ml_dtypes

    proto = zoo.parse("g (float[N,2] x) => (float[N,2] y) { c = Cast <to = 1> (w)  y = Add(x, c) }")
    dtype = ml_dtypes.bfloat16 if source == "bfloat16" else np.dtype(source)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1.5, -2], dtype), "w"))
    model = zoo.load(proto)
    assert zoo.apply(model, FoldWeights()).applied == {"Cast": 1}
    assert model.graph.initializers["w"].const_value.numpy().tolist() == [1.5, -2]
    zoo.assert_same(proto, model, reference=False)


@pytest.mark.parametrize(
    "body",
    [
        "<float[2] w = {1.5, 2}> { c = Cast <to = 10> (w)  d = Cast <to = 1> (c)  y = Add(x, d) }",
        "<int64[2] w = {1, 2}> { c = Cast <to = 1> (w)  y = Add(x, c) }",
    ],
)
def test_other_casts_are_left_to_folding(body):
    model = zoo.load(f"g (float[N,2] x) => (float[N,2] y) {body}")
    assert zoo.apply(model, FoldWeights()).applied == {}


def test_mapped_weights_are_folded_without_being_read(tmp_path):
    from edgepress.graph.load import load_model
    from edgepress.graph.save import save_model

    proto = zoo.parse("g (float[N,64] x) => (float[N,32] y) <float[32,64] w = {0}> { y = Relu(x) }")
    del proto.graph.initializer[:], proto.graph.node[:]
    array = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float16)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(array, "w"))
    proto.graph.node.extend(
        [
            helper.make_node("Cast", ["w"], ["c"], to=1),
            helper.make_node("Transpose", ["c"], ["t"]),
            helper.make_node("MatMul", ["x", "t"], ["y"]),
        ]
    )
    save_model(zoo.load(proto), tmp_path / "m.onnx", external_threshold_bytes=0)
    model = load_model(tmp_path / "m.onnx")
    assert zoo.apply(model, FoldWeights()).applied == {"Cast": 1, "Transpose": 1}
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.LazyTensor)
    np.testing.assert_array_equal(tensor.numpy(), array.astype(np.float32).T)
    zoo.assert_same(proto, model, reference=False)


def test_a_permutation_that_is_none_is_left_alone():
    model = zoo.load("""g (float[N,2] x) => (float[N,2] y) <float[2,2] w = {1,2,3,4}> {
        t = Transpose <perm = [0,0]> (w)  y = MatMul(x, t) }""")
    assert zoo.apply(model, FoldWeights()).applied == {}


# FoldConstants


def folded(body, opset=17, shapes="float[N,4] x"):
    model = zoo.load(f"g ({shapes}) => (float[A,B] y) {body}", opset)
    record = zoo.apply(model, InferShapes(), FoldConstants())
    return record, model


def test_integer_division_rounds_towards_zero():
    proto = zoo.parse("""g (int64[2] x) => (int64[2] y) <int64[2] c = {-7, 7}, int64 d = {2}> {
        q = Div(c, d)  y = Add(x, q) }""")
    model = zoo.load(proto)
    assert zoo.apply(model, FoldConstants()).applied == {"constant": 1}
    zoo.assert_same(proto, model, reference=False)


@pytest.mark.parametrize(
    ("body", "applied"),
    [
        ("<float a = {2}> { b = Sqrt(a)  c = Neg(b)  y = Add(x, c) }", {"constant": 2}),
        ("{ c = Cast <to = 1> (x)  y = Relu(c) }", {"no-op": 1}),
        ("{ c = CastLike (x, x)  y = Relu(c) }", {"cast-like": 1, "no-op": 1}),
        ("{ c = Concat <axis = 0> (x)  y = Relu(c) }", {"no-op": 1}),
        ("{ c = Dropout (x)  y = Relu(c) }", {"no-op": 1}),
        ("<float r = {0.5}, bool t = {0}> { c = Dropout (x, r, t)  y = Relu(c) }", {"no-op": 1}),
        ("<float r = {0.5}, bool t = {1}> { c = Dropout (x, r, t)  y = Relu(c) }", {}),
        ("{ a = RandomNormal <shape = [4]> ()  y = Add(x, a) }", {}),
        ("<int64[1] s = {4}> { a = ConstantOfShape (s)  y = Add(x, a) }", {}),
        ("<float[4] a = {1,2,3,4}> { b = acme.Twice (a)  y = Add(x, b) }", {}),
    ],
)
def test_what_is_folded(body, applied):
    if "acme" in body:
        text = (
            f'<ir_version: 8, opset_import: ["" : 17, "acme" : 1]> g (float[N,4] x) => (float[N,4] y) {body}'
        )
        model = zoo.load(text)
        assert zoo.apply(model, FoldConstants()).applied == applied
    else:
        assert folded(body)[0].applied == applied


def test_a_mask_that_is_read_keeps_its_dropout():
    model = zoo.load("g (float[N] x) => (float[N] y, bool[N] m) { y, m = Dropout (x) }")
    assert zoo.apply(model, FoldConstants()).applied == {}


def test_what_the_evaluator_cannot_do_is_reported_and_left():
    record, model = folded("<float[2] a = {1,2}, float[3] b = {1,2,3}> { c = Add(a, b)  y = Add(x, c) }")
    assert record.applied == {}
    (refusal,) = record.refused
    assert refusal.rule == "constant"
    assert refusal.reason.startswith("it cannot be computed: ")
    assert zoo.operators(model) == ["Add", "Add"]


def test_large_results_stay_computed():
    model = zoo.load("""g (float[N] x) => (float[M] y) <float one = {1}, int64[1] s = {1000000}> {
        a = Expand(one, s)  y = Mul(a, x) }""")
    assert zoo.apply(model, FoldConstants()).applied == {}


def test_known_sizes_become_constants_with_their_rank():
    record, model = folded("""<int64[1] a = {1}, int64 b = {1}, int64[1] zero = {0}> {
        s = Shape(x)  p = Gather(s, a)  q = Gather(s, b)  r = Unsqueeze(q, zero)
        u = Concat <axis = 0> (p, r)  v = ConstantOfShape(u)  y = Add(x, v) }""")
    assert record.applied == {"constant": 4}
    shape = next(iter(model.graph)).inputs[0].const_value.numpy()
    assert (shape.dtype, shape.tolist()) == (np.int64, [4, 4])
    assert zoo.operators(model) == ["ConstantOfShape", "Add"]


def test_a_matrix_of_sizes_is_not_taken_for_a_vector():
    text = """g (float[4,N] x) => (int64[1,2] y) <int64[2] two = {1, 2}, int64[1] zero = {0}> {
        s = Shape(x)  m = Reshape(s, two)  y = Gather <axis = 0> (m, zero) }"""
    proto = zoo.parse(
        text.replace("int64[1,2] y", "int64[1,1,2] y").replace("int64[1] zero", "int64[1,1] zero")
    )
    model = zoo.load(proto)
    run_passes(model, exact_cleanup())
    zoo.assert_same(proto, model)


def test_branches_of_equal_inner_names_are_inlined_side_by_side():
    proto = zoo.parse(zoo.ZOO["constant conditions"])
    model = zoo.load(proto)
    assert zoo.apply(model, FoldConstants()).applied == {"branch": 2}
    names = [value.name for node in model.graph for value in node.outputs]
    assert len(names) == len(set(names))
    zoo.assert_same(proto, model)


def test_nested_constant_branches():
    proto = zoo.parse("""g (float[N] x, bool c) => (float[N] y) <bool yes = {1}> {
        y = If (c) <
          then_branch = t () => (float[N] o) {
            o = If (yes) <then_branch = tt () => (float[N] p) { p = Exp(x) },
                          else_branch = te () => (float[N] p) { p = Neg(x) }> },
          else_branch = e () => (float[N] o) { o = Abs(x) }> }""")
    model = zoo.load(proto)
    assert zoo.apply(model, FoldConstants()).applied == {"branch": 1}
    assert zoo.operators(model) == ["If", "Abs", "Exp"] or zoo.operators(model) == ["If", "Exp", "Abs"]
    zoo.assert_same(proto, model)


# FoldMovedWeights


def weights(*names, shape=(6, 4)):
    random = np.random.default_rng(len(names))
    return [
        onnx.numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name) for name in names
    ]


def moved(text, *names, shape=(6, 4)):
    """The model of a text with big weights: folded, compared, and what the pass counted."""
    proto = zoo.parse(text)
    proto.graph.initializer.extend(weights(*names, shape=shape))
    model = zoo.load(proto)
    zoo.apply(model, InferShapes())
    record = zoo.apply(model, FoldMovedWeights())
    zoo.assert_same(proto, model)
    return model, record.applied


GATES = """g (float[N,4] x) => (float[N,6] y)
    <int64[1] o = {0}, int64[1] t = {2}, int64[1] f = {4}, int64[1] s = {6}> {
    a = Slice(w, o, t, o)  b = Slice(w, t, f, o)  c = Slice(w, f, s, o)
    j = Concat <axis = 0> (a, c, b)  k = Transpose(j)  y = MatMul(x, k) }"""


def test_the_gates_of_a_weight_are_reordered_once_and_it_keeps_its_name():
    model, applied = moved(GATES, "w")
    assert applied == {"moved-weight": 1}
    assert zoo.operators(model) == ["MatMul"]
    assert "w" in model.graph.initializers
    assert tuple(model.graph.initializers["w"].shape) == (4, 6)


def test_joined_weights_are_named_for_what_they_share():
    model, applied = moved(
        """g (float[N,4] x) => (float[N,12] y) {
        j = Concat <axis = 0> (p.w_a, p.w_b)  k = Transpose(j)  y = MatMul(x, k) }""".replace("p.", "p_"),
        "p_w_a",
        "p_w_b",
    )
    assert applied == {"moved-weight": 1}
    assert list(model.graph.initializers) == ["p_w.joined"]


@pytest.mark.parametrize(
    "text",
    [
        # the weight is needed as it is as well
        """g (float[N,4] x, float[N,6] z) => (float[N,6] y) {
            k = Transpose(w)  a = MatMul(x, k)  b = MatMul(z, w)  c = MatMul(b, k)  y = Add(a, c) }""",
        # the results take more bytes than the weight
        """g (float[N,4] x) => (float[N,12] y) {
            j = Concat <axis = 0> (w, w)  k = Transpose(j)  y = MatMul(x, k) }""",
        # where it is cut is computed
        """g (float[N,4] x, int64[1] i) => (float[N,A] y) <int64[1] o = {0}, int64[1] f = {6}> {
            a = Slice(w, i, f, o)  k = Transpose(a)  y = MatMul(x, k) }""",
        # it leaves the graph
        "g (float[N,4] x) => (float[4,6] y, float[N,6] z) { y = Transpose(w)  z = MatMul(x, y) }",
    ],
)
def test_moved_weights_that_stay(text):
    proto = zoo.parse(text)
    proto.graph.initializer.extend(weights("w"))
    model = zoo.load(proto)
    zoo.apply(model, InferShapes())
    assert zoo.apply(model, FoldMovedWeights()).applied == {}


# MergeDuplicates


def test_equal_nodes_and_constants_merge():
    proto = zoo.parse("""g (float[N,2] x) => (float[N,2] y) <float[2] a = {1,2}, float[2] b = {1,2}> {
        p = Add(x, a)  q = Add(x, b)  y = Mul(p, q) }""")
    model = zoo.load(proto)
    assert zoo.apply(model, MergeDuplicates()).applied == {"equal-constant": 1, "equal-node": 1}
    zoo.assert_same(proto, model)


@pytest.mark.parametrize(
    ("dtype", "merged"), [(np.int64, {"equal-constant": 1, "equal-node": 2}), (np.float32, {})]
)
def test_tables_of_indices_merge_and_equal_weights_stay_apart(dtype, merged):
    proto = zoo.parse("g (float[N,2] x, int64[2] i) => (float[P,Q] y) { y = Add(x, x) }")
    del proto.graph.node[:]
    for name in ("a", "b"):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.arange(3000, dtype=dtype), name))
        proto.graph.node.append(helper.make_node("Gather", [name, "i"], [f"{name}.picked"]))
        proto.graph.node.append(helper.make_node("Cast", [f"{name}.picked"], [f"{name}.float"], to=1))
    proto.graph.node.append(helper.make_node("Sum", ["x", "a.float", "b.float"], ["y"]))
    assert zoo.apply(zoo.load(proto), MergeDuplicates()).applied == merged


@pytest.mark.parametrize(
    "body",
    [
        "{ a = Bernoulli(x)  b = Bernoulli(x)  y = Add(a, b) }",
        "{ a = RandomNormalLike(x)  b = RandomNormalLike(x)  y = Add(a, b) }",
        "<float r = {0.5}, bool t = {1}> { a = Dropout(x, r, t)  b = Dropout(x, r, t)  y = Add(a, b) }",
        "<float[1] p = {0}, float[1] m = {-0.0}> { a = Div(x, p)  b = Div(x, m)  y = Add(a, b) }",
        "{ a = LeakyRelu <alpha = 0.1> (x)  b = LeakyRelu <alpha = 0.2> (x)  y = Add(a, b) }",
        "<int64 i = {1}, int32 j = {1}> { a = Gather(x, i)  b = Gather(x, j)  y = Add(a, b) }",
    ],
)
def test_what_only_looks_equal_stays(body):
    model = zoo.load(f"g (float[N,2] x) => (float[A,B] y) {body}")
    assert zoo.apply(model, MergeDuplicates()).applied == {}


def test_operators_of_unknown_domains_may_have_effects():
    text = """<ir_version: 8, opset_import: ["" : 17, "acme" : 1]> g (float[N] x) => (float[N] y) {
        a = acme.Draw(x)  b = acme.Draw(x)  y = Add(a, b) }"""
    assert zoo.apply(zoo.load(text), MergeDuplicates()).applied == {}


def test_an_output_left_out_in_one_of_two_equal_nodes_is_kept_readable():
    proto = zoo.parse(
        """g (float[N,1,4,4] x) => (float[N,1,2,2] y, int64[N,1,2,2] z) {
        a, _ = MaxPool <kernel_shape = [2,2], strides = [2,2]> (x)
        b, i = MaxPool <kernel_shape = [2,2], strides = [2,2]> (x)
        y = Add(a, b)  z = Neg(i) }""".replace("_ =", "u =")
    )
    proto.graph.node[0].output[1] = ""
    model = zoo.load(proto)
    assert zoo.apply(model, MergeDuplicates()).applied == {"equal-node": 1}
    zoo.assert_same(proto, model, reference=False)


def test_string_constants_are_compared_byte_by_byte():
    proto = zoo.parse("g (string[N] x) => (string[P] y) { y = Identity(x) }")
    del proto.graph.node[:]
    for name, strings in (("a", [b"p\0", b"q"]), ("b", [b"p", b"\0q"]), ("c", [b"p\0", b"q"])):
        tensor = onnx.TensorProto(name=name, data_type=8, dims=[2], string_data=strings)
        proto.graph.initializer.append(tensor)
    proto.graph.node.append(helper.make_node("Concat", ["x", "a", "b", "c"], ["y"], axis=0))
    model = zoo.load(proto)
    assert zoo.apply(model, MergeDuplicates()).applied == {"equal-constant": 1}
    assert list(model.graph.initializers) == ["a", "b"]


def test_duplicates_inside_bodies_merge():
    proto = zoo.parse("""g (float[N] x, bool c) => (float[N] y) {
        y = If (c) <then_branch = t () => (float[N] o) { a = Exp(x) b = Exp(x) o = Add(a, b) },
                    else_branch = e () => (float[N] o) { o = Identity(x) }> }""")
    model = zoo.load(proto)
    assert zoo.apply(model, MergeDuplicates()).applied == {"equal-node": 1}
    zoo.assert_same(proto, model)


# LiftOpset


OLD = {
    7: "g (float[N,2] x) => (float[N,2] y) <float[2] b = {1,2}> { a = Add(x, b)  y = Relu(a) }",
    9: """g (float[N,4] x) => (float[1,N,2] y) {
        a = Slice <axes = [1], starts = [0], ends = [2]> (x)  y = Unsqueeze <axes = [0]> (a) }""",
    11: """g (float[N,1,4] x) => (float[N,4] y) { a = Squeeze <axes = [1]> (x)
        y = ReduceMax <axes = [0], keepdims = 1> (a) }""".replace("float[N,4] y", "float[1,4] y"),
    13: "g (float[N,3,2] x) => (float[N,3,1] y) { y = ReduceMean <axes = [2]> (x) }",
    17: "g (float[N,3] x) => (float[N,3] y) { y = Softmax <axis = -1> (x) }",
}


@pytest.mark.parametrize("opset", OLD)
@pytest.mark.parametrize("minimum", [18, 20])
def test_old_operator_sets_are_lifted(opset, minimum):
    proto = zoo.parse(OLD[opset], opset)
    model = zoo.load(proto)
    record = zoo.apply(model, LiftOpset(minimum=minimum))
    assert record.applied == {"opset": 1}
    assert model.opset == minimum
    zoo.assert_same(proto, model, reference=False)


@pytest.mark.parametrize("opset", OLD)
def test_clean_up_of_old_operator_sets(opset):
    proto = zoo.parse(OLD[opset], opset)
    model = zoo.load(proto)
    run_passes(model, exact_cleanup())
    zoo.assert_same(proto, model, reference=False)


def test_a_new_enough_model_is_not_touched():
    model = zoo.load(OLD[17])
    assert zoo.apply(model, LiftOpset(minimum=13)).applied == {}


def test_large_weights_survive_lifting():
    proto = zoo.parse("g (float[N,40] x) => (float[N,40] y) { y = Relu(x) }", 9)
    array = np.random.default_rng(0).standard_normal((40, 40)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(array, "w"))
    proto.graph.node[0].CopyFrom(helper.make_node("MatMul", ["x", "w"], ["y"]))
    model = zoo.load(proto)
    zoo.apply(model, LiftOpset(minimum=18))
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), array)
    zoo.assert_same(proto, model)


def test_what_cannot_be_lifted_is_said():
    # Scan 8 has a batch axis that Scan 9 has not: no converter knows a way.
    model = zoo.load(
        """g (float[1,N] s, float[1,M,N] x) => (float[1,N] e, float[1,M,N] y) {
        e, y = Scan (omitted, s, x) <num_scan_inputs = 1, body = b (float[N] a, float[N] r) =>
            (float[N] o, float[N] p) { o = Add(a, r)  p = Identity(o) }> }""",
        8,
    )
    with pytest.raises(ModelError, match="operator set is too old") as caught:
        zoo.apply(model, LiftOpset(minimum=18))
    assert "opset 18 or newer" in caught.value.remedy


def test_nothing_is_logged_or_printed(capfd, caplog):
    for name in ("constant output", "weight as output"):
        run_passes(zoo.load(zoo.ZOO[name]), exact_cleanup())
    zoo.apply(zoo.load(OLD[9], 9), LiftOpset(minimum=18))
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


# Editor


def test_equal_small_constants_are_shared_until_they_have_gone():
    model = zoo.load("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    editor = Editor(model)
    first = editor.constant(np.array([1], np.int64), "axes", model.graph)
    assert editor.constant(np.array([1], np.int64), "other", model.graph) is first
    assert editor.constant(np.array([1], np.int32), "axes", model.graph) is not first
    assert editor.constant(np.array([[1]], np.int64), "axes", model.graph) is not first
    remove_dead(model)  # nobody reads it
    again = editor.constant(np.array([1], np.int64), "axes", model.graph)
    assert again is not first
    assert model.graph.initializers[again.name] is again


def test_constants_of_types_that_numpy_does_not_know_are_told_apart():
    import ml_dtypes

    model = zoo.load("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    editor = Editor(model)
    kinds = (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.int8)
    made = [editor.constant(np.zeros(1, kind), "zero", model.graph) for kind in kinds]
    assert len({value.name for value in made}) == 3


def test_fresh_names_are_free_everywhere():
    model = zoo.load(zoo.ZOO["captures in a branch"])
    taken = {value.name for node in model.graph.all_nodes() for value in node.outputs}
    taken |= {node.name for node in model.graph.all_nodes()} | {"x", "c", "one"}
    editor = Editor(model)
    fresh = [editor.fresh_name(name) for name in sorted(taken) for _ in range(3)]
    assert len(set(fresh)) == len(fresh)
    assert not taken & set(fresh)


def test_types_are_not_shared_between_values():
    model = zoo.load("g (float[N] x) => (float[N] y) { a = Relu(x)  y = Relu(a) }")
    zoo.apply(model, InferShapes())
    node = next(iter(model.graph))
    made = Editor(model).value("Neg", [node.inputs[0]], before=node, stem="n", like=node.outputs[0])
    assert made.type is not node.outputs[0].type


def test_what_can_stand_for_an_output():
    model = zoo.load("""g (float[N] x) => (float[N] y, float[N] z) <float[1] w = {1}> {
        a = Add(x, w)  y = Relu(a)  z = Neg(a) }""")
    a, y, z = (node.outputs[0] for node in model.graph)
    assert can_stand_for(y, a)
    assert not can_stand_for(y, z)
    assert not can_stand_for(y, model.graph.inputs[0])
    assert not can_stand_for(y, model.graph.initializers["w"])
    assert can_stand_for(a, model.graph.inputs[0])


def test_saved_bytes_of_a_cleaned_model_are_one_valid_model():
    model = zoo.load(zoo.ZOO["a loop that captures"])
    run_passes(model, exact_cleanup())
    onnx.checker.check_model(onnx.load_from_string(to_bytes(model)), full_check=True)
