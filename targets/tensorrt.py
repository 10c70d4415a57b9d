"""Whether TensorRT's parser will take a model: opset, operators and types against its release's table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

import msgspec
import onnx_ir as ir

from ..graph.errors import TargetError
from ..graph.model import Model
from ..graph.shapes import InferShapes
from .operator_table import OperatorEntry, OperatorTable, first_support, operator_table
from .profile import Gpu, TargetProfile
from .tensorrt_rules import QUANTIZERS, breaches, is_covered, quantized_type

Level = Literal["blocked", "check", "note"]
_WHOLE = "(model)"
_DEFAULT_DOMAINS = ("", "ai.onnx")
_TYPES = {
    ir.DataType.FLOAT: "FP32",
    ir.DataType.DOUBLE: "FP32",
    ir.DataType.FLOAT16: "FP16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.FLOAT8E4M3FN: "FP8",
    ir.DataType.FLOAT4E2M1: "FP4",
    ir.DataType.INT4: "INT4",
    ir.DataType.INT8: "INT8",
    ir.DataType.INT32: "INT32",
    ir.DataType.INT64: "INT64",
    ir.DataType.UINT8: "UINT8",
    ir.DataType.BOOL: "BOOL",
}
# Precisions that some GPUs lack; the others TensorRT computes in everywhere.
_DEVICE_PRECISIONS = ("BF16", "INT8", "FP8", "FP4")
# Whole numbers that only size other tensors are computed apart, whatever a kernel's types are.
_SHAPE_TYPES = ("INT32", "INT64", "BOOL")
_QUANTIZED_TYPES = ("INT8", "INT4", "FP8", "FP4")
_BRANCHES = ("If", "Loop", "Scan")
_MADE_BY_OUTPUT = ("Constant", "ConstantOfShape", "EyeLike", "RandomNormal", "RandomUniform", "Range")
_SUBJECT_INPUT = {"Where": 1, "OneHot": 2}

_QDQ = "quantize in Q/DQ form: symmetric INT8, zero point 0, calibrated scales"
_REMEDIES = {
    "DynamicQuantizeLinear": f"{_QDQ}; dynamic quantization is in no release of the parser",
    "MatMulInteger": f"{_QDQ}, with a float MatMul between",
    "ConvInteger": f"{_QDQ}, with a float Conv between",
    "QLinearConv": f"{_QDQ}; with onnxruntime's quantizer: quant_format=QuantFormat.QDQ",
    "QLinearMatMul": f"{_QDQ}; with onnxruntime's quantizer: quant_format=QuantFormat.QDQ",
    "LayerNormalization": "export with opset 16 or older, which writes it as ReduceMean, Sub, Pow, Sqrt, Div",
    "GroupNormalization": "export with opset 17 or older, which writes it as InstanceNormalization",
    "Gelu": "export with opset 19 or older, which writes it with Erf or Tanh",
    "RMSNormalization": "export with opset 22 or older, which writes it as Pow, ReduceMean, Sqrt, Div",
    "RotaryEmbedding": "export with opset 22 or older, which writes it as Mul, Neg, Concat",
    "Attention": "export with opset 22 or older, which writes it as MatMul and Softmax",
}


# Level, rule, operator, reason, remedy: what a finding says, apart from its nodes.
_Key: TypeAlias = tuple[Level, str, str, str, str]


class OperatorFinding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing about a model that TensorRT refuses (blocked), may refuse (check), or changes (note).

    Attributes:
        op: the operator, with its domain unless it is ONNX's own; "(model)" for the whole file.
        nodes: names of the nodes it is about, in graph order.
    """

    level: Level
    rule: Literal["opset", "operator", "domain", "restriction", "type", "precision"]
    op: str
    nodes: tuple[str, ...]
    reason: str
    remedy: str


