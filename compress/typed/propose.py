"""Deciding, node by node, what is stored or computed in 16-bit floats."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import msgspec
import onnx
import onnx_ir as ir

from ...graph.edit import int_attribute, is_constant, static_dim
from ...graph.model import Model
from ...targets.profile import Form, TargetProfile
from ..cost import bind_axes, node_macs
from ..operands import (
    COMPUTE_OPS,
    FORM_OPSETS,
    RECURRENT_OPS,
    is_liftable,
    reads_rows,
    weight_name,
)
from ..plan import Decision, Plan
from .biases import bias_of
from .convert import is_float, needs_float
from .formats import LARGEST, TYPE_NAMES, Format, Loss, tensor_loss
from .storage import STORED_OPS, storable, weights_of

HEAVY_OPS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})
"""What a 16-bit form is chosen for: the operators with the multiply-accumulates."""
MOVING_OPS = frozenset(
    {
        "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze",
        "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""What moves values: in 16 bits where all that it reads is 16 bits already."""
ROUNDING_OPS = frozenset(
    {
        "Add", "Clip", "Div", "Erf", "Gelu", "LeakyRelu", "Max", "MaxPool", "Min", "Mul", "Relu", "Sigmoid",
        "Sub",
    }
)  # fmt: skip
"""What rounds each result once: it follows too, where the runtime's kernel is no slower than float32's."""
SENSITIVE_OPS: Mapping[str, str] = {
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "GroupNormalization"), "sums squares"),
    **dict.fromkeys(
        ("InstanceNormalization", "BatchNormalization", "LRN", "LpNormalization"), "sums squares"
    ),
    **dict.fromkeys(("Softmax", "LogSoftmax", "ReduceLogSumExp", "Exp", "Softplus"), "takes exponentials"),
    **dict.fromkeys(
        ("ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceProd", "ReduceSumSquare", "CumSum"),
        "adds up many values",
    ),
    **dict.fromkeys(("GlobalAveragePool", "AveragePool", "Einsum"), "adds up many values"),
    **dict.fromkeys(("Pow", "Sqrt", "Reciprocal", "Log"), "leaves the range of small floats"),
}
HEADROOM = 2.0
"""Activations count as out of range from this fraction (1 / HEADROOM) of the largest number on."""


def propose_storage(
    model: Model,
    profile: TargetProfile,
    form: Form,
    *,
    keep_float: Sequence[str] = (),
    taken: Mapping[str, str] | None = None,
) -> Plan:
    """Weights stored in 16 bits behind a Cast that the runtime folds when it loads the file.

    Stored are the float32 weights of MatMul, Gemm, convolutions and recurrent layers and the tables
    of Gather, of 1,024 elements or more. Biases, norm scales and all other constants stay float32;
    so does a weight that the format cannot hold, with that reason.

    Args:
        model: the prepared float graph; not changed.
        profile: the target, for the plan's name.
        form: "bf16-storage" or "fp16-storage".
        keep_float: regular expressions searched in node and weight names.
        taken: nodes that have another form already -> the reason to leave them alone.
    """
    proposer = _Proposer(model, profile, form, keep_float, taken)
    return _plan(profile, proposer, proposer.storage())


def propose_compute(
    model: Model,
    profile: TargetProfile,
    kind: Format,
    *,
    keep_float: Sequence[str] = (),
    largest: Mapping[str, float] | None = None,
    taken: Mapping[str, str] | None = None,
) -> Plan:
    """What computes in float16 or bfloat16 on a target that has the kernels, and what stays float32.

    Products and convolutions compute in 16 bits; what stands between them follows where everything
    it reads is 16 bits already. Normalizations, Softmax, reductions and powers stay float32.

    Args:
        model: the prepared float graph, its value types inferred; not changed.
        profile: names the kernels that are there.
        kind: "fp16" or "bf16".
        keep_float: regular expressions searched in node and weight names.
        largest: tensor name -> largest magnitude that was seen; a tensor beyond half of the format's
            largest number keeps its producer and its readers in float32.
        taken: nodes that have another form already -> the reason to leave them alone.
    """
    proposer = _Proposer(model, profile, kind, keep_float, taken)
    return _plan(profile, proposer, proposer.compute(largest or {}))


def _plan(profile: TargetProfile, proposer: _Proposer, decisions: Sequence[Decision]) -> Plan:
    unused = [pattern.pattern for pattern in proposer.patterns if pattern not in proposer.matched]
    empty = Plan(
        target=profile.name,
        precision="fp32",
        quantization="none",
        decisions=(),
        notes=tuple(f"--keep-float {text!r} matches nothing that would be stored smaller" for text in unused),
    )
    return empty.with_decisions(decisions)


