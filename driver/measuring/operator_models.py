"""One operator of a graph as a model of its own, in each form that it could take on the target."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import onnx_ir as ir

from ...compress.cost import concrete_shape
from ...compress.lower import apply_plan
from ...compress.operands import ABSORBED_OPS, output_tail
from ...compress.plan import Decision, Plan
from ...compress.quantize.static import static_layout
from ...graph.edit import is_constant, operand, remove_dead, scalar
from ...graph.errors import EdgepressError
from ...graph.model import Model, Origin
from ...graph.save import to_bytes

if TYPE_CHECKING:
    from ...runtimes.base import Array

FLOAT = "float"
FLOAT16 = "fp16"
"""The form of an operator whose tensors are all float16."""
WITH_CONVERSIONS = " with conversions"
"""Of static forms: the float tensors around the operator are quantized and dequantized, too."""

_KEPT_ELEMENTS = 1024
_LARGEST_BYTES = 1 << 28
_RANGE = (-4.0, 4.0)
_NEVER_NEGATIVE = frozenset({"HardSigmoid", "Sigmoid", "Softmax"})
_LIFTED_OPSET = 20
_IR_VERSION = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One operator (or the products that read one tensor) with the sizes that it runs at.

    Attributes:
        nodes: the graph's nodes that it stands for, all that are alike.
        decisions: of the first of them; of several products that share an input, one each.
        operator, shapes, attributes: what a timing of it is kept under.
        macs: of one run, None where not known.
    """

    nodes: tuple[str, ...]
    decisions: tuple[Decision, ...]
    operator: str
    shapes: tuple[tuple[int, ...], ...]
    attributes: str
    macs: int | None
    originals: tuple[ir.Node, ...]
    sizes: Mapping[str, int]


def trial_of(
    nodes: Sequence[ir.Node], decisions: Sequence[Decision], sizes: Mapping[str, int]
) -> Trial | None:
    """What is to be timed for nodes that are decided together; None where a shape is not known."""
    shapes: list[tuple[int, ...]] = []
    data = concrete_shape(nodes[0].inputs[0], sizes)
    if data is None or 0 in data:
        return None
    shapes.append(data)
    for node in nodes:
        for value in node.inputs[1:]:
            shape = () if value is None else concrete_shape(value, sizes)
            if shape is None:
                return None
            shapes.append(shape)
    if 4 * sum(int(np.prod(shape)) for shape in shapes) > _LARGEST_BYTES:
        return None
    if any(value is None or value.dtype != ir.DataType.FLOAT for value in (nodes[0].inputs[0],)):
        return None
    macs = [item.macs for item in decisions]
    return Trial(
        nodes=tuple(item.node for item in decisions),
        decisions=tuple(decisions),
        operator=nodes[0].op_type if len(nodes) == 1 else f"{len(nodes)} {nodes[0].op_type}",
        shapes=tuple(shapes),
        attributes=_attributes_text(nodes[0]),
        macs=None if None in macs else sum(number or 0 for number in macs),
        originals=tuple(nodes),
        sizes=sizes,
    )


def _attributes_text(node: ir.Node) -> str:
    """Attributes as text, and the activation behind that the runtime makes a part of the operator."""
    parts = []
    for name, attribute in sorted(node.attributes.items()):
        if attribute.type in (ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING):
            parts.append(f"{name}={attribute.value}")
        elif attribute.type == ir.AttributeType.INTS:
            parts.append(f"{name}={','.join(map(str, attribute.as_ints()))}")
    tail = output_tail(node).producer()
    if tail is not None and tail is not node:
        parts.append(f"then {tail.op_type}")
    return " ".join(parts)


def float_model(trial: Trial) -> tuple[Model, dict[str, Array]]:
    """The operator in float as a model of its own, with random weights, and an input for it.

    Latency does not depend on the values, as long as none is denormal. Small constants (biases, limits,
    lengths) keep their values; computed operands become inputs.
    """
    random = np.random.default_rng(0)
    known: dict[int, ir.Value] = {}
    inputs: list[ir.Value] = []
    weights: list[ir.Value] = []
    feeds: dict[str, Array] = {}

    def taken(value: ir.Value | None) -> ir.Value | None:
        if value is None or id(value) in known:
            return None if value is None else known[id(value)]
        shape = concrete_shape(value, trial.sizes) or ()
        dtype = value.dtype or ir.DataType.FLOAT
        tensor = value.const_value
        made = ir.Value(name=f"t{len(known)}", type=ir.TensorType(dtype), shape=ir.Shape(shape))
        if tensor is not None and tensor.size <= _KEPT_ELEMENTS:
            made.const_value = ir.tensor(tensor.numpy(), name=made.name)
        elif is_constant(value):
            drawn = (random.standard_normal(shape) * 0.05).astype(np.float32)
            made.const_value = ir.tensor(drawn, name=made.name)
        else:
            feeds[str(made.name)] = random.standard_normal(shape).astype(dtype.numpy())
            inputs.append(made)
        if made.const_value is not None:
            weights.append(made)
        known[id(value)] = made
        return made

    nodes: list[ir.Node] = []
    outputs: list[ir.Value] = []
    for original in trial.originals:
        copy = _copied(original, [taken(value) for value in original.inputs], f"n{len(nodes)}")
        copy.name = original.name
        nodes.append(copy)
        result = copy.outputs[0]
        tail = output_tail(original).producer()
        if tail is not None and tail is not original and tail.op_type in ABSORBED_OPS:
            nodes.append(_copied(tail, [result, *map(taken, tail.inputs[1:])], f"n{len(nodes)}"))
            nodes[-1].name = f"{original.name}/tail"
            result = nodes[-1].outputs[0]
        shape = concrete_shape(output_tail(original), trial.sizes)
        result.shape = None if shape is None else ir.Shape(shape)
        outputs.append(result)
    opset = _opset(trial)
    graph = ir.Graph(
        inputs, outputs, nodes=nodes, initializers=weights, opset_imports={"": opset, "com.microsoft": 1}
    )
    made = ir.Model(graph, ir_version=_IR_VERSION)
    return Model(made, origin=Origin(kind="memory", name=trial.operator)), feeds


