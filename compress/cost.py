"""Counting the multiply-accumulates of a graph at given input shapes."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ..graph.edit import int_attribute
from ..graph.model import Model
from .operands import COMPUTE_OPS, CONVOLUTIONS, RECURRENT_OPS

DEFAULT_BATCH = 1
DEFAULT_LENGTH = 128


def bind_axes(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Sizes of the graph's named dynamic axes: from given input shapes, else 1 first and 128 after.

    Args:
        model: the graph whose inputs name their dynamic axes.
        shapes: input name -> shape for the inputs that the caller fixes.

    Returns:
        Axis name -> size, for every named axis of every input.
    """
    sizes: dict[str, int] = {}
    for spec in model.inputs:
        given = shapes.get(spec.name)
        for place, dim in enumerate(spec.shape or ()):
            if not isinstance(dim, str):
                continue
            if given is not None and place < len(given):
                sizes[dim] = given[place]
            else:
                sizes.setdefault(dim, DEFAULT_BATCH if place == 0 else DEFAULT_LENGTH)
    return sizes


def concrete_shape(value: ir.Value | None, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    """The shape of `value` with named axes bound to sizes, or None where an axis stays unknown."""
    if value is None or value.shape is None:
        return None
    dims: list[int] = []
    for dim in value.shape:
        if isinstance(dim, int):
            dims.append(dim)
            continue
        bound = None if dim.value is None else sizes.get(dim.value)
        if bound is None and dim.value is not None:
            evaluated = dim.evaluate(sizes)
            bound = evaluated if isinstance(evaluated, int) else None
        if bound is None:
            return None
        dims.append(bound)
    return tuple(dims)


def node_macs(node: ir.Node, sizes: Mapping[str, int]) -> int | None:
    """Multiply-accumulates of a product, convolution or recurrent layer; None if a shape is not known."""
    if node.op_type in RECURRENT_OPS:
        steps, weights = concrete_shape(node.inputs[0], sizes), node.inputs[1:3]
        shapes = [concrete_shape(value, sizes) for value in weights]
        if steps is None or any(shape is None for shape in shapes):
            return None
        return steps[0] * steps[1] * sum(_product(shape) for shape in shapes if shape is not None)
    output = concrete_shape(node.outputs[0], sizes)
    weight = concrete_shape(node.inputs[1], sizes) if len(node.inputs) > 1 else None
    if node.op_type == "ConvTranspose":
        source = concrete_shape(node.inputs[0], sizes)
        return None if source is None or weight is None else _product(source) * _product(weight[1:])
    if output is None or weight is None:
        return None
    if node.op_type == "Conv":
        return _product(output) * _product(weight[1:])
    if node.op_type == "Gemm":
        depth = weight[1] if int_attribute(node, "transB", 0) else weight[0]
        return _product(output) * depth
    if node.op_type == "MatMul":
        return _product(output) * weight[-2 if len(weight) > 1 else 0]
    return None


def led_by_convolutions(model: Model, sizes: Mapping[str, int]) -> bool:
    """Whether convolutions do at least half of the known multiply-accumulates.

    Of a net whose convolutions have unknown shapes it is assumed; without a convolution it is not so.
    """
    convolutions = total = 0
    for node in model.graph.all_nodes():
        if node.op_type not in COMPUTE_OPS | RECURRENT_OPS or node.domain not in ("", "ai.onnx"):
            continue
        macs = node_macs(node, sizes)
        if node.op_type in CONVOLUTIONS:
            if macs is None:
                return True
            convolutions += macs
        total += macs or 0
    return 0 < total <= 2 * convolutions


def _product(sizes: tuple[int, ...]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
