"""The operators that `targets probe --measure` times: those of common nets, at sizes that they have there."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...compress.choice import Verdict
from ...compress.cost import node_macs
from ...compress.operands import COMPUTE_OPS, RECURRENT_OPS
from ...compress.plan import Decision
from ...compress.propose import Request, propose
from ...graph.errors import InternalError
from ...graph.model import Model, Origin
from ...graph.passes import run_passes
from ...graph.save import to_bytes
from ...graph.scheme import IntegerType
from ...graph.shapes import InferShapes
from ...targets.profile import Form, Kernel, TargetProfile
from .operator_models import FLOAT, FLOAT16, LoweredForm, Trial, float_model, trial_of
from .operator_times import Choices, TimedKind

_OPSET, _IR_VERSION = 20, 10
_SIGNS: tuple[IntegerType, ...] = ("uint8", "int8")
_PROBED = "probed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One operator at one size.

    Attributes:
        data: shapes of its computed inputs.
        weights: shapes of its constant float inputs, or small constants as arrays.
        attributes: as the operator takes them.
    """

    op: str
    data: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[int, ...] | npt.NDArray[np.float32], ...] = ()
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _matmul(rows: int, inner: int, columns: int) -> Sample:
    return Sample(op="MatMul", data=((1, rows, inner),), weights=((inner, columns),))


def _gemm(rows: int, inner: int, columns: int) -> Sample:
    return Sample(op="Gemm", data=((rows, inner),), weights=((inner, columns), (columns,)))


