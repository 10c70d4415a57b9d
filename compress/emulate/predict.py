"""Which nodes of a quantized graph can saturate on x86 cores without VNNI, and which do on given data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec
import numpy as np
import onnx_ir as ir

from ...graph.edit import constant, int_attribute
from ...graph.model import Model
from ...graph.scheme import IntArray
from ...runtimes.base import Array, SessionOptions
from ...runtimes.ort_runtime import OrtSession
from ...targets.profile import TargetProfile
from ..plan import Plan
from .integer import convolution_products
from .saturation import HIGHEST, Risk, observed, worst_case

_PLAIN = SessionOptions(graph_optimization_level="disable_all")
_ROWS = 32
_WEIGHT_PLACES: Mapping[str, int] = {
    "MatMul": 1, "Gemm": 1, "Conv": 1, "MatMulInteger": 1, "ConvInteger": 1, "DynamicQuantizeMatMul": 1,
    "MatMulIntegerToFloat": 1, "QLinearMatMul": 3, "QGemm": 3, "QLinearConv": 3,
}  # fmt: skip
_CONVOLUTIONS = frozenset({"Conv", "ConvInteger", "QLinearConv"})
_DYNAMIC = frozenset({"DynamicQuantizeMatMul"})


class Saturation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One node whose products of 8-bit integers are added in pairs.

    `pairs` are pairs of weights, `saturating` those that some activation drives out of 16 bits, and
    `highest` the largest sum that a pair can come to (in magnitude). `observed_fraction` is the share
    of pair sums that left 16 bits on recorded data, None where none was looked at.
    """

    node: str
    op: str
    pairs: int
    saturating: int
    highest: int
    observed_fraction: float | None = None


class _Product(NamedTuple):
    node: ir.Node
    weight: IntArray
    data: ir.Value | None


def predict_saturation(model: Model) -> list[Saturation]:
    """Every integer product of a quantized graph with signed weights, with the worst its pairs can come to.

    Depthwise convolutions and unsigned weights are left out: their kernels widen first.

    Args:
        model: a graph with integer operators or Q/DQ pairs.
    """
    return [_worst(item) for item in _products(model)]


def observe_saturation(model: Model, feeds: Mapping[str, Array]) -> list[Saturation]:
    """`predict_saturation`, with the share of pair sums that saturate on one set of inputs.

    Of each product the first rows of its integer activations are looked at. A product inside a
    subgraph, or whose activations are quantized inside of it, has no observed share.

    Args:
        model: a graph with integer operators or Q/DQ pairs.
        feeds: inputs by name.
    """
    found = _products(model)
    names = {item.data.name: item.data for item in found if item.data is not None}
    part = model.fork()
    made = {value.name: value for node in part.graph for value in node.outputs}
    part.graph.outputs.clear()
    part.graph.outputs.extend(made[name] for name in names if name in made)
    values: dict[str, Array] = {}
    if part.graph.outputs:
        values = OrtSession.from_model(part, _PLAIN).run(feeds)
    results = []
    for item in found:
        risk, share = _worst(item), None
        if item.data is not None and item.data.name in values:
            share = _share(item, _integers(values[item.data.name]))
        results.append(msgspec.structs.replace(risk, observed_fraction=share))
    return results


def isa_notes(model: Model, plan: Plan, profile: TargetProfile) -> list[str]:
    """What another processor makes of this graph's integers, where it is not what this one does.

    Args:
        model: the lowered graph.
        plan: its plan.
        profile: the target; saturation is looked at where one of its kernels needs a reduced range.
    """
    notes = []
    if profile.needs_reduced_range:
        notes += _saturation_notes(predict_saturation(model), profile.name)
    if profile.device.architecture == "aarch64" and any(item.form == "dynamic" for item in plan.decisions):
        notes.append(
            "integer products are exact on Arm too, but dynamic scales follow float results, which Arm "
            "rounds otherwise: one step that flips moves an answer (by up to 4 % in relative L2 where it "
            "was looked at), no worse and no better"
        )
    return notes