class OperatorCheck(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the operator table says of a model; nothing was parsed or built by TensorRT.

    Attributes:
        ready: whether nothing is blocked.
        table: the release whose table was read, which may be older than `version`.
        verdict: the answer in one sentence.
        findings: blocked ones first, then to check, then notes.
    """

    target: str
    version: str
    table: str
    table_transcription: str
    ready: bool
    verdict: str
    findings: tuple[OperatorFinding, ...]


def check_operators(model: Model, profile: TargetProfile) -> OperatorCheck:
    """Check a model against the operator table of a TensorRT target; the model is left as it is.

    Raises:
        TargetError: if the profile is no TensorRT target or names a table that does not exist.
    """
    runtime, gpu = profile.runtime, profile.gpu
    if runtime.operator_table is None or gpu is None:
        raise TargetError(f"{profile.name} is no TensorRT target", where="--target")
    table = operator_table(runtime.operator_table)
    typed = model.fork()
    InferShapes().run(typed)
    check = _Check(profile, table, gpu)
    check.opset(model.opset)
    functions = {(function.domain, function.name) for function in typed.ir.functions.values()}
    for node in _nodes(typed):
        if (node.domain, node.op_type) not in functions:
            check.node(node)
    check.precisions()
    order: tuple[Level, ...] = ("blocked", "check", "note")
    findings = tuple(sorted(check.findings(), key=lambda item: order.index(item.level)))
    return OperatorCheck(
        target=profile.name,
        version=runtime.version,
        table=runtime.operator_table,
        table_transcription=table.transcription,
        ready=all(item.level != "blocked" for item in findings),
        verdict=_verdict(profile, findings),
        findings=findings,
    )


def _nodes(model: Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.ir.functions.values():
        yield from function.all_nodes()


def _verdict(profile: TargetProfile, findings: tuple[OperatorFinding, ...]) -> str:
    where = f"{profile.name} (TensorRT {profile.runtime.version}"
    where += f", JetPack {profile.runtime.jetpack})" if profile.runtime.jetpack else ")"
    blocked = [item for item in findings if item.level == "blocked"]
    if blocked:
        ops = dict.fromkeys(f"the {item.rule}" if item.op == _WHOLE else item.op for item in blocked)
        return f"NOT READY for {where}: {', '.join(ops)} must change first."
    said = f"READY for {where} as far as the operator table of {profile.runtime.operator_table} says"
    to_check = sum(item.level == "check" for item in findings)
    rest = f"; {to_check} to check yourself" if to_check else ""
    return f"{said}{rest}. No engine was built."


class _Check:
    """Collects findings; equal ones of several nodes become one."""

    def __init__(self, profile: TargetProfile, table: OperatorTable, gpu: Gpu) -> None:
        self.profile, self.table, self.gpu = profile, table, gpu
        self.release = f"TensorRT {profile.runtime.operator_table}"
        self.found: dict[_Key, list[str]] = {}
        self.computed: dict[str, list[str]] = {}
        self.has_int64 = any("INT64" in entry.types for entry in table.operators.values())
        self.known_types = {kind for entry in table.operators.values() for kind in entry.types}

    def add(self, key: _Key, node: str | None = None) -> None:
        nodes = self.found.setdefault(key, [])
        if node is not None and node not in nodes[-1:]:
            nodes.append(node)

    def findings(self) -> Iterator[OperatorFinding]:
        for (level, rule, op, reason, remedy), nodes in self.found.items():
            yield msgspec.convert(
                {
                    "level": level,
                    "rule": rule,
                    "op": op,
                    "nodes": tuple(nodes),
                    "reason": reason,
                    "remedy": remedy,
                },
                OperatorFinding,
            )

    def opset(self, opset: int) -> None:
        newest, oldest = self.profile.runtime.max_opset, self.table.opset_min
        if opset > newest:
            self.add(
                (
                    "blocked",
                    "opset",
                    _WHOLE,
                    f"opset {opset} is newer than {newest}, the newest that TensorRT "
                    f"{self.profile.runtime.version} documents",
                    f"export again with opset {newest} or older (torch.onnx.export: opset_version={newest})",
                )
            )
        elif opset < oldest:
            self.add(
                (
                    "blocked",
                    "opset",
                    _WHOLE,
                    f"opset {opset} is older than {oldest}, the oldest that {self.release} documents",
                    f"convert to opset {oldest} or newer (onnx.version_converter), or export again",
                )
            )

    def node(self, node: ir.Node) -> None:
        name = node.name or node.op_type
        if node.domain not in _DEFAULT_DOMAINS:
            self.add(
                (
                    "blocked",
                    "domain",
                    f"{node.domain}::{node.op_type}",
                    f"the parser knows ONNX's own operators; {node.domain} is another's",
                    "export without that runtime's fusions, or bring a TensorRT plugin of this name",
                ),
                name,
            )
            return
        entry = self.table.operators.get(node.op_type)
        if entry is None:
            self.add(
                ("blocked", "operator", node.op_type, self._refusal(node.op_type), _remedy(node.op_type)),
                name,
            )
            return
        for breach in breaches(node, entry):
            self.add(("blocked", "restriction", node.op_type, breach.reason, breach.remedy), name)
        if entry.restrictions and not is_covered(node.op_type):
            self.add(
                ("check", "restriction", node.op_type, entry.restrictions, "see that the nodes keep to it"),
                name,
            )
        self._types(node, entry, name)

    def _refusal(self, op: str) -> str:
        named = "refuses it" if op in self.table.unsupported else "does not know it"
        since = first_support(op)
        later = (
            f"; {since} is the first of the tables read that takes it"
            if since
            else "; no table read takes it"
        )
        return f"the operator table of {self.release} {named}{later}"

    def _types(self, node: ir.Node, entry: OperatorEntry, name: str) -> None:
        for dtype in _subjects(node):
            kind = _TYPES.get(dtype)
            if kind is None:
                self.add(
                    ("blocked", "type", node.op_type, f"TensorRT has no type {dtype.name}", "cast before it"),
                    name,
                )
                continue
            self.computed.setdefault(kind, []).append(name)
            if dtype == ir.DataType.DOUBLE:
                self.add(
                    (
                        "note",
                        "type",
                        _WHOLE,
                        "float64 is computed in FP32",
                        "compare results at FP32's precision",
                    ),
                    name,
                )
            if kind == "INT64" and not self.has_int64:
                # The parsers of TensorRT 6 to 8 say so themselves, and clamp (onnx/onnx-tensorrt, issue 432).
                kind = "INT32"
                self.add(
                    (
                        "note",
                        "type",
                        _WHOLE,
                        f"{self.release} narrows INT64 to INT32",
                        "keep values below 2^31: larger ones are clamped",
                    )
                )
            if kind not in entry.types:
                self._missing(node.op_type, kind, entry, name)
        if node.op_type in QUANTIZERS:
            quantized = _TYPES.get(quantized_type(node) or ir.DataType.UNDEFINED)
            if quantized in _DEVICE_PRECISIONS:
                self.computed.setdefault(quantized, []).append(name)

    def _missing(self, op: str, kind: str, entry: OperatorEntry, name: str) -> None:
        reason = f"computes in {kind}; the table lists {', '.join(entry.types) or 'no types'}"
        if kind in _SHAPE_TYPES:
            remedy = "works where the values only size other tensors; otherwise cast before it"
            self.add(("check", "type", op, reason, remedy), name)
        elif kind in _QUANTIZED_TYPES:
            remedy = "put it before QuantizeLinear or behind DequantizeLinear"
            if op != "Constant":  # a stored weight or zero point
                self.add(("check", "type", op, reason, remedy), name)
        elif kind in self.known_types or kind != "BF16":
            self.add(("blocked", "type", op, reason, "cast before it"), name)
        # A type that no operator of this release has is reported once, by `precisions`.

    def precisions(self) -> None:
        """Findings about the whole file: what the GPU lacks, what a strongly typed network keeps."""
        if (
            self.profile.runtime.typing == "strong"
            and "FP32" in self.computed
            and "FP16" not in self.computed
        ):
            reason = "the network is strongly typed: what is FP32 in the file is computed in FP32 (or TF32)"
            self.add(("note", "precision", _WHOLE, reason, "convert to FP16 or BF16 first to run in that"))
        for kind in _DEVICE_PRECISIONS:
            nodes = self.computed.get(kind)
            if not nodes:
                continue
            if kind in self.gpu.disputed_precisions:
                level: Level = "check"
                reason = f"the sources contradict each other: {self.gpu.disputed_source}"
            elif kind not in self.gpu.precisions:
                level = "blocked"
                reason = (
                    f"the GPU (compute capability {self.gpu.compute_capability}) has no {kind} in TensorRT"
                )
            elif kind == "BF16" and kind not in self.known_types:
                level, reason = "blocked", f"{self.release} has no {kind}"
            else:
                continue
            for name in dict.fromkeys(nodes):
                self.add((level, "precision", _WHOLE, reason, "use the float model in FP16 or FP32"), name)


def _remedy(op: str) -> str:
    if op in _REMEDIES:
        return _REMEDIES[op]
    return "replace it before the export with operators of the table, or bring a TensorRT plugin of this name"


def _subjects(node: ir.Node) -> list[ir.DataType]:
    """The types that decide whether an operator is served: those of the data it works on."""
    if node.op_type in _BRANCHES or node.op_type == "DequantizeLinear":
        return []
    position = _SUBJECT_INPUT.get(node.op_type, 0)
    values = [node.inputs[position] if position < len(node.inputs) else None]
    if node.op_type in _MADE_BY_OUTPUT or values == [None]:
        values = [node.outputs[0]]
    elif node.op_type == "Cast":
        values.append(node.outputs[0])
    return [value.dtype for value in values if value is not None and value.dtype is not None]