def _conv(
    channels: int, size: int, filters: int, *, kernel: int = 3, stride: int = 1, group: int = 1
) -> Sample:
    pad = kernel // 2
    return Sample(
        op="Conv",
        data=((1, channels, size, size),),
        weights=((filters, channels // group, kernel, kernel), (filters,)),
        attributes={
            "kernel_shape": [kernel, kernel],
            "pads": [pad] * 4,
            "strides": [stride, stride],
            "group": group,
        },
    )


def _deconv(channels: int, size: int, filters: int, kernel: int) -> Sample:
    pad = (kernel - 2) // 2
    return Sample(
        op="ConvTranspose",
        data=((1, channels, size, size),),
        weights=((channels, filters, kernel, kernel), (filters,)),
        attributes={"kernel_shape": [kernel, kernel], "pads": [pad] * 4, "strides": [2, 2]},
    )


def _recurrent(op: str, gates: int, steps: int, width: int) -> Sample:
    shapes = ((1, gates * width, width), (1, gates * width, width), (1, 2 * gates * width))
    return Sample(op=op, data=((steps, 1, width),), weights=shapes, attributes={"hidden_size": width})


WORKING: tuple[Sample, ...] = (
    _matmul(128, 384, 384),
    _matmul(128, 384, 1536),
    _matmul(128, 1536, 384),
    _matmul(32, 768, 768),
    _matmul(1, 768, 768),
    _matmul(128, 768, 3072),
    _gemm(1, 512, 1000),
    _gemm(16, 1024, 1024),
    _conv(16, 32, 16),
    _conv(64, 28, 64),
    _conv(64, 56, 64),
    _conv(128, 28, 128),
    _conv(64, 56, 128, stride=2),
    _conv(64, 28, 256, kernel=1),
    _conv(256, 14, 64, kernel=1),
    _conv(96, 28, 96, group=96),
    _conv(3, 112, 32, stride=2),
    _deconv(64, 14, 32, 4),
    _deconv(32, 28, 16, 2),
    _recurrent("LSTM", 4, 32, 128),
    _recurrent("GRU", 3, 32, 128),
)
"""Operators that do the work of a net."""
_IMAGE, _TOKENS = (1, 64, 28, 28), (1, 128, 768)
_POOL: dict[str, Any] = {"kernel_shape": [2, 2], "strides": [2, 2]}
OTHERS: tuple[Sample, ...] = (
    Sample(op="Add", data=(_IMAGE, _IMAGE)),
    Sample(op="Sub", data=(_IMAGE, _IMAGE)),
    Sample(op="Mul", data=(_IMAGE, _IMAGE)),
    Sample(op="Div", data=(_IMAGE, _IMAGE)),
    Sample(op="Max", data=(_IMAGE, _IMAGE)),
    Sample(op="Min", data=(_IMAGE, _IMAGE)),
    Sample(op="MaxPool", data=(_IMAGE,), attributes=_POOL),
    Sample(op="Relu", data=(_IMAGE,)),
    Sample(op="LeakyRelu", data=(_IMAGE,), attributes={"alpha": 0.1}),
    Sample(op="Sigmoid", data=(_IMAGE,)),
    Sample(op="Clip", data=(_IMAGE,), weights=(np.array(0.0, np.float32), np.array(6.0, np.float32))),
    Sample(op="Gelu", data=(_TOKENS,)),
    Sample(op="Erf", data=(_TOKENS,)),
)
"""Operators between those, timed in float16 only: in INT8 they follow their neighbours."""


def probed_kinds(profile: TargetProfile) -> list[TimedKind]:
    """What is timed of a profile's kernels: each operator in every form that it has a usable kernel for.

    The forms are those that a compile makes, by the same passes, so that timings of either serve both.
    """
    kinds = []
    for place, sample in enumerate((*WORKING, *OTHERS)):
        model, node = _model(sample)
        choices = _choices(model, node, profile) if place < len(WORKING) else []
        if choices:
            kinds.append(TimedKind(trial=_trial(node, choices[0][0]), choices=choices))
        if _usable(profile, sample.op, "float", "float16", None):
            kinds.append(_in_float16(node))
    return kinds


def _model(sample: Sample) -> tuple[Model, ir.Node]:
    """A model of one operator, and its node."""
    random = np.random.default_rng(0)
    inputs = [
        ir.Value(name=f"x{place}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        for place, shape in enumerate(sample.data)
    ]
    constants = []
    for place, given in enumerate(sample.weights):
        drawn = random.standard_normal(given) / 20 if isinstance(given, tuple) else given
        tensor = ir.tensor(drawn.astype(np.float32), name=f"w{place}")
        value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(drawn.shape))
        value.const_value = tensor
        constants.append(value)
    node = ir.node(sample.op, [*inputs, *constants], attributes=dict(sample.attributes))
    node.name = sample.op
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        inputs,
        node.outputs[:1],
        nodes=[node],
        initializers=constants,
        opset_imports={"": _OPSET, "com.microsoft": 1},
    )
    made = Model(ir.Model(graph, ir_version=_IR_VERSION), origin=Origin(kind="memory", name=sample.op))
    run_passes(made, [InferShapes()])
    (node,) = made.graph
    return made, node


def _trial(node: ir.Node, decision: Decision) -> Trial:
    trial = trial_of([node], [decision], {})
    if trial is None:
        raise InternalError(f"the shapes of the {node.op_type} that is timed are not known")
    return trial


def _in_float(node: ir.Node) -> Decision:
    name = str(node.name)
    macs = node_macs(node, {}) if node.op_type in COMPUTE_OPS | RECURRENT_OPS else None
    return Decision(node=name, op=node.op_type, group=name, form="float", reason=_PROBED, macs=macs)


def _usable(
    profile: TargetProfile, op: str, form: Form, activation: str, weight: str | None
) -> Kernel | None:
    """The profile's kernel for an operator of these types, unless the runtime refuses it."""
    for kernel in profile.candidates(op, forms=(form,)):
        if kernel.activation == activation and weight in (None, kernel.weight):
            return kernel
    return None


def _choices(model: Model, node: ir.Node, profile: TargetProfile) -> Choices:
    """Decisions as a compile makes them, also for forms that the profile believes to be slow."""
    wanted: list[tuple[Form, IntegerType | None]] = [("static", sign) for sign in _SIGNS]
    wanted += [("dynamic", None), ("weight-only", None)]
    choices: Choices = []
    for form, sign in wanted:
        if sign is not None and _usable(profile, node.op_type, form, sign, "int8") is None:
            continue
        request = Request(
            quantization="static" if form == "static" else "auto",
            calibrated=True,
            allow_unmeasured=True,
            verdicts={str(node.name): Verdict(form=form, reason=_PROBED)},
            static_activation=sign,
        )
        made = [item for item in propose(model, profile, request).decisions if item.form == form]
        choices += [made] if made else []
    return choices


def _in_float16(node: ir.Node) -> TimedKind:
    trial = _trial(node, _in_float(node))
    return TimedKind(trial=trial, names=(FLOAT16,), build=functools.partial(float16_forms, trial))


def float16_forms(trial: Trial) -> list[LoweredForm]:
    """An operator in float32, and with every tensor in float16."""
    model, feeds = float_model(trial)
    half = model.fork()
    for value in (*half.graph.inputs, *half.graph.outputs, *half.graph.initializers.values()):
        if value.dtype != ir.DataType.FLOAT:
            continue
        value.type = ir.TensorType(ir.DataType.FLOAT16)
        if value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)
    given = {
        name: values.astype(np.float16) if values.dtype == np.float32 else values
        for name, values in feeds.items()
    }
    return [
        LoweredForm(name=FLOAT, model=to_bytes(model), feeds=feeds),
        LoweredForm(name=FLOAT16, model=to_bytes(half), feeds=given),
    ]