def _saturation_notes(found: list[Saturation], target: str) -> list[str]:
    if not found:
        return []
    bad = [item for item in found if item.saturating]
    if not bad:
        highest = max(item.highest for item in found)
        return [
            f"no pair of products can saturate on {target}: in {len(found)} layers the largest possible "
            f"sum of two is {highest:,} of {HIGHEST:,}"
        ]
    worst = sorted(bad, key=lambda item: -item.saturating / item.pairs)[:3]
    listed = ", ".join(f"{item.node} ({item.saturating / item.pairs:.1%} of its pairs)" for item in worst)
    return [
        f"{len(bad)} of {len(found)} layers can saturate on {target}, whose 8-bit products are added two "
        f"at a time in 16 bits: {listed}; weights of 7 bits cannot"
    ]


def _products(model: Model) -> list[_Product]:
    return [item for node in model.graph.all_nodes() for item in _product(node)]


def _product(node: ir.Node) -> Iterator[_Product]:
    place = _WEIGHT_PLACES.get(node.op_type)
    if place is None or len(node.inputs) <= place:
        return
    weight, data = node.inputs[place], node.inputs[0]
    if node.op_type in ("MatMul", "Gemm", "Conv"):
        weight, data = _dequantized(weight), _dequantized(data)
        if data is None:
            return
    integers = constant(weight)
    if integers is None or integers.dtype != np.int8 or _is_depthwise(node, integers):
        return
    if node.op_type == "Gemm" and int_attribute(node, "transB", 0):
        integers = integers.T
    if node.op_type == "QGemm" and int_attribute(node, "transB", 0):
        integers = integers.T
    yield _Product(node, np.asarray(integers, np.int8), None if node.op_type in _DYNAMIC else data)


def _dequantized(value: ir.Value | None) -> ir.Value | None:
    maker = None if value is None else value.producer()
    return maker.inputs[0] if maker is not None and maker.op_type == "DequantizeLinear" else None


def _is_depthwise(node: ir.Node, weight: Array) -> bool:
    return node.op_type in _CONVOLUTIONS and weight.shape[1] == 1 and int_attribute(node, "group", 1) > 1


def _columns(item: _Product) -> list[IntArray]:
    """The weight as matrices (K, columns) in the order in which the kernel adds along K."""
    if item.node.op_type in _CONVOLUTIONS:
        group = int_attribute(item.node, "group", 1)
        parts = np.split(item.weight, group)
        return [np.moveaxis(part, 1, -1).reshape(part.shape[0], -1).T for part in parts]
    return list(item.weight.reshape(-1, *item.weight.shape[-2:])) if item.weight.ndim > 1 else []


def _worst(item: _Product) -> Saturation:
    risks = [worst_case(matrix) for matrix in _columns(item)]
    total = Risk(
        pairs=sum(risk.pairs for risk in risks),
        saturating=sum(risk.saturating for risk in risks),
        lowest=min((risk.lowest for risk in risks), default=0),
        highest=max((risk.highest for risk in risks), default=0),
    )
    return Saturation(
        node=item.node.name or "",
        op=item.node.op_type,
        pairs=total.pairs,
        saturating=total.saturating,
        highest=max(total.highest, -total.lowest),
    )


def _share(item: _Product, data: IntArray) -> float | None:
    """The share of pair sums that saturate for the first rows of integer activations."""
    node, counts = item.node, []
    if node.op_type in _CONVOLUTIONS:
        if data.ndim != 4 or "auto_pad" in node.attributes:
            return None
        products = convolution_products(
            data[:1],
            0,
            item.weight,
            strides=_ints(node, "strides", (1, 1)),
            pads=_ints(node, "pads", (0, 0, 0, 0)),
            dilations=_ints(node, "dilations", (1, 1)),
            group=int_attribute(node, "group", 1),
        )
        counts = [observed(rows.reshape(-1, rows.shape[-1])[:_ROWS], matrix) for rows, matrix in products]
    elif item.weight.ndim == 2 and not int_attribute(node, "transA", 0):
        counts = [observed(data.reshape(-1, data.shape[-1])[:_ROWS], item.weight)]
    total = sum(pairs for _, pairs in counts)
    return sum(saturated for saturated, _ in counts) / total if total else None


def _integers(values: Array) -> IntArray:
    return values if values.dtype == np.int8 else values.astype(np.uint8)  # type: ignore[return-value]


def _ints(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(node.attributes[name].as_ints()) if name in node.attributes else default
