"""The contract of a pass: what it says it did is checked."""

import dataclasses
from typing import NamedTuple

import onnx_ir as ir
import pytest
import zoo
from edgepress.graph.errors import InternalError, ModelError
from edgepress.graph.model import TensorSpec
from edgepress.graph.passes import Outcome, Pass, Refusal, run_passes
from edgepress.graph.rewrite import Rewrite

RELU = "g (float[N,4] x) => (float[N,4] y) <float[4] w = {1,2,3,4}> { a = Add(x, w)  y = Relu(a) }"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change(Pass):
    """Does `what` to the graph and reports `said`."""

    what: object = None
    said: tuple = ()

    def run(self, model):
        if self.what is not None:
            self.what(model)
        outcome = Outcome()
        for rule in self.said:
            outcome.count(rule)
        return outcome


def rename_node_input(model):
    node = list(model.graph)[1]
    node.replace_input_with(0, model.graph.inputs[0])


def new_weight(model):
    value = model.graph.initializers["w"]
    value.const_value = ir.tensor(value.const_value.numpy() + 1, name="w")


def new_attribute(model):
    list(model.graph)[1].attributes.add(ir.AttrInt64("k", 1))


@pytest.mark.parametrize("what", [rename_node_input, new_weight, new_attribute])
def test_a_change_must_be_reported(what):
    model = zoo.load(RELU)
    with pytest.raises(InternalError, match="pass Change changed the graph without saying so"):
        run_passes(model, [Change(what=what)])


def test_a_reported_change_is_recorded_as_it_is():
    model = zoo.load(RELU)
    records = run_passes(
        model, [Change(what=rename_node_input, said=("rule", "rule")), Change(said=("none",))]
    )
    assert [(record.changed, record.applied) for record in records] == [
        (True, {"rule": 2}),
        (False, {"none": 1}),
    ]
    assert model.records == records


def test_a_replaced_weight_is_seen_even_if_the_new_one_gets_the_old_ones_memory():
    model = zoo.load(RELU)
    hashes = set()
    for _ in range(50):
        new_weight(model)
        hashes.add(model.structure_hash())
    assert len(hashes) == 50


def rename_output(model):
    model.graph.outputs[0].name = "z"


def drop_input(model):
    model.graph.inputs.clear()


def reshape_output(model):
    model.graph.outputs[0].shape = ir.Shape(["B", 4])


def retype_output(model):
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)


def second_output(model):
    model.graph.outputs.append(next(iter(model.graph)).outputs[0])


@pytest.mark.parametrize("what", [rename_output, drop_input, reshape_output, retype_output, second_output])
def test_inputs_and_outputs_must_stay(what):
    model = zoo.load(RELU)
    with pytest.raises(InternalError, match="changed the graph's inputs or outputs"):
        run_passes(model, [Change(what=what, said=("rule",))])


def test_requires_and_ensures_are_asked_in_order():
    asked = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Asked(Pass):
        def requires(self, model):
            del model
            asked.append("requires")

        def run(self, model):
            del model
            asked.append("run")
            return Outcome()

        def ensures(self, model):
            del model
            asked.append("ensures")
            raise ModelError("not as promised")

    with pytest.raises(ModelError, match="not as promised"):
        run_passes(zoo.load(RELU), [Asked()])
    assert asked == ["requires", "run", "ensures"]


def test_options_are_plain_values():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options(Pass):
        names: frozenset = frozenset({"b", "a"})
        kind: ir.DataType = ir.DataType.INT8
        limits: tuple = (1, 2.5, None)
        by_name: dict = dataclasses.field(default_factory=lambda: {"k": (1,)})
        other: object = dataclasses.field(default_factory=object)

        def run(self, model):
            del model
            return Outcome()

    (record,) = run_passes(zoo.load(RELU), [Options()])
    assert record.options == {
        "names": ["a", "b"],
        "kind": "INT8",
        "limits": [1, 2.5, None],
        "by_name": {"k": [1]},
        "other": "object",
    }


def test_refusals_and_counts():
    outcome = Outcome()
    outcome.count("rule", 0)
    outcome.count("rule", 2)
    outcome.refuse("node", "rule", "reason")
    assert outcome.applied == {"rule": 2}
    assert outcome.refused == [Refusal(node="node", rule="rule", reason="reason")]


def test_a_pass_without_run_is_no_pass():
    with pytest.raises(NotImplementedError):
        run_passes(zoo.load(RELU), [Pass()])


def test_interfaces():
    model = zoo.load(zoo.ZOO["weight as output"])
    assert model.inputs == (TensorSpec(name="x", dtype="float32", shape=("N", 2)),)
    assert [spec.name for spec in model.outputs] == ["w", "z"]
    assert (model.opset, model.weight_bytes) == (17, 8)


def test_what_is_no_tensor_has_its_type_in_words():
    model = zoo.load("g (seq(float[N]) x, int64 i) => (float[N] y) { y = SequenceAt(x, i) }")
    assert [spec.dtype for spec in model.inputs] == ["sequence(float32)", "int64"]
    model = zoo.load("g (optional(seq(float[N])) x) => (bool y) { y = OptionalHasElement(x) }")
    assert model.inputs[0].dtype == "optional(sequence(float32))"


def test_the_fingerprint_sees_where_a_node_stands():
    inside = """g (float[N] x, bool c) => (float[N] y) { y = If (c) <
        then_branch = t () => (float[N] o) { o = Neg(x) },
        else_branch = e () => (float[N] p) { p = Neg(x)  q = Exp(x) }> }"""
    outside = inside.replace("  q = Exp(x) }> }", " }>  q = Exp(x) }")
    assert zoo.load(inside).fingerprint() != zoo.load(outside).fingerprint()


def test_equal_strings_at_other_borders_are_other_weights():
    def strings(*items):
        proto = zoo.parse("g (string[N] x) => (string[N] y) { y = Identity(x) }")
        proto.graph.initializer.add(name="s", data_type=8, dims=[2], string_data=list(items))
        return zoo.load(proto).fingerprint()

    assert strings(b"a\0", b"b") != strings(b"a", b"\0b")
    assert strings(b"a", b"b") == strings(b"a", b"b")


def test_shared_weights_count_once():
    model = zoo.load(RELU)
    tied = model.graph.initializers["w"].const_value
    value = ir.Value(name="v", type=ir.TensorType(tied.dtype), shape=ir.Shape([4]), const_value=tied)
    model.graph.register_initializer(value)
    assert model.weight_bytes == 16


class Restless(NamedTuple):
    """A rule with a bug: it finds something to do for ever."""

    name: str = "restless"
    roots: frozenset[str] = frozenset({"Relu", "Abs"})

    def apply(self, node, editor):
        kind = "Abs" if node.op_type == "Relu" else "Relu"
        editor.replace(node.outputs[0], editor.value(kind, node.inputs, before=node, stem="again"))
        return True


def test_rules_that_never_rest_are_stopped_and_told_of():
    model = zoo.load("g (float[N] x) => (float[N] y) { a = Relu(x)  y = Neg(a) }")
    (record,) = run_passes(model, [Rewrite(rules=(Restless(),))])
    assert record.applied["restless"] > 1
    assert record.refused[-1].reason.startswith("rules still fire after")
