"""Linear layers in their many spellings -> MatMul + Add, the form that has dynamic and block-wise kernels."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...graph.edit import (
    Array,
    Editor,
    constant,
    float_attribute,
    int_attribute,
    is_constant,
    only_use,
    producer,
    rank,
    split_constant,
)
from ...graph.rewrite import Refused, Verdict
from ...graph.symbolic import axis_terms


class GemmToMatMul(NamedTuple):
    """Gemm(x, W, b) -> Add(MatMul(x, W), b), with a transposed weight turned ahead of time.

    The runtime makes a Gemm of it again where it stays float, so nothing is lost.
    """

    name: str = "gemm-to-matmul"
    roots: frozenset[str] = frozenset({"Gemm"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        source, weight = node.inputs[0], node.inputs[1]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if not is_constant(weight) or weight is None or source is None or node.graph is None:
            return Refused("its weight is computed")
        if int_attribute(node, "transA", 0):
            return Refused("its first operand is transposed")
        if float_attribute(node, "alpha", 1.0) != 1.0 or float_attribute(node, "beta", 1.0) != 1.0:
            return Refused("it scales its operands")
        graph = node.graph if isinstance(node.graph, ir.Graph) else editor.model.graph
        if int_attribute(node, "transB", 0):
            values = constant(weight)
            if values is None or rank(weight) != 2:
                return Refused("its weight has no two axes")
            weight = _turned(weight.name or "weight", values.T, graph, editor)
        result = node.outputs[0]
        stem = result.name or "linear"
        product = editor.value("MatMul", [source, weight], before=node, stem=f"{stem}/product", like=result)
        if bias is not None:
            product = editor.value("Add", [product, bias], before=node, stem=f"{stem}/biased", like=result)
        editor.replace(result, product)
        return True


def _turned(name: str, values: Array, graph: ir.Graph, editor: Editor) -> ir.Value:
    """The transposed weight as an initializer; the one that another Gemm of a tied weight made is taken."""
    stem = f"{name}.transposed"
    known = graph.initializers.get(stem)
    contents = constant(known)
    if known is not None and contents is not None and np.array_equal(contents, values):
        return known
    return editor.tensor(ir.tensor(np.ascontiguousarray(values)), stem, graph)


class FlatLinear(NamedTuple):
    """Reshape to [tokens, K] -> MatMul (+ Add) -> Reshape to the old leading axes -> MatMul (+ Add).

    GPT-2's Conv1D, once `GemmToMatMul` has been at it. The runtime's product takes any number of
    leading axes, and static INT8 is not held up by a Reshape on either side.
    """

    name: str = "flat-linear"
    roots: frozenset[str] = frozenset({"Reshape"})

    def apply(self, node: ir.Node, editor: Editor) -> Verdict:
        """See `Rule`."""
        parts = _flat_product(node.inputs[0])
        if parts is None or node.inputs[0] is None:
            return False
        source, product, biased, bias = parts
        weight, result = product.inputs[1], node.outputs[0]
        before, after, widths = axis_terms(source), axis_terms(result), axis_terms(weight)
        if before is None or after is None or widths is None:
            return Refused("the shapes are not known")
        leading = len(after) - 1
        inner = [term for term in before[leading:] if isinstance(term, int)]
        if leading < 1 or after != [*before[:leading], widths[1]]:
            return Refused("the result has other leading axes than the input")
        if len(inner) != len(before) - leading or math.prod(inner) != widths[0]:
            return Refused("more than the leading axes are flattened")
        if any(only_use(value) is None for value in (product.outputs[0], node.inputs[0])):
            return Refused("the flat result is also used elsewhere")
        stem = result.name or "linear"
        if len(inner) > 1:
            source = _joined(source, leading, math.prod(inner), node, editor)
        wide = editor.value("MatMul", [source, weight], before=node, stem=f"{stem}/product", like=result)
        if biased is not None:
            wide = editor.value("Add", [wide, bias], before=node, stem=f"{stem}/biased", like=result)
        editor.replace(result, wide)
        return True


def _joined(source: ir.Value, leading: int, width: int, before: ir.Node, editor: Editor) -> ir.Value:
    """`source` with all but its leading axes (attention heads) joined to one of `width`."""
    assert before.graph is not None
    assert source.shape is not None
    sizes = editor.constant(np.array([0] * leading + [width], np.int64), "sizes", before.graph)
    return editor.value(
        "Reshape",
        [source, sizes],
        before=before,
        stem=f"{before.outputs[0].name or 'linear'}/joined",
        dtype=source.dtype,
        shape=ir.Shape([*list(source.shape)[:leading], width]),
    )


def _flat_product(
    value: ir.Value | None,
) -> tuple[ir.Value, ir.Node, ir.Node | None, ir.Value | None] | None:
    """(x, MatMul, Add or None, bias or None) if `value` is a product of the flattened x with a weight."""
    biased, bias = producer(value, "Add"), None
    if biased is not None:
        pair = split_constant(biased)
        if pair is None or rank(pair[1]) not in (0, 1):
            return None
        value, bias = pair
    product = producer(value, "MatMul")
    flat = producer(product.inputs[0], "Reshape") if product is not None else None
    if product is None or flat is None or flat.inputs[0] is None:
        return None
    if not is_constant(product.inputs[1]) or rank(product.inputs[1]) != 2 or rank(flat.outputs[0]) != 2:
        return None
    return flat.inputs[0], product, biased, bias