def _opset(trial: Trial) -> int:
    graph = trial.originals[0].graph
    version = None if graph is None else graph.opset_imports.get("")
    return version or _LIFTED_OPSET


def _copied(node: ir.Node, operands: Sequence[ir.Value | None], stem: str) -> ir.Node:
    used = [place for place, value in enumerate(node.outputs) if place == 0 or value.uses()]
    made = ir.node(
        node.op_type, operands, attributes=None, domain=node.domain, num_outputs=max(used, default=0) + 1
    )
    for name, attribute in node.attributes.items():
        made.attributes[name] = attribute
    for place, value in enumerate(made.outputs):
        value.name = f"{stem}.{place}"
        value.type = ir.TensorType(node.outputs[place].dtype or ir.DataType.FLOAT)
    return made


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoweredForm:
    """A form of a trial, ready to be timed: its name, the model, and its inputs."""

    name: str
    model: bytes
    feeds: Mapping[str, Array]


def lowered_forms(trial: Trial, choices: Sequence[Sequence[Decision]]) -> list[LoweredForm]:
    """The trial in float and in every form of `choices`, by the same passes as the whole model.

    A static form comes twice: between integer tensors, and with the conversions around it. One that
    the passes refuse is left out.

    Args:
        trial: the operator.
        choices: per form, the decisions of the trial's nodes.
    """
    model, feeds = float_model(trial)
    forms = [LoweredForm(name=FLOAT, model=to_bytes(model), feeds=feeds)]
    for decisions in choices:
        plan = Plan(target="", precision="fp32", quantization="none", decisions=())
        plan = plan.with_decisions(decisions)
        ranges = plausible_ranges(model, static_layout(model, plan.decisions).observed)
        try:
            lowered, _ = apply_plan(model, plan, ranges)
        except EdgepressError:
            continue
        name = form_name(decisions[0])
        if decisions[0].form == "static":
            forms.append(LoweredForm(name=f"{name}{WITH_CONVERSIONS}", model=to_bytes(lowered), feeds=feeds))
            lowered, feeds_inside = _between_integers(lowered, feeds)
            forms.append(LoweredForm(name=name, model=to_bytes(lowered), feeds=feeds_inside))
        else:
            forms.append(LoweredForm(name=name, model=to_bytes(lowered), feeds=feeds))
    return forms


def plausible_ranges(model: Model, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Made-up ranges for timing: a Relu or Clip saturates where its integers do, so that it can be dropped.

    Latency depends on nothing else of them.
    """
    values = {value.name: value for node in model.graph for value in node.outputs}
    found = {}
    for name in names:
        tail = None if name not in values else values[name].producer()
        low, high = _RANGE
        if tail is not None and tail.op_type in ABSORBED_OPS:
            limits = [scalar(operand(tail, place)) for place in (1, 2)]
            low = 0.0 if tail.op_type == "Relu" or limits[0] is None else min(limits[0], 0.0)
            high = high if limits[1] is None else max(limits[1], low + 1.0)
        elif tail is not None and tail.op_type in _NEVER_NEGATIVE:
            low = 0.0
        found[name] = (low, high)
    return found


def form_name(decision: Decision) -> str:
    """A form's name in timings: of static ones with the type of the activations."""
    if decision.form == "static" and decision.activation is not None:
        return f"static-{decision.activation.dtype}"
    return decision.form


def _between_integers(model: Model, feeds: Mapping[str, Array]) -> tuple[Model, dict[str, Array]]:
    """The model without the QuantizeLinear behind its inputs and the DequantizeLinear at its outputs."""
    inside = model.fork()
    graph, given = inside.graph, dict(feeds)
    for value in tuple(graph.inputs):
        readers = [use.node for use in value.uses()]
        if not readers or any(node.op_type != "QuantizeLinear" for node in readers):
            continue
        name, kind = str(value.name), readers[0].outputs[0].dtype or ir.DataType.UINT8
        middle = 128 if kind == ir.DataType.UINT8 else 0
        steps = np.clip(np.rint(feeds[name] * 32) + middle, 0 if middle else -127, 255 if middle else 127)
        given[name] = steps.astype(kind.numpy())
        for node in readers:
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
        value.type = ir.TensorType(kind)
    for place, value in enumerate(tuple(graph.outputs)):
        maker = value.producer()
        if maker is not None and maker.op_type == "DequantizeLinear" and maker.inputs[0] is not None:
            graph.outputs[place] = maker.inputs[0]
    remove_dead(inside)
    return inside, given


def with_activation(decision: Decision, dtype: str) -> Decision:
    """A static decision with activations of another type."""
    if decision.activation is None:
        return decision
    scheme = msgspec.structs.replace(decision.activation, dtype=dtype)
    return msgspec.structs.replace(decision, activation=scheme)