class _Proposer:
    def __init__(
        self,
        model: Model,
        profile: TargetProfile,
        form: Form,
        keep_float: Sequence[str],
        taken: Mapping[str, str] | None = None,
    ) -> None:
        self.model = model
        self.profile = profile
        self.form = form
        self.kind: Format = "bf16" if form.startswith("bf16") else "fp16"
        self.patterns = [re.compile(text) for text in keep_float]
        self.matched: set[re.Pattern[str]] = set()
        self.taken = taken or {}
        self.sizes = bind_axes(model, {})
        self._storable: dict[int, str | None] = {}
        self._losses: dict[int, Loss] = {}

    def storage(self) -> list[Decision]:
        form: Form = "bf16-storage" if self.kind == "bf16" else "fp16-storage"
        liftable = is_liftable(self.model, FORM_OPSETS[form])
        old = f"the model cannot be converted to operator set {FORM_OPSETS[form]}"
        found = []
        for node in self.model.graph.all_nodes():
            if not any(True for _ in weights_of(node)):
                continue
            found.append(self._stored(node, form) if liftable else self._stay(node, old))
        return found

    def _stored(self, node: ir.Node, form: Form) -> Decision:
        kept = self._kept(node)
        if kept is not None:
            return self._stay(node, kept)
        weights = list(weights_of(node))
        reasons = {value.name: self._why_not_stored(value) for value in weights}
        fitting = [value for value in weights if reasons[value.name] is None]
        if not fitting:
            return self._stay(node, "; ".join(dict.fromkeys(filter(None, reasons.values()))))
        name = TYPE_NAMES[self.kind]
        rows = all(reads_rows(use.node, fitting[0]) for use in fitting[0].uses())
        how = (
            "its rows are cast to float32 when they are looked up"
            if rows
            else "cast to float32 when it is loaded"
        )
        return self._decision(
            node,
            form,
            f"stored in {name}, {how}: the kernels are those of float32",
            group=fitting[0].name or "",
            evidence="modelled",
            source="the runtime's optimised graph: that of the float32 model",
        )

    def _why_not_stored(self, value: ir.Value) -> str | None:
        if id(value) not in self._storable:
            self._storable[id(value)] = storable(value, self.kind)[0]
        return self._storable[id(value)]

    def compute(self, largest: Mapping[str, float]) -> list[Decision]:
        found: list[Decision] = []
        groups: dict[int, str] = {}
        storage: Form = "bf16-storage" if self.kind == "bf16" else "fp16-storage"
        for node in self.model.graph.all_nodes():
            if not any(is_float(value) for value in node.outputs):
                continue
            reason = self._why_not_computed(node, groups, largest)
            if reason is None:
                decision = self._computed(node, groups)
                groups |= {id(value): decision.group for value in node.outputs if is_float(value)}
            elif node.op_type in STORED_OPS and any(True for _ in weights_of(node)):
                decision = self._stored(node, storage)
                if decision.form == "float" and node.op_type in HEAVY_OPS:
                    decision = self._stay(node, reason)
            else:
                decision = self._stay(node, reason)
            found.append(decision)
        return found

    def _computed(self, node: ir.Node, groups: Mapping[int, str]) -> Decision:
        name = TYPE_NAMES[self.kind]
        if node.op_type not in HEAVY_OPS:
            group = next(groups[id(value)] for value in node.inputs if id(value) in groups)
            joined = bias_of(node) if self.profile.runtime.name == "onnxruntime" else None
            if joined is None:
                return self._decision(node, self.kind, f"all that it reads is {name}", group=group)
            made = self._decision(node, self.kind, "the product starts from it", group=group)
            return msgspec.structs.replace(made, weight=joined[1].name)
        kernel = self.profile.kernel(node.op_type, "float", activation=name)
        return self._decision(
            node,
            self.kind,
            kernel.reason if kernel is not None and kernel.reason else f"computes in {name}",
            group=node.name or "",
            evidence="none" if kernel is None else kernel.evidence,
            source="" if kernel is None else kernel.source,
        )

    def _why_not_computed(
        self, node: ir.Node, groups: Mapping[int, str], largest: Mapping[str, float]
    ) -> str | None:
        """Why a node stays float32, or None; the checks that read weights come last."""
        checks: tuple[Callable[[ir.Node], str | None], ...] = (
            self._kept,
            self._outside,
            self._no_kernel,
            lambda item: self._does_not_follow(item, groups),
            lambda item: self._overflows(item, largest),
            self._bad_constant,
        )
        return next((reason for check in checks if (reason := check(node)) is not None), None)

    def _outside(self, node: ir.Node) -> str | None:
        if node.graph is not self.model.graph:
            return "it stands in the body of an If, Loop or Scan"
        if node.op_type in SENSITIVE_OPS and node.domain in ("", "ai.onnx"):
            return f"it {SENSITIVE_OPS[node.op_type]}: kept in float32"
        if node.domain not in ("", "ai.onnx") or node.op_type not in HEAVY_OPS | MOVING_OPS | ROUNDING_OPS:
            return f"{node.op_type} is kept in float32"
        unknown = [value for value in node.inputs if value is not None and value.dtype is None]
        return "the type of what it reads is not known" if unknown else None

    def _no_kernel(self, node: ir.Node) -> str | None:
        name = TYPE_NAMES[self.kind]
        if not _allows(node.op_type, self.model.opset, name):
            return f"operator set {self.model.opset} has no {node.op_type} in {name}"
        if node.op_type in MOVING_OPS or self.profile.runtime.name != "onnxruntime":
            return None
        odd = _odd_form(node)
        if odd is not None:
            return odd
        if bias_of(node) is not None:
            return None
        kernel = self.profile.kernel(node.op_type, "float", activation=name)
        if kernel is None:
            return self.profile.refusal(node.op_type, "float", activation=name)
        return None if kernel.grade == "fast" else kernel.reason or f"no faster in {name}"

    def _does_not_follow(self, node: ir.Node, groups: Mapping[int, str]) -> str | None:
        if node.op_type in HEAVY_OPS:
            return None
        read = [value for place in needs_float(node) if (value := node.inputs[place]) is not None]
        computed = [value for value in read if not is_constant(value)]
        if computed and all(id(value) in groups for value in computed):
            return None
        return "what it reads is float32"

    def _overflows(self, node: ir.Node, largest: Mapping[str, float]) -> str | None:
        limit = LARGEST[self.kind] / HEADROOM
        for value in (*node.inputs, *node.outputs):
            seen = largest.get(value.name or "", 0.0) if value is not None else 0.0
            if value is not None and not seen <= limit:
                return (
                    f"{value.name!r} reaches {seen:.4g} on the data, beyond half of "
                    f"{TYPE_NAMES[self.kind]}'s {LARGEST[self.kind]:.5g}"
                )
        return None

    def _bad_constant(self, node: ir.Node) -> str | None:
        for place in needs_float(node):
            value = node.inputs[place]
            if value is None or value.const_value is None or not is_constant(value):
                continue
            if id(value) not in self._losses:
                self._losses[id(value)] = tensor_loss(value.const_value, self.kind)
            reason = self._losses[id(value)].reason(self.kind)
            if reason is not None:
                return f"{value.name!r}: {reason}"
        return None

    def _kept(self, node: ir.Node) -> str | None:
        taken = self.taken.get(node.name or "")
        if taken is not None:
            return taken
        names = [name for name in (node.name, weight_name(node)) if name]
        for pattern in self.patterns:
            if any(pattern.search(name) for name in names):
                self.matched.add(pattern)
                return f"kept in float by --keep-float {pattern.pattern!r}"
        return None

    def _stay(self, node: ir.Node, reason: str) -> Decision:
        return self._decision(node, "float", reason, group=node.name or "")

    def _decision(
        self, node: ir.Node, form: Form, reason: str, *, group: str, evidence: str = "none", source: str = ""
    ) -> Decision:
        working = node.op_type in COMPUTE_OPS | RECURRENT_OPS
        return Decision(
            node=node.name or "",
            op=node.op_type,
            group=group,
            form=form,
            reason=reason,
            weight=weight_name(node),
            evidence=evidence,  # type: ignore[arg-type]
            source=source,
            macs=node_macs(node, self.sizes) if working else None,
        )


def _odd_form(node: ir.Node) -> str | None:
    """Why onnxruntime's float16 kernel does not serve this form of an operator, or None.

    Counted under QEMU -cpu cortex-a76: 320 times the instructions of float32 for Gemm with a transposed
    matrix, 1.3 times for grouped convolutions.
    """
    if node.op_type == "Gemm":
        if {"alpha", "beta"} & set(node.attributes) or int_attribute(node, "transA", 0):
            return "Gemm with factors or a transposed input has no fast float16 kernel"
        if int_attribute(node, "transB", 0) and not is_constant(node.inputs[1]):
            return "Gemm with a transposed matrix that is computed has no fast float16 kernel"
    if node.op_type == "Conv":
        group, inner = int_attribute(node, "group", 1), static_dim(node.inputs[1], 1)
        if group > 1 and inner != 1:
            return "grouped convolutions take more instructions in float16"
    return None


def _allows(op_type: str, opset: int, name: str) -> bool:
    """Whether an operator's first result may have a type in an operator set."""
    try:
        schema = onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return False
    wanted, first = f"tensor({name})", schema.outputs[0].type_str
    allowed = next(
        (item.allowed_type_strs for item in schema.type_constraints if item.type_param_str == first), ()
    )
    return wanted in allowed
